"""`stunet pseudo-label`: nnU-Net's own predictions as a dataset, interrupted runs, refusals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from stunet_plugin.cli import main
from stunet_plugin.inference import predictor as predicting
from stunet_plugin.inference.predictor import Prediction
from stunet_plugin.nnunet.registration import trainers_folder

from dataset_helpers import read_array
from import_helpers import make_network, published_weights, v1_plans, write_v1
from unlabeled_helpers import snapshot

SHAPE = (12, 20, 16)
CASES = ("a", "b_c", "d")
FAST = ("--device", "cpu", "--no-mirroring", "--step-size", "1")


@pytest.fixture
def folders(nnunet_folders: Path) -> Path:
    """A model of three classes with random weights, and three images."""
    root = nnunet_folders
    torch.manual_seed(0)
    network = make_network(outputs=3)
    for head in network.decoder.seg_layers:
        # Random weights alone would be sure of nothing.
        head.weight.data *= 2
    source = write_v1(root / "m.model", published_weights(network), v1_plans(classes=2))
    labels = ["--labels", "background", "liver", "spleen"]
    assert main(["import", str(source), "--out", str(root / "model"), *labels]) == 0
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for case in CASES:
        image = sitk.GetImageFromArray(rng.normal(size=SHAPE).astype(np.float32).cumsum(0))
        image.SetSpacing((1.5, 1.5, 3))
        image.SetOrigin((5, -7, 11))
        sitk.WriteImage(image, str(root / "images" / f"{case}_0000.nii.gz"))
    return root


def words(folders: Path, *more: object, images: str = "images") -> list[str]:
    given = ("pseudo-label", folders / "model", "-i", folders / images, "-d", 910, "-n", "P")
    return [*map(str, (*given, *FAST, *more))]


def label(folders: Path, *more: object) -> int:
    return main(words(folders, *more))


def test_predictions_of_nnunet_become_a_dataset(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(folders / "images")
    assert label(folders, "--ignore-below", 0.5, "--copy", "--allow-missing") == 0
    dataset = folders / "nnUNet_raw" / "Dataset910_P"
    files = ["dataset.json", "imagesTr", "labelsTr", "pseudo_labels.json"]
    assert sorted(path.name for path in dataset.iterdir()) == files
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert LabelManager(description["labels"], None).ignore_label == 3
    assert (description["numTraining"], description["file_ending"]) == (3, ".nii.gz")

    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    predictor = nnUNetPredictor(1.0, True, False, False, torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folders / "model"), ("0",))
    reader = predictor.plans_manager.image_reader_writer_class()
    record = json.loads((dataset / "pseudo_labels.json").read_text())
    for case in CASES:
        image = folders / "images" / f"{case}_0000.nii.gz"
        array, properties = reader.read_images([str(image)])
        expected, probabilities = predictor.predict_single_npy_array(
            array, properties, None, None, True
        )
        confidence = probabilities.max(0)
        filtered = np.where(confidence < 0.5, 3, expected)
        reader.write_seg(filtered, str(folders / "expected.nii.gz"), properties)
        found = dataset / "labelsTr" / f"{case}.nii.gz"
        assert np.array_equal(read_array(found), read_array(folders / "expected.nii.gz"))
        assert 0 < (read_array(found) == 3).mean() < 1
        assert sitk.ReadImage(str(found)).GetOrigin() == (5, -7, 11)
        entry = record["cases"][case]
        assert entry["ignored"] == pytest.approx((confidence < 0.5).mean())
        assert entry["images"] == [str(image)]
        for name, value in (("liver", 1), ("spleen", 2)):
            mask = expected == value
            assert entry["classes"][name]["mm3"] == pytest.approx(mask.sum() * 6.75)
            if mask.any():
                mean = pytest.approx(confidence[mask].mean(), rel=1e-4)
                assert entry["classes"][name]["confidence"] == mean
        copied = dataset / "imagesTr" / image.name
        assert copied.read_bytes() == image.read_bytes()
        assert not copied.is_symlink()
    assert record["folds"] == ["0"]
    assert len(record["checkpoints"]["fold_0"]) == 64
    assert snapshot(folders / "images") == before


def test_interrupted_and_resumed(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
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
    unfinished = raw / ".unfinished_Dataset910_P"
    assert str(unfinished) in capsys.readouterr().err.splitlines()[-1]
    assert list(raw.iterdir()) == [unfinished]
    # Other options would mix two kinds of labels.
    assert "ignore_below" in refused(*words(folders, "--ignore-below", 0.9))
    assert label(folders) == 0
    assert seen == [f"{case}_0000.nii.gz" for case in ("a", "b_c", "b_c", "d")]
    assert [path.name for path in raw.iterdir()] == ["Dataset910_P"]
    link = raw / "Dataset910_P" / "imagesTr" / "a_0000.nii.gz"
    assert os.readlink(link) == str(folders / "images" / "a_0000.nii.gz")
    # No voxel can become ignore, so there is no such label.
    assert "ignore" not in json.loads((raw / "Dataset910_P" / "dataset.json").read_text())["labels"]
    capsys.readouterr()
    assert label(folders) == 0
    assert "Already there" in capsys.readouterr().out
    assert "-d 910 is taken" in refused(*words(folders, "--copy"))


def test_classes_that_are_lost_are_a_warning_and_exit_code_1(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--min-confidence", 1)
    assert label(folders, *given) == 1
    told = capsys.readouterr()
    assert "3 of 3 cases are kept" in told.out
    assert "WARNING" in told.err
    assert "liver in 0, spleen in 0" in told.err
    assert label(folders, *given) == 1
    assert label(folders, *given, "--allow-missing") == 0
    assert "WARNING" in capsys.readouterr().err


def test_cases_that_are_left_out(
    folders: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(folders, "--size", "liver=1e9:", "--drop-cases")) == 2
    told = capsys.readouterr()
    assert "0 of 3 cases are kept" in told.out
    assert "left out: a: liver: " in told.out
    assert "No case is left" in told.err
    assert list((folders / "nnUNet_raw").iterdir()) == []


def test_a_dataset_as_input(folders: Path) -> None:
    scans = folders / "nnUNet_raw" / "Dataset900_Scans"
    scans.mkdir()
    (folders / "images").rename(scans / "imagesTr")
    given = ["pseudo-label", str(folders / "model"), "-i", "900", "-d", "910", *FAST]
    assert main(given) == 0
    made = folders / "nnUNet_raw" / "Dataset910_PseudoLabels"
    assert len(list((made / "labelsTr").iterdir())) == 3


@pytest.mark.parametrize("copy", [(), ("--copy",)])
def test_spacing_of_tif_travels(folders: Path, copy: tuple[str, ...]) -> None:
    change_json(folders / "model" / "plans.json", image_reader_writer="Tiff3DIO")
    change_json(folders / "model" / "dataset.json", file_ending=".tif")
    for case in CASES:
        image = folders / "images" / f"{case}_0000.nii.gz"
        tifffile.imwrite(image.with_name(f"{case}_0000.tif"), read_array(image))
        image.with_name(f"{case}.json").write_text('{"spacing": [3, 1.5, 1.5]}')
    assert label(folders, "--allow-missing", *copy) == 0
    dataset = folders / "nnUNet_raw" / "Dataset910_P"
    for part in ("imagesTr", "labelsTr"):
        files = sorted(path.name for path in (dataset / part).glob("*.json"))
        assert files == [f"{case}.json" for case in CASES]
        for file in files:
            assert json.loads((dataset / part / file).read_text()) == {"spacing": [3, 1.5, 1.5]}
    assert not list(dataset.rglob(".partial*"))


def change_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
def test_damaged_images_stop_before_anything_is_predicted(
    folders: Path, refused: Callable[..., str], reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_json(folders / "model" / "plans.json", image_reader_writer=reader)
    monkeypatch.setattr(predicting.Model, "predict", None)
    good = (folders / "images" / "a_0000.nii.gz").read_bytes()
    array = read_array(folders / "images" / "a_0000.nii.gz")
    array[0, 0, 0] = np.nan
    bad = folders / "images" / "z_0000.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(array), str(bad))
    assert "z_0000.nii.gz: not finite (1 of 3840" in refused(*words(folders))
    for content in (b"", b"text", good[:-30]):
        bad.write_bytes(content)
        assert "z_0000.nii.gz: " in refused(*words(folders))
    assert not any((folders / "nnUNet_raw").iterdir())


def test_refusals(folders: Path, refused: Callable[..., str]) -> None:
    def wrong(*more: object, images: str = "images") -> str:
        told = refused(*words(folders, *more, images=images))
        assert not any((folders / "nnUNet_raw").iterdir())
        return told

    assert "no such file" in wrong("-f", "3")
    assert "has no fold_X/none.pth" in wrong("-chk", "none.pth")
    assert "--ignore-below must be a number" in wrong("--ignore-below", "2")
    assert "--min-share must be a number" in wrong("--min-share", "2")
    assert "--step-size" in wrong("--step-size", "0")
    assert "no class 'heart'" in wrong("--size", "heart=1:2")
    assert "nothing_there is not a folder" in wrong(images="nothing_there")
    (folders / "none").mkdir()
    (folders / "none" / "scan.nrrd").touch()
    assert "no images CASE_0000.nii.gz" in (told := wrong(images="none"))
    assert "files that end in .nrrd" in told
    (folders / "images" / "a_0001.nii.gz").touch()
    assert "case a has 2 image(s), expected a_0000.nii.gz" in wrong()
    (folders / "images" / "a_0001.nii.gz").unlink()
    model = folders / "model"
    description = (model / "dataset.json").read_text()
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}
    change_json(model / "dataset.json", labels=regions, regions_class_order=[4, 5, 6])
    assert "regions_class_order" in wrong()
    (model / "dataset.json").write_text(description)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    pretext = {**checkpoint, "trainer_name": "VolumeFusionTrainer_STUNet_tiny"}
    torch.save(pretext, model / "fold_0" / "checkpoint_final.pth")
    assert "pretrained with Volume Fusion" in wrong()
    (model / "plans.json").unlink()
    assert "no model folder" in wrong()
