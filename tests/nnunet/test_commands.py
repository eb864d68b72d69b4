"""The stock command lines as subprocesses, with the smallest STU-Net on phantoms: train, continue,
validate, fine-tune, predict, export, install, find the best configuration, and what they say about
wrong input.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import PHANTOM_ID, Workspace

pytestmark = pytest.mark.slow

TRAINER = "STUNetTrainer_tiny"


@pytest.fixture(scope="module")
def trained(phantoms: Workspace) -> Workspace:
    """Fold 0 of 3d_fullres, trained for two epochs, validated with probabilities."""
    phantoms.run(
        "nnUNetv2_train",
        PHANTOM_ID,
        "3d_fullres",
        0,
        "-tr",
        TRAINER,
        "-device",
        "cpu",
        "--npz",
        STUNET_EPOCHS="2",
    )
    return phantoms


@pytest.fixture(scope="module")
def images(trained: Workspace) -> Path:
    """The fold's validation images, as new ones."""
    splits = json.loads(
        (trained.dataset_folder(trained.preprocessed) / "splits_final.json").read_text()
    )
    folder = trained.root / "images"
    folder.mkdir()
    for case in splits[0]["val"]:
        shutil.copy(
            trained.dataset_folder(trained.raw) / "imagesTr" / f"{case}_0000.nii.gz", folder
        )
    return folder


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in sorted(folder.glob("*.nii.gz"))
    }


def assert_same(first: Path, second: Path) -> None:
    one, two = segmentations(first), segmentations(second)
    assert one.keys() == two.keys()
    assert len(one) > 0
    for name in one:
        assert np.array_equal(one[name], two[name]), name


def test_training_leaves_what_stock_training_leaves(trained: Workspace) -> None:
    fold = trained.model(TRAINER) / "fold_0"
    for name in (
        "checkpoint_final.pth",
        "checkpoint_best.pth",
        "progress.png",
        "validation/summary.json",
    ):
        assert (fold / name).is_file(), name
    assert (
        len(list((fold / "validation").glob("*.npz")))
        == len(list((fold / "validation").glob("*.nii.gz")))
        == 2
    )
    checkpoint = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert checkpoint["trainer_name"] == TRAINER
    assert checkpoint["current_epoch"] == 2
    assert np.isfinite(checkpoint["logging"]["train_losses"]).all()


def test_prediction_equals_validation(trained: Workspace, images: Path) -> None:
    trained.run(
        "nnUNetv2_predict",
        "-i",
        images,
        "-o",
        trained.root / "p1",
        "-d",
        PHANTOM_ID,
        "-c",
        "3d_fullres",
        "-f",
        0,
        "-tr",
        TRAINER,
        "-device",
        "cpu",
        "-npp",
        1,
        "-nps",
        1,
    )
    assert_same(trained.root / "p1", trained.model(TRAINER) / "fold_0" / "validation")


def test_export_install_and_predict_from_the_folder(
    trained: Workspace, images: Path, new_workspace: object
) -> None:
    archive = trained.root / "model.zip"
    trained.run(
        "nnUNetv2_export_model_to_zip",
        "-d",
        PHANTOM_ID,
        "-o",
        archive,
        "-c",
        "3d_fullres",
        "-tr",
        TRAINER,
        "-f",
        0,
    )
    other = new_workspace("installed")  # type: ignore[operator]
    other.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    model = other.model(TRAINER)
    arguments = (
        "-i",
        images,
        "-o",
        other.root / "p",
        "-m",
        model,
        "-f",
        0,
        "-device",
        "cpu",
        "-npp",
        1,
        "-nps",
        1,
    )
    other.run("nnUNetv2_predict_from_modelfolder", *arguments)
    assert_same(other.root / "p", trained.model(TRAINER) / "fold_0" / "validation")


def test_continuing_goes_on_where_it_was_and_validation_alone_repeats(trained: Workspace) -> None:
    fold = trained.model(TRAINER) / "fold_0"
    before = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    other = trained.results.parent / "continued"
    shutil.copytree(trained.results, other)
    copy = other / fold.relative_to(trained.results)
    arguments = (PHANTOM_ID, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu")
    cut_short = copy / "checkpoint_latest.pth.unfinished"
    cut_short.write_bytes(b"killed in the middle of a write")
    trained.run("nnUNetv2_train", *arguments, "--c", STUNET_EPOCHS="3", nnUNet_results=str(other))
    assert not cut_short.exists()
    after = torch.load(copy / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert after["current_epoch"] == 3
    assert after["logging"]["train_losses"][:2] == before["logging"]["train_losses"]
    assert len(after["logging"]["train_losses"]) == 3
    momentum = before["optimizer_state"]["state"][0]["momentum_buffer"]
    assert momentum.abs().sum() > 0
    log = max(copy.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime).read_text()
    assert "Epoch 2" in log
    assert "Epoch 1" not in log
    shutil.rmtree(copy / "validation")
    trained.run("nnUNetv2_train", *arguments, "--val", nnUNet_results=str(other))
    assert (copy / "validation" / "summary.json").is_file()


def test_fine_tuning_loads_everything_but_the_heads(trained: Workspace) -> None:
    weights = trained.model(TRAINER) / "fold_0" / "checkpoint_final.pth"
    arguments = (PHANTOM_ID, "3d_fullres", 1, "-tr", f"{TRAINER}_ft", "-device", "cpu")
    result = trained.run(
        "nnUNetv2_train", *arguments, "-pretrained_weights", weights, STUNET_ITERATIONS="1"
    )
    assert "no pretrained weights were given" not in result.stdout
    assert "Current learning rate: 0.001" in result.stdout
    tuned = torch.load(
        trained.model(f"{TRAINER}_ft") / "fold_1" / "checkpoint_final.pth",
        map_location="cpu",
        weights_only=False,
    )
    start = torch.load(weights, map_location="cpu", weights_only=False)["network_weights"]
    heads = sum(".seg_layers." in name for name in start)
    log = next((trained.model(f"{TRAINER}_ft") / "fold_1").glob("training_log_*.txt")).read_text()
    assert f"Pretrained weights: {len(start) - heads} of {len(start)} tensors (99." in log
    assert (
        f"come from {TRAINER}; {heads} start at random: {heads} of the segmentation heads." in log
    )
    # One step at a thousandth: still close to where it started, unlike a new initialisation.
    key = "encoder.stages.3.0.conv2.weight"
    assert (tuned["network_weights"][key] - start[key]).abs().max() < 0.05 * start[key].std()


def test_best_configuration_is_found_among_ours(trained: Workspace) -> None:
    trained.run(
        "nnUNetv2_train",
        PHANTOM_ID,
        "2d",
        0,
        "-tr",
        TRAINER,
        "-device",
        "cpu",
        "--npz",
        STUNET_ITERATIONS="1",
    )
    trained.run(
        "nnUNetv2_find_best_configuration",
        PHANTOM_ID,
        "-p",
        "nnUNetPlans",
        "-c",
        "2d",
        "3d_fullres",
        "-tr",
        TRAINER,
        "-f",
        0,
        "-np",
        1,
    )
    information = json.loads(
        (trained.dataset_folder(trained.results) / "inference_information.json").read_text()
    )
    assert TRAINER in json.dumps(information["considered_models"])


def failure(workspace: Workspace, *arguments: object, **environment: str | None) -> str:
    """Run nnUNetv2_train, expect it to fail and to write nothing, return what it printed."""
    before = sorted(workspace.results.rglob("*"))
    result = workspace.run(
        "nnUNetv2_train", PHANTOM_ID, *arguments, "-device", "cpu", check=False, **environment
    )
    assert result.returncode != 0
    assert sorted(workspace.results.rglob("*")) == before
    return result.stdout + result.stderr


def test_unknown_size_is_answered_with_the_known_ones(trained: Workspace) -> None:
    text = failure(trained, "3d_fullres", 0, "-tr", "STUNetTrainer_gigantic")
    assert (
        "no trainer STUNetTrainer_gigantic: sizes tiny, small, base, large, huge, each with nothing"
        " or _ft, _ep2k" in text
    )
    assert "Could not find requested nnunet trainer" in text


def test_missing_configuration_and_variables(trained: Workspace) -> None:
    assert "no configuration '3d_lowres'. Available: 2d, 3d_fullres" in failure(
        trained, "3d_lowres", 0, "-tr", TRAINER
    )
    assert "nnUNet_results is not set. Set it to a folder" in failure(
        trained, "3d_fullres", 0, "-tr", TRAINER, nnUNet_results=None
    )


def test_weights_of_another_size_are_refused_in_a_sentence(trained: Workspace) -> None:
    weights = trained.model(TRAINER) / "fold_0" / "checkpoint_final.pth"
    before = weights.stat()
    result = trained.run(
        "nnUNetv2_train",
        PHANTOM_ID,
        "3d_fullres",
        0,
        "-tr",
        "STUNetTrainer_small_ft",
        "-device",
        "cpu",
        "-pretrained_weights",
        weights,
        check=False,
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "does not fit STUNetTrainer_small_ft: it was written by STUNetTrainer_tiny and" in last
    assert "Use the trainer of the same size (its _ft variant), or weights of this size" in last
    assert weights.stat() == before
    assert not trained.model("STUNetTrainer_small_ft").exists()
    missing = trained.run(
        "nnUNetv2_train",
        PHANTOM_ID,
        "3d_fullres",
        0,
        "-tr",
        f"{TRAINER}_ft",
        "-device",
        "cpu",
        "-pretrained_weights",
        "nowhere.pth",
        check=False,
    )
    assert "-pretrained_weights nowhere.pth: there is no such file" in missing.stderr
