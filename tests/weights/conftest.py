from __future__ import annotations

import json
from pathlib import Path

import pytest

from import_helpers import v2_plans, with_changes, write_v1


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A v1 checkpoint of random weights with its .pkl."""
    return write_v1(tmp_path / "source" / "tiny.model")


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of dataset 7 in nnUNet_preprocessed, as nnU-Net leaves it after planning."""
    folder = tmp_path / "preprocessed" / "Dataset007_Other"
    folder.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    changes = {
        "dataset_name": folder.name,
        "transpose_forward": [2, 0, 1],
        "transpose_backward": [1, 2, 0],
        "original_median_spacing_after_transp": [3.0, 1.0, 0.5],
        "original_median_shape_after_transp": [40, 200, 300],
        "experiment_planner_used": "ExperimentPlanner",
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(with_changes(v2_plans(), changes)))
    channels, labels = {"0": "MRI"}, {"background": 0}
    dataset = {"channel_names": channels, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder
