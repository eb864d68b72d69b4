"""The experiment with two hospitals: what is changed in the scans, and its commands, printed
without being run."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.utils.geometry import Grid


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    return importlib.import_module("hospitals")


def test_the_other_hospitals_scans_and_labels_lie_on_each_other(script: ModuleType) -> None:
    labels = np.zeros((12, 20, 14), np.float32)
    labels[3:9, 6:14, 2:8], labels[3:9, 6:14, 8:12] = 1, 2
    original = sitk.DICOMOrient(sitk.GetImageFromArray(labels), "RAS")
    scan, swapped = (
        script.other_scanner(sitk.Cast(original * 60 + 20, sitk.sitkUInt8)),
        script.other_labels(original),
    )
    assert Grid.of(scan).agrees(Grid.of(swapped))
    assert Grid.of(swapped).orientation == "LPS"
    assert swapped.GetSpacing() == (1, 2, 1)
    # The same places have the other number: boxes of even size and start survive thick slices.
    found = sitk.GetArrayFromImage(swapped)
    assert [(found == value).sum() * 2 for value in (1, 2)] == [
        (labels == value).sum() for value in (2, 1)
    ]
    middle = [round(float(place)) for place in np.argwhere(found == 1).mean(axis=0)]
    there = swapped.TransformIndexToPhysicalPoint(middle[::-1])
    assert original.GetPixel(original.TransformPhysicalPointToIndex(there)) == 2
    assert sitk.GetArrayFromImage(scan)[found == 2].mean() < 80


def test_dry_run_prints_the_commands_and_writes_nothing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "labelsTr").mkdir(parents=True)
    arguments = [
        "--data",
        str(tmp_path / "data"),
        "--work",
        str(tmp_path / "work"),
        "--dry-run",
        "--networks",
        "pctnet",
        "nnunet",
    ]
    assert script.main(arguments) == 0
    printed = capsys.readouterr().out
    for command in (
        "stunet plan -pl PCTNetPlanner -d 911",
        "-tr nnUNetTrainerBudget -p nnUNetPlans",
        "stunet merge-datasets 911 912 -d 913 -n BothHospitals",
        "stunet merge-datasets 911 915 --train-only 915 -d 918 -n AWithPseudoB_nnunet",
        "stunet crosseval",
    ):
        assert printed.count(command) >= 1, command
    assert printed.count("nnUNetv2_preprocess -d 911 -plans_name PCTNetPlans") == 1
    assert not (tmp_path / "work").exists()
    assert (
        script.main(["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--dry-run"]) == 2
    )
