"""Labels of imported weights: in which forms they are read, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.output_labels import Labels


@pytest.mark.parametrize(
    "content",
    [
        {"0": "background", "1": "liver", "2": "spleen"},
        {"background": 0, "liver": 1, "spleen": 2},
        {"labels": {"background": 0, "liver": 1, "spleen": 2}, "numTraining": 3},
    ],
)
def test_label_files(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    labels = Labels.from_option([str(path)])
    labels.check_outputs(3)
    assert labels.to_dataset() == {"labels": {"background": 0, "liver": 1, "spleen": 2}}


def test_regions_and_ignore_label_are_counted_as_nnunet_does() -> None:
    dataset = {
        "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
        "regions_class_order": [1, 2],
    }
    labels = Labels.from_dataset(dataset, "x")
    labels.check_outputs(2)
    assert labels.to_dataset() == dataset
    with pytest.raises(PluginError, match="regions_class_order"):
        Labels.from_dataset({"labels": dataset["labels"]}, "x").check_outputs(2)


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "a": "x"},
        {"background": 0, "a": -1},
        {"background": 0, "a": 70_000},
        [],
        {},
    ],
)
def test_labels_that_nnunet_does_not_take_are_refused(labels: Any) -> None:
    with pytest.raises(PluginError, match="labels must be a table"):
        Labels.from_dataset({"labels": labels}, "x")


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "a": 1, "b": 3},
        {"a": 0, "b": 1, "c": 2},
        {"background": 0, "a": 1, "ignore": 1},
    ],
)
def test_labels_with_gaps_or_without_background_are_refused(labels: dict[str, int]) -> None:
    with pytest.raises(PluginError, match="Labels"):
        Labels.from_dataset({"labels": labels}, "x").check_outputs(3)
