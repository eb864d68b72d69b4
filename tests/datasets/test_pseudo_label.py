"""`stunet pseudo-label`: nnU-Net's own predictions as a dataset, what is not trusted ignored,
interrupted runs, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from stunet_plugin.cli import main
from stunet_plugin.datasets.confidence_filter import ConfidenceFilter, Rule, parse_rules
from stunet_plugin.datasets.label_systems import LabelSystem
from stunet_plugin.errors import PluginError
from stunet_plugin.inference import predictor as predicting
from stunet_plugin.inference.predictor import Prediction
from stunet_plugin.nnunet.registration import trainers_folder

from import_helpers import make_network, published_weights, v1_plans, write_v1
from unlabeled_helpers import snapshot

SHAPE = (12, 20, 16)
CASES = ("a", "b_c", "d")
SYSTEM = LabelSystem.from_table({"labels": {"background": 0, "liver": 1, "spleen": 2}}, "model")


# --- the rules


def prediction() -> Prediction:
    """Four voxels of liver, two of spleen; a voxel is 10 mm3."""
    labels = np.array([[[0, 0, 1, 1, 1, 1, 2, 2]]], np.uint8)
    confidence = np.array([[[0.9, 0.4, 0.9, 0.9, 0.5, 0.7, 0.6, 0.6]]], np.float32)
    return Prediction(labels, confidence, {}, 10.0)


def decided(**trust: Any) -> tuple[list[int] | None, Any]:
    decision = ConfidenceFilter(SYSTEM, 3, **trust).decide(prediction())
    return (None if decision.labels is None else decision.labels.ravel().tolist()), decision


def test_without_rules_nothing_changes() -> None:
    labels, decision = decided()
    assert labels == [0, 0, 1, 1, 1, 1, 2, 2]
    assert decision.ignored == 0
    assert decision.classes["liver"] == {
        "voxels": 4,
        "mm3": 40.0,
        "confidence": pytest.approx(0.75),
        "reasons": [],
        "kept": 4,
    }


def test_voxels_of_low_confidence_become_ignore() -> None:
    labels, decision = decided(ignore_below=0.6)
    # Those at the threshold stay; the classes' means are of the whole prediction.
    assert labels == [0, 3, 1, 1, 3, 1, 2, 2]
    assert decision.ignored == pytest.approx(2 / 8)
    assert decision.classes["liver"]["confidence"] == pytest.approx(0.75)


def test_a_class_of_low_mean_confidence_becomes_ignore_or_drops_the_case() -> None:
    rules = {"spleen": Rule(min_confidence=0.7), "liver": Rule(min_confidence=0.7)}
    labels, decision = decided(rules=rules)
    assert labels == [0, 0, 1, 1, 1, 1, 3, 3]
    assert decision.classes["spleen"]["reasons"] == ["mean confidence 0.600 below 0.7"]
    labels, decision = decided(rules=rules, drop_cases=True)
    assert labels is None
    assert decision.reason == "spleen: mean confidence 0.600 below 0.7"


@pytest.mark.parametrize(
    ("least", "most", "trusted"),
    [(40, 40, True), (41, None, False), (None, 39, False), (0, 100, True)],
)
def test_sizes(least: float | None, most: float | None, trusted: bool) -> None:
    labels, _ = decided(rules={"liver": Rule(min_mm3=least, max_mm3=most)})
    assert labels == ([0, 0, 1, 1, 1, 1, 2, 2] if trusted else [0, 0, 3, 3, 3, 3, 2, 2])


def test_a_class_that_must_be_there_and_is_not_leaves_the_case_out() -> None:
    """No voxel could be marked in its place: all of the background would be wrong."""
    system = LabelSystem.from_table(
        {"labels": {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}}, "model"
    )
    rules = {"kidney": Rule(min_mm3=1)}
    decision = ConfidenceFilter(system, 4, rules=rules).decide(prediction())
    assert (decision.labels, decision.reason) == (None, "kidney: 0 mm3, less than 1")
    assert (
        ConfidenceFilter(system, 4, rules={"kidney": Rule(min_confidence=0.9)})
        .decide(prediction())
        .labels
        is not None
    )


def test_regions_count_by_all_their_labels() -> None:
    table = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    trust = ConfidenceFilter(
        LabelSystem.from_table(table, "model"), 3, rules={"whole": Rule(max_mm3=59)}
    )
    labels = trust.decide(prediction()).labels
    assert labels is not None
    assert labels.ravel().tolist() == [0, 0, 3, 3, 3, 3, 3, 3]


def test_rules_as_users_write_them() -> None:
    rules = parse_rules(SYSTEM, ["Liver=0.9", "0.5"], ["spleen=10:", "liver=:2000"])
    assert rules == {"liver": Rule(0.9, None, 2000), "spleen": Rule(0.5, 10, None)}
    for confidences, sizes, message in (
        (["1.5"], [], "from 0 to 1"),
        (["heart=0.5"], [], "no class 'heart'"),
        ([], ["liver=10"], "CLASS=MIN:MAX"),
        ([], ["liver=x:"], "no volume"),
        ([], ["liver=10:5"], "larger than"),
    ):
        with pytest.raises(PluginError, match=message):
            parse_rules(SYSTEM, confidences, sizes)


# --- the command


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of three classes with random weights, and three images."""
    (tmp_path / "nnUNet_raw").mkdir()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    torch.manual_seed(0)
    network = make_network(outputs=3)
    for head in network.decoder.seg_layers:
        # Random weights alone would be sure of nothing.
        head.weight.data *= 2
    source = write_v1(tmp_path / "m.model", published_weights(network), v1_plans(classes=2))
    labels = ["--labels", "background", "liver", "spleen"]
    assert main(["import", str(source), "--out", str(tmp_path / "model"), *labels]) == 0
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for case in CASES:
        image = sitk.GetImageFromArray(rng.normal(size=SHAPE).astype(np.float32).cumsum(0))
        image.SetSpacing((1.5, 1.5, 3))
        image.SetOrigin((5, -7, 11))
        sitk.WriteImage(image, str(tmp_path / "images" / f"{case}_0000.nii.gz"))
    return tmp_path


def label(folders: Path, *more: object, images: str = "images") -> int:
    given = [
        "pseudo-label",
        folders / "model",
        "-i",
        folders / images,
        "-d",
        910,
        "-n",
        "P",
        "--device",
        "cpu",
        "--no-mirroring",
    ]
    return main([*map(str, (*given, "--step-size", 1, *more))])


def read(path: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return array


def test_predictions_of_nnunet_become_a_dataset(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(folders / "images")
    assert label(folders, "--ignore-below", 0.5, "--copy", "--allow-missing") == 0
    dataset = folders / "nnUNet_raw" / "Dataset910_P"
    assert sorted(path.name for path in dataset.iterdir()) == [
        "dataset.json",
        "imagesTr",
        "labelsTr",
        "pseudo_labels.json",
    ]
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert LabelManager(description["labels"], None).ignore_label == 3
    assert (description["numTraining"], description["file_ending"]) == (3, ".nii.gz")

    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    predictor = nnUNetPredictor(1.0, True, False, False, torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folders / "model"), ("0",))
    record = json.loads((dataset / "pseudo_labels.json").read_text())
    for case in CASES:
        reader = predictor.plans_manager.image_reader_writer_class()
        image = folders / "images" / f"{case}_0000.nii.gz"
        array, properties = reader.read_images([str(image)])
        expected, probabilities = predictor.predict_single_npy_array(
            array, properties, None, None, True
        )
        confidence = probabilities.max(0)
        reader.write_seg(
            np.where(confidence < 0.5, 3, expected), str(folders / "expected.nii.gz"), properties
        )
        found = dataset / "labelsTr" / f"{case}.nii.gz"
        assert np.array_equal(read(found), read(folders / "expected.nii.gz"))
        assert 0 < (read(found) == 3).mean() < 1
        assert sitk.ReadImage(str(found)).GetOrigin() == (5, -7, 11)
        entry = record["cases"][case]
        assert entry["ignored"] == pytest.approx((confidence < 0.5).mean())
        assert entry["images"] == [str(image)]
        for name, value in (("liver", 1), ("spleen", 2)):
            mask = expected == value
            assert entry["classes"][name]["mm3"] == pytest.approx(mask.sum() * 6.75)
            if mask.any():
                assert entry["classes"][name]["confidence"] == pytest.approx(
                    confidence[mask].mean(), rel=1e-4
                )
        copied = dataset / "imagesTr" / image.name
        assert copied.read_bytes() == image.read_bytes()
        assert not copied.is_symlink()
    assert record["folds"] == ["0"]
    assert len(record["checkpoints"]["fold_0"]) == 64
    assert snapshot(folders / "images") == before


def test_interrupted_and_continued(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict, seen = predicting.Model.predict, []

    def interrupted(self: Any, images: tuple[Path, ...]) -> Prediction:
        seen.append(images[0].name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(predicting.Model, "predict", interrupted)
    raw = folders / "nnUNet_raw"
    assert label(folders) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    unfinished = raw / ".unfinished_Dataset910_P"
    assert (
        last
        == f"Interrupted. What is finished is in {unfinished}. The same command resumes where it"
        " stopped."
    )
    assert [path.name for path in raw.iterdir()] == [".unfinished_Dataset910_P"]
    # Other options would mix two kinds of labels.
    assert label(folders, "--ignore-below", 0.9) == 2
    assert "ignore_below" in capsys.readouterr().err
    assert label(folders) == 0
    assert seen == [f"{case}_0000.nii.gz" for case in ("a", "b_c", "b_c", "d")]
    assert [path.name for path in raw.iterdir()] == ["Dataset910_P"]
    link = raw / "Dataset910_P" / "imagesTr" / "a_0000.nii.gz"
    assert os.readlink(link) == str(folders / "images" / "a_0000.nii.gz")
    # No voxel can become ignore, so there is no such label.
    assert "ignore" not in json.loads((raw / "Dataset910_P" / "dataset.json").read_text())["labels"]
    assert label(folders) == 0
    assert "Already there" in capsys.readouterr().out
    assert label(folders, "--copy") == 2
    assert "-d 910 is taken" in capsys.readouterr().err


def test_cases_that_are_left_out(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label(folders, "--size", "liver=1e9:", "--drop-cases") == 2
    told = capsys.readouterr()
    assert "0 of 3 cases are kept" in told.out
    assert "left out: a: liver: " in told.out
    assert "No case is left" in told.err
    assert list((folders / "nnUNet_raw").iterdir()) == []


def test_a_dataset_as_input(folders: Path) -> None:
    scans = folders / "nnUNet_raw" / "Dataset900_Scans"
    scans.mkdir()
    (folders / "images").rename(scans / "imagesTr")
    assert (
        main(
            [
                "pseudo-label",
                str(folders / "model"),
                "-i",
                "900",
                "-d",
                "910",
                "--device",
                "cpu",
                "--no-mirroring",
            ]
        )
        == 0
    )
    assert (
        len(list((folders / "nnUNet_raw" / "Dataset910_PseudoLabels" / "labelsTr").iterdir())) == 3
    )


def test_refusals(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*more: object, images: str = "images") -> str:
        capsys.readouterr()
        assert label(folders, *more, images=images) == 2
        assert not any((folders / "nnUNet_raw").iterdir())
        return capsys.readouterr().err

    assert "no such file" in refused("-f", "3")
    assert "has no fold_X/none.pth" in refused("-chk", "none.pth")
    assert "from 0 to 1" in refused("--ignore-below", "2")
    assert "--step-size" in refused("--step-size", "0")
    assert "no class 'heart'" in refused("--size", "heart=1:2")
    assert "nothing_there is not a folder" in refused(images="nothing_there")
    (folders / "none").mkdir()
    (folders / "none" / "scan.nrrd").touch()
    assert (
        "no images CASE_0000.nii.gz, which the model reads (it has files that end in .nrrd)"
        in refused(images="none")
    )
    (folders / "images" / "a_0001.nii.gz").touch()
    assert "case a has 2 image(s), expected a_0000.nii.gz" in refused()
    (folders / "images" / "z_0000.nii.gz").touch()
    (folders / "images" / "a_0001.nii.gz").unlink()
    assert label(folders, "--size", "liver=0:1e9") == 2
    assert "z_0000.nii.gz: unreadable" in capsys.readouterr().err
    (folders / "images" / "z_0000.nii.gz").unlink()
    checkpoint = torch.load(
        folders / "model" / "fold_0" / "checkpoint_final.pth", weights_only=True
    )
    pretext = {**checkpoint, "trainer_name": "VolumeFusionTrainer_STUNet_tiny"}
    torch.save(pretext, folders / "model" / "fold_0" / "checkpoint_final.pth")
    assert "pretrained with Volume Fusion" in refused()
    (folders / "model" / "plans.json").unlink()
    assert "no model folder" in refused()
