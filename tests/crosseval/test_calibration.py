"""Calibration on confidences that are right as often as was decided, and in the results."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stunet_plugin.crosseval.calibration import BINS, Calibration, count, read_confidence
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Model

from conftest import Stunet
from dataset_helpers import read_array, write_array
from import_helpers import make_network, published_weights, write_v1

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
    said = stunet(*words, tmp_path / "out", "--calibration")
    assert "tool on truth: no confidence from which on 95% of voxels are right." in said


def sure_model(folder: Path, stunet: Stunet) -> Path:
    """A model with random weights that is sure of some voxels."""
    torch.manual_seed(0)
    network = make_network(outputs=3)
    for head in network.decoder.seg_layers:
        head.weight.data *= 2
    source = write_v1(folder / "m.model", published_weights(network))
    stunet("import", source, "--labels background liver spleen --out", folder / "a model")
    return folder / "a model"


def test_a_models_threshold_is_what_pseudo_label_takes(
    nnunet_folders: Path, stunet: Stunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sure_model(nnunet_folders, stunet)
    model, cases = Model(folder, step_size=1, mirroring=False), ("a", "b")
    rng, confidences, right = np.random.default_rng(0), [], []
    for case in cases:
        array = rng.normal(size=(12, 20, 16)).astype(np.float32).cumsum(0)
        image = write_array(nnunet_folders / f"images/{case}_0000.nii.gz", array, (5, -7, 11))
        found = model.predict([image])
        # The truth is what the model says where it is sure enough, and else the other organ.
        truth = np.where(
            (found.confidence < 0.6) & (found.labels > 0), 3 - found.labels, found.labels
        )
        written = nnunet_folders / f"truth/{case}.nii.gz"
        written.parent.mkdir(exist_ok=True)
        model.reader.write_seg(truth, str(written), found.properties)
        foreground = found.labels > 0
        confidences.append(found.confidence[foreground])
        right.append((truth == found.labels)[foreground])
    (nnunet_folders / "truth/dataset.json").write_text((folder / "dataset.json").read_text())
    how = f"--model=m={folder},mirroring=false,step_size=1"
    words = ["crosseval", Path(how), "--dataset"]
    words += [f"T,images={nnunet_folders / 'images'},references={nnunet_folders / 'truth'}"]
    words += ["-np 1 --device cpu -o", nnunet_folders / "out"]
    said = stunet(*words, "--calibration")
    (nnunet_folders / "out/confidences/m/T/a.nii.gz").unlink()
    again = stunet(*words, "--calibration")
    assert "Predictions: 1 of 2 are there." in again
    assert "Scores: 2 of 2 are there." in again
    results = json.loads((nnunet_folders / "out/summary.json").read_text())
    calibration = results["pairs"][0]["calibration"]
    values, correct = np.concatenate(confidences), np.concatenate(right)
    bins = np.minimum((values * 20).astype(int), 19)
    distances = [abs(values[bins == x].sum() - correct[bins == x].sum()) for x in range(20)]
    assert calibration["ECE"] == pytest.approx(sum(distances) / len(values), abs=0.01)
    threshold = calibration["ignore_below"]
    assert correct[values >= threshold].mean() == pytest.approx(0.95, abs=0.02)

    command = next(x for x in said.splitlines() if "stunet pseudo-label" in x).strip()
    assert command in (nnunet_folders / "out/report.html").read_text().replace("&#39;", "'")
    _, *given = shlex.split(command)
    meant = {"IMAGES": str(nnunet_folders / "images"), "ID": "910"}
    stunet(*(Path(meant.get(word, word)) for word in given), "--device cpu --allow-missing")
    dataset = nnunet_folders / "nnUNet_raw/Dataset910_PseudoLabels"
    settings = json.loads((dataset / "pseudo_labels.json").read_text())
    assert settings["ignore_below"] == threshold
    assert (settings["step_size"], settings["mirroring"], settings["folds"]) == (1, False, ["0"])
    ignored = sum((read_array(dataset / f"labelsTr/{case}.nii.gz") == 3).sum() for case in cases)
    assert ignored >= (values < threshold).sum() > 0
