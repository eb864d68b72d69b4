"""Lesions as instances: measures that can be worked out by hand, and their place in the results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from stunet_plugin.crosseval.lesions import is_lesion, match_lesions, summary

from conftest import Stunet
from dataset_helpers import write_array

SHAPE = (8, 10, 40)


def cubes(*places: tuple[int, int]) -> np.ndarray:
    """Cubes of 4 x 4 x width voxels, each as (start, width) along the last axis."""
    mask = np.zeros(SHAPE, bool)
    for start, width in places:
        mask[2:6, 2:6, start : start + width] = True
    return mask


REFERENCE = cubes((1, 4), (8, 4), (16, 4), (24, 4))
PREDICTION = cubes((1, 4), (9, 4), (19, 4), (33, 4))
"""The first is right, the second has an IoU of 3/5, the third of 1/7, the fourth is missed, and one
is found where there is none."""


def test_measures_by_hand() -> None:
    found = match_lesions(REFERENCE, PREDICTION, (2, 1, 1))
    # Three of four found with an IoU of 0.1 or more, and three of four right.
    assert found["F1"] == pytest.approx(3 / 4)
    assert found["PQ"] == pytest.approx((1 + 3 / 5) / 4)
    assert found["false_positives"] == 1
    volume = pytest.approx(64 * 2 / 1000)
    assert found["lesions"] == [(volume, True), (volume, True), (volume, True), (volume, False)]


def test_lesions_that_touch_at_corners_are_one_and_matches_are_one_to_one() -> None:
    diagonal = np.zeros(SHAPE, bool)
    diagonal[1, 1, 1] = diagonal[2, 2, 2] = True
    assert len(match_lesions(diagonal, diagonal, (1, 1, 1))["lesions"]) == 1
    # One large prediction over two lesions finds one of them.
    found = match_lesions(cubes((1, 4), (6, 4)), cubes((1, 9)), (1, 1, 1))
    assert [x for _, x in found["lesions"]] == [True, False]
    assert found["false_positives"] == 0


def test_nothing_in_one_or_both() -> None:
    nothing = np.zeros(SHAPE, bool)
    none = match_lesions(nothing, nothing, (1, 1, 1))
    assert math.isnan(none["F1"])
    assert math.isnan(none["PQ"])
    assert (none["false_positives"], none["lesions"]) == (0, [])
    assert match_lesions(REFERENCE, nothing, (1, 1, 1))["F1"] == 0
    wrong = match_lesions(nothing, PREDICTION, (1, 1, 1))
    assert (wrong["F1"], wrong["false_positives"]) == (0, 4)
    both = summary([{**none, "F1": None, "PQ": None}, wrong])
    assert (both["F1"], both["false_positives"], both["sensitivity"]) == (0, 2, None)


def test_sensitivity_by_size() -> None:
    sizes = [(0.05, True), (0.05, False), (0.5, True), (3.0, True)]
    case = {"F1": 0.5, "PQ": 0.5, "false_positives": 2, "lesions": sizes}
    found = summary([case])
    assert found["sensitivity"] == 0.75
    assert list(found["sensitivity_by_size"].values()) == [0.5, 1, 1]
    assert list(found["lesions_by_size"].values()) == [2, 1, 1]


def test_names_of_lesions() -> None:
    for name in (
        "lesion",
        "liver_tumour",
        "tumor",
        "ms_lesions",
        "lung_nodule_left",
        "kidney_cyst",
    ):
        assert is_lesion(name), name
    for name in ("liver", "liver_without_tumour", "cystic_duct", "spleen"):
        assert not is_lesion(name), name


def test_lesions_in_the_results(tmp_path: Path, stunet: Stunet) -> None:
    for folder, mask in (("truth", REFERENCE), ("tool", PREDICTION)):
        for case in ("a", "b"):
            labels = mask.astype(np.uint8)
            labels[0, :3, :3] = 2
            write_array(tmp_path / folder / f"{case}.nii.gz", labels, spacing=(1, 1, 2))
    (tmp_path / "labels.json").write_text(json.dumps({"labels": {"liver tumour": 1, "spots": 2}}))
    references = f"{tmp_path / 'truth'},labels={tmp_path / 'labels.json'}"
    words = ("crosseval", "--predictions", f"tool={tmp_path / 'tool'}", "--references", references)
    for more, names in (
        ((), ["liver_tumour"]),
        (("--lesions", "spots"), ["liver_tumour", "spots"]),
    ):
        stunet(*words, *more, "-np", 1, "-o", tmp_path / "out")
        results = json.loads((tmp_path / "out" / "summary.json").read_text())
        found = results["pairs"][0]["lesions"]
        assert list(found) == names
    assert found["liver_tumour"]["lesions"] == 8
    assert found["liver_tumour"]["sensitivity_by_size"]["0.1 to 1 ml"] == 0.75
    assert found["spots"]["PQ"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "false positives a case" in page
    assert "0.750 <small>of 8" in page
