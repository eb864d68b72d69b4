"""`stunet pseudo-label`: the confidence filter, nnU-Net's own predictions as a dataset, interrupted
runs, refusals."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stunet_plugin.cli import main
from stunet_plugin.datasets.pseudo_label import ConfidenceFilter, Rule, parse_rules
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Model, Prediction
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.label_systems import LabelSystem, check_regions

from conftest import Stunet
from dataset_helpers import change_json, read_array, write_array
from import_helpers import load_model, make_network, published_weights, write_v1
from unlabeled_helpers import snapshot

SYSTEM = LabelSystem.numbered("model", ["liver", "spleen"])
LABELS = [0, 0, 1, 1, 1, 1, 2, 2]
CONFIDENCE = [0.9, 0.4, 0.9, 0.9, 0.5, 0.7, 0.6, 0.6]
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


def filtered(
    system: LabelSystem = SYSTEM, confidence: list[float] = CONFIDENCE, **rules: Any
) -> tuple[list[int], dict[str, Any]]:
    """Four voxels of liver, two of spleen; a voxel is 10 mm3, and 9 is the ignore label."""
    arrays = np.array([[LABELS]], np.uint8), np.array([[confidence]], np.float32)
    labels, record = ConfidenceFilter(system, 9, **rules).apply(Prediction(*arrays, {}, 10.0))
    return labels.ravel().tolist(), record


def test_voxels_of_low_confidence_become_ignore() -> None:
    """Those at the threshold stay; the classes' means are of the whole prediction."""
    labels, record = filtered(ignore_below=0.6)
    assert (labels, record["ignored"]) == ([0, 9, 1, 1, 9, 1, 2, 2], 2 / 8)
    about = {"voxels": 4, "mm3": 40.0, "confidence": pytest.approx(0.75), "reasons": []}
    assert record["classes"]["liver"] == {**about, "kept": 3}


@pytest.mark.parametrize(
    ("liver", "kept"),
    [
        (Rule(min_confidence=0.7), True),
        (Rule(min_confidence=0.8), False),
        (Rule(min_mm3=40, max_mm3=40), True),
        (Rule(min_mm3=41), False),
        (Rule(max_mm3=39), False),
    ],
)
def test_rules_of_a_class(liver: Rule, kept: bool) -> None:
    labels, record = filtered(rules={"liver": liver})
    assert (labels, record["left_out"]) == (LABELS if kept else [0, 0, 9, 9, 9, 9, 2, 2], "")
    record = filtered(rules={"liver": liver}, drop_cases=True)[1]
    assert kept == (record["left_out"] == "") == (record["classes"]["spleen"]["kept"] == 2)


def test_odd_confidences_absent_classes_and_regions() -> None:
    """NaN is never confident; of a class that must be there and is not, no voxel could be marked;
    regions count by all their labels."""
    nan = [np.nan] * 8
    assert filtered(confidence=nan, ignore_below=0.0)[0] == [9] * 8
    labels, _ = filtered(confidence=nan, rules={"liver": Rule(min_confidence=0.0)})
    assert labels == [0, 0, 9, 9, 9, 9, 2, 2]
    system = LabelSystem.numbered("model", ["liver", "spleen", "kidney"])
    record = filtered(system, rules={"kidney": Rule(min_mm3=1)})[1]
    assert record["left_out"] == "kidney: 0 mm3, less than 1"
    assert not filtered(system, rules={"kidney": Rule(min_confidence=0.9)})[1]["left_out"]
    regions = {"labels": REGIONS, "regions_class_order": [1, 2]}
    labels, _ = filtered(LabelSystem.from_table(regions, "x"), rules={"whole": Rule(max_mm3=59)})
    assert labels == [0, 0, 9, 9, 9, 9, 9, 9]


def test_an_order_of_regions_whose_values_are_others() -> None:
    for order in ([1, 2], None):
        check_regions({"labels": REGIONS, "regions_class_order": order}, "model")
    for order in ([3, 5], [2, 1], [2, 2], [1], 5):
        with pytest.raises(PluginError, match="regions_class_order"):
            check_regions({"labels": REGIONS, "regions_class_order": order}, "model")


def test_rules_as_users_write_them() -> None:
    rules = parse_rules(SYSTEM, ["Liver=0.9", "0.5"], ["spleen=10:", "liver=:2000"])
    assert rules == {"liver": Rule(0.9, None, 2000), "spleen": Rule(0.5, 10, None)}
    for text in ("1.5", "nan", "x"):
        with pytest.raises(PluginError, match="from 0 to 1"):
            parse_rules(SYSTEM, [text], [])
    with pytest.raises(PluginError, match="no class 'heart'"):
        parse_rules(SYSTEM, ["heart=0.5"], [])
    for text in ("liver=10", "liver=x:", "liver=inf:", "liver=10:5", "10:20"):
        with pytest.raises(PluginError, match="CLASS=MIN:MAX"):
            parse_rules(SYSTEM, [], [text])


SHAPE = (12, 20, 16)
CASES = ("a", "b_c", "d")
LABEL = "pseudo-label model -i images -d 910 -n P --device cpu --no-mirroring --step-size 1"
DATASET = Path("nnUNet_raw", "Dataset910_P")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three classes with random weights, and three images."""
    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = make_network(outputs=3)
    for head in network.decoder.seg_layers:
        # Random weights alone would be sure of nothing.
        head.weight.data *= 2
    source = write_v1(root / "m.model", published_weights(network))
    labels = ["--labels", "background", "liver", "spleen"]
    assert main(["import", str(source), "--out", str(root / "model"), *labels]) == 0
    rng = np.random.default_rng(0)
    for case in CASES:
        array = rng.normal(size=SHAPE).astype(np.float32).cumsum(0)
        file = root / "images" / f"{case}_0000.nii.gz"
        write_array(file, array, (5, -7, 11), (1.5, 1.5, 3))
    return root


@pytest.fixture
def folders(model: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("model", "images"):
        shutil.copytree(model / name, nnunet_folders / name)
    monkeypatch.chdir(nnunet_folders)
    return nnunet_folders


def test_predictions_of_nnunet_become_a_dataset(
    folders: Path, stunet: Stunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(folders / "images")
    stunet(LABEL, "--ignore-below 0.5 --copy --allow-missing")
    dataset = folders / DATASET
    description = read_json(dataset / "dataset.json")
    assert description["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert (description["numTraining"], description["file_ending"]) == (3, ".nii.gz")
    predictor = load_model(folders / "model", monkeypatch)
    predictor.use_gaussian, predictor.tile_step_size = True, 1.0
    reader = predictor.plans_manager.image_reader_writer_class()
    record = read_json(dataset / "pseudo_labels.json")
    for case in CASES:
        image = folders / "images" / f"{case}_0000.nii.gz"
        given = reader.read_images([str(image)])
        expected, probabilities = predictor.predict_single_npy_array(*given, None, None, True)
        confidence = probabilities.max(0)
        reader.write_seg(np.where(confidence < 0.5, 3, expected), "expected.nii.gz", given[1])
        found = dataset / "labelsTr" / f"{case}.nii.gz"
        assert np.array_equal(read_array(found), read_array(Path("expected.nii.gz")))
        assert 0 < (read_array(found) == 3).mean() < 1
        assert sitk.ReadImage(str(found)).GetOrigin() == (5, -7, 11)
        entry = record["cases"][case]
        assert entry["ignored"] == pytest.approx((confidence < 0.5).mean())
        assert entry["images"] == [str(image)]
        liver = entry["classes"]["liver"]
        assert liver["mm3"] == pytest.approx((expected == 1).sum() * 6.75)
        assert liver["confidence"] == pytest.approx(confidence[expected == 1].mean(), rel=1e-4)
        assert not (dataset / "imagesTr" / image.name).is_symlink()
    assert (record["folds"], len(record["checkpoints"]["fold_0"])) == (["0"], 64)
    assert snapshot(folders / "images") == before


def test_interrupted_and_resumed(
    folders: Path, monkeypatch: pytest.MonkeyPatch, stunet: Stunet
) -> None:
    predict, seen = Model.predict, []

    def interrupted(self: Any, images: tuple[Path, ...]) -> Prediction:
        seen.append(images[0].name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(Model, "predict", interrupted)
    raw, dataset = folders / "nnUNet_raw", folders / DATASET
    unfinished = raw / f".unfinished_{dataset.name}"
    assert str(unfinished) in stunet(LABEL, code=130).splitlines()[-1]
    assert list(raw.iterdir()) == [unfinished]
    # Other options would mix two kinds of labels.
    assert "ignore_below" in stunet(LABEL, "--ignore-below 0.9", code=2)
    stunet(LABEL)
    assert seen == [f"{case}_0000.nii.gz" for case in ("a", "b_c", "b_c", "d")]
    assert [path.name for path in raw.iterdir()] == [dataset.name]
    link = dataset / "imagesTr" / "a_0000.nii.gz"
    assert os.readlink(link) == str(folders / "images" / "a_0000.nii.gz")
    # No voxel can become ignore, so there is no such label.
    assert "ignore" not in read_json(dataset / "dataset.json")["labels"]
    assert "Already there" in stunet(LABEL)
    assert "-d 910 is taken" in stunet.refuse(LABEL, "--copy")


def test_lost_classes_are_a_warning_and_exit_code_1(folders: Path, stunet: Stunet) -> None:
    # A dataset in nnUNet_raw as input.
    (folders / "nnUNet_raw" / "Dataset900_Scans" / "labelsTr").mkdir(parents=True)
    (folders / "images").rename(folders / "nnUNet_raw" / "Dataset900_Scans" / "imagesTr")
    words = LABEL.replace("images", "900")
    assert "No case is left" in stunet(words, "--size liver=1e9: --drop-cases", code=2)
    assert os.listdir(folders / "nnUNet_raw") == ["Dataset900_Scans"]
    words += " --min-confidence 1"
    assert "Its labels are not used" in stunet(words.replace("910", "911"), "--allow-missing")
    for _ in ("made", "already there"):
        assert "of the 3 cases show: liver in 0, spleen in 0" in stunet(words, code=1)
    stunet(words, "--allow-missing")


def test_refusals(folders: Path, stunet: Stunet) -> None:
    (folders / "none").mkdir()
    (folders / "none" / "scan.nrrd").touch()
    for words, message in (
        ("-chk none.pth", "has no fold_X/none.pth"),
        ("--ignore-below 2", "--ignore-below must be a number"),
        ("--min-share 2", "--min-share must be a number"),
        ("-i ./nothing_there", "nothing_there is not a folder"),
        ("-i none", "no images CASE_0000.nii.gz, as the model reads (it has files that end in"),
    ):
        assert message in stunet.refuse(LABEL, words), words
    # Before anything is predicted.
    bad, array = folders / "images" / "z_0000.nii.gz", np.ones(SHAPE, np.float32)
    array[0, 0, 0] = np.nan
    write_array(bad, array)
    assert "z_0000.nii.gz: not finite (1 of 3840" in stunet.refuse(LABEL)
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}
    change_json(Path("model/dataset.json"), labels=regions, regions_class_order=[4, 5, 6])
    assert "regions_class_order" in stunet.refuse(LABEL)
