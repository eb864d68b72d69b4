"""Confidence filter: what is kept of a prediction, and rules as users write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stunet_plugin.datasets.confidence_filter import ConfidenceFilter, Decision, Rule, parse_rules
from stunet_plugin.datasets.label_systems import LabelSystem, check_regions
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Prediction

SYSTEM = LabelSystem.from_table({"labels": {"background": 0, "liver": 1, "spleen": 2}}, "model")
LABELS = [0, 0, 1, 1, 1, 1, 2, 2]
CONFIDENCE = [0.9, 0.4, 0.9, 0.9, 0.5, 0.7, 0.6, 0.6]


def decided(
    system: LabelSystem = SYSTEM, confidence: list[float] = CONFIDENCE, **rules: Any
) -> tuple[list[int] | None, Decision]:
    """Four voxels of liver, two of spleen; a voxel is 10 mm3, and 9 is the ignore label."""
    arrays = np.array([[LABELS]], np.uint8), np.array([[confidence]], np.float32)
    decision = ConfidenceFilter(system, 9, **rules).decide(Prediction(*arrays, {}, 10.0))
    return None if decision.labels is None else decision.labels.ravel().tolist(), decision


def test_without_rules_nothing_changes() -> None:
    labels, decision = decided()
    assert (labels, decision.ignored) == (LABELS, 0)
    mean = pytest.approx(0.75)
    liver = {"voxels": 4, "mm3": 40.0, "confidence": mean, "reasons": [], "kept": 4}
    assert decision.classes["liver"] == liver


def test_voxels_of_low_confidence_become_ignore() -> None:
    labels, decision = decided(ignore_below=0.6)
    # Those at the threshold stay; the classes' means are of the whole prediction.
    assert labels == [0, 9, 1, 1, 9, 1, 2, 2]
    assert decision.ignored == pytest.approx(2 / 8)
    assert decision.classes["liver"]["confidence"] == pytest.approx(0.75)
    assert decision.classes["liver"]["kept"] == 3


def test_what_is_not_a_number_is_never_confident() -> None:
    labels, _ = decided(confidence=[np.nan] * 8, ignore_below=0.0)
    assert labels == [9] * 8
    labels, _ = decided(confidence=[np.nan] * 8, rules={"liver": Rule(min_confidence=0.0)})
    assert labels == [0, 0, 9, 9, 9, 9, 2, 2]


def test_a_class_of_low_mean_confidence_becomes_ignore_or_drops_the_case() -> None:
    rules = {"spleen": Rule(min_confidence=0.7), "liver": Rule(min_confidence=0.7)}
    labels, decision = decided(rules=rules)
    assert labels == [0, 0, 1, 1, 1, 1, 9, 9]
    assert decision.classes["spleen"]["reasons"] == ["mean confidence 0.600 below 0.7"]
    labels, decision = decided(rules=rules, drop_cases=True)
    assert labels is None
    assert decision.reason == "spleen: mean confidence 0.600 below 0.7"


@pytest.mark.parametrize(
    ("least", "most", "kept"),
    [(40, 40, True), (41, None, False), (None, 39, False), (0, 100, True)],
)
def test_sizes(least: float | None, most: float | None, kept: bool) -> None:
    labels, _ = decided(rules={"liver": Rule(min_mm3=least, max_mm3=most)})
    assert labels == (LABELS if kept else [0, 0, 9, 9, 9, 9, 2, 2])


def test_a_class_that_must_be_there_and_is_not_leaves_the_case_out() -> None:
    """No voxel could be marked in its place: all of the background would be wrong."""
    table = {"labels": {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}}
    system = LabelSystem.from_table(table, "model")
    labels, decision = decided(system, rules={"kidney": Rule(min_mm3=1)})
    assert (labels, decision.reason) == (None, "kidney: 0 mm3, less than 1")
    assert decided(system, rules={"kidney": Rule(min_confidence=0.9)})[0] is not None


REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


def test_regions_count_by_all_their_labels() -> None:
    table = {"labels": REGIONS, "regions_class_order": [1, 2]}
    system = LabelSystem.from_table(table, "model")
    labels, _ = decided(system, rules={"whole": Rule(max_mm3=59)})
    assert labels == [0, 0, 9, 9, 9, 9, 9, 9]


@pytest.mark.parametrize(
    ("order", "fits"),
    [([1, 2], True), (None, True), ([3, 5], False), ([2, 1], False), ([2, 2], False), ([1], False)],
)
def test_an_order_of_regions_whose_values_are_others(order: Any, fits: bool) -> None:
    table = {"labels": REGIONS, **({} if order is None else {"regions_class_order": order})}
    if fits:
        check_regions(table, "model")
    else:
        with pytest.raises(PluginError, match="regions_class_order"):
            check_regions(table, "model")


def test_rules_as_users_write_them() -> None:
    rules = parse_rules(SYSTEM, ["Liver=0.9", "0.5"], ["spleen=10:", "liver=:2000"])
    assert rules == {"liver": Rule(0.9, None, 2000), "spleen": Rule(0.5, 10, None)}
    for confidences, sizes, message in (
        (["1.5"], [], "from 0 to 1"),
        (["nan"], [], "from 0 to 1"),
        (["heart=0.5"], [], "no class 'heart'"),
        ([], ["liver=10"], "CLASS=MIN:MAX"),
        ([], ["liver=x:"], "no volume"),
        ([], ["liver=inf:"], "no volume"),
        ([], ["liver=10:5"], "larger than"),
    ):
        with pytest.raises(PluginError, match=message):
            parse_rules(SYSTEM, confidences, sizes)
