"""Calibration on confidences that are right as often as was decided, and in the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.crosseval.calibration import BINS, Calibration, count, read_confidence
from stunet_plugin.errors import PluginError

from conftest import Stunet
from dataset_helpers import write_array

SHAPE = (8, 10, 12)


def counted(confidence: np.ndarray, right: np.ndarray) -> Calibration:
    """Of a foreground class that is predicted everywhere."""
    found = Calibration.of([count(confidence, [(right, np.ones_like(right))])])
    assert found is not None
    return found


def test_a_calibrated_model_and_a_confident_one() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.3, 1, 200_000)
    right = rng.random(confidence.size) < confidence
    found = counted(confidence, right)
    assert found.error() < 0.01
    # Above t the mean of a uniform confidence is (1 + t) / 2: 0.95 from 0.9 on.
    assert found.threshold() == pytest.approx(0.9, abs=0.02)
    assert found.describe()["kept"] == pytest.approx(0.1 / 0.7, abs=0.02)
    boastful = counted(np.full(1000, 0.97), np.arange(1000) < 600)
    assert boastful.error() == pytest.approx(0.37)
    assert boastful.threshold() is None
    assert boastful.threshold(0.5) == 0


def test_voxels_of_background_do_not_count_and_nothing_is_nothing() -> None:
    empty = np.zeros(SHAPE, bool)
    counts, *_ = count(np.full(SHAPE, 0.5), [(empty, empty)])
    assert (sum(counts), len(counts)) == (0, BINS)
    assert Calibration.of([None, count(np.full(SHAPE, 0.5), [(empty, empty)])]) is None


def probabilities(labels: np.ndarray, confidence: float) -> np.ndarray:
    """Two classes and a background."""
    others = (1 - confidence) / 2
    return np.stack([np.where(labels == x, confidence, others) for x in range(3)])


def test_wrong_probabilities_are_told(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5] = 1
    file = write_array(tmp_path / "a.nii.gz", labels)
    reference = sitk.ReadImage(str(file))
    turned = sitk.DICOMOrient(reference, "RAS")
    archive = tmp_path / "a.npz"
    right = probabilities(labels, 0.8)
    right[:, 0, 0, 0] = (0.9, 0.05, 0.05)
    np.savez_compressed(archive, probabilities=right.astype(np.float16))
    found = read_confidence(archive, file, turned)
    # The confidence goes where the voxel goes.
    assert found[0, -1, -1] == pytest.approx(0.9, abs=1e-3)
    wrong: list[Any] = [right.swapaxes(1, 2), right[::-1], right[:1], right.astype(int)]
    for content in wrong:
        np.savez_compressed(archive, probabilities=content)
        with pytest.raises(PluginError, match="does not belong to a.nii.gz"):
            read_confidence(archive, file, reference)
    np.savez(archive, probabilities=np.array([{}], object))
    with pytest.raises(PluginError, match="holds no probabilities"):
        read_confidence(archive, file, reference)
    archive.write_bytes(b"PK\3\4 no archive")
    with pytest.raises(PluginError, match="holds no probabilities"):
        read_confidence(archive, file, reference)


def test_calibration_in_the_results(tmp_path: Path, stunet: Stunet) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5, 2:8, 2:8], labels[5:7, 2:8, 2:8] = 1, 2
    predicted = labels.copy()
    predicted[5:7, 2:8, 2:5] = 1
    (tmp_path / "labels.json").write_text(json.dumps({"labels": {"liver": 1, "spleen": 2}}))
    for case in ("a", "b", "c"):
        write_array(tmp_path / "truth" / f"{case}.nii.gz", labels)
        write_array(tmp_path / "tool" / f"{case}.nii.gz", predicted)
    words = ["crosseval", "--predictions", f"tool={tmp_path / 'tool'}", "--references"]
    words += [f"{tmp_path / 'truth'},labels={tmp_path / 'labels.json'}", "-np", "1", "-o"]
    stunet(*words, tmp_path / "out")
    assert not (tmp_path / "out" / "reliability.png").exists()
    np.savez(tmp_path / "tool" / "a.npz", probabilities=probabilities(predicted, 0.9))
    np.savez(tmp_path / "tool" / "b.npz", probabilities=probabilities(labels, 0.9))
    said = stunet(*words, tmp_path / "out")
    assert "Scores: 1 of 3 are there." in said
    assert "b.npz does not belong to b.nii.gz" in said
    results = json.loads((tmp_path / "out" / "summary.json").read_text())
    right = 1 - 2 * 6 * 3 / (5 * 6 * 6)
    found = results["pairs"][0]["calibration"]
    assert found["ECE"] == pytest.approx(abs(0.9 - right))
    assert found["ignore_below"] is None
    assert (tmp_path / "out" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "pseudo-label --ignore-below" in (tmp_path / "out" / "report.html").read_text()
