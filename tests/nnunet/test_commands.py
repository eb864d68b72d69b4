"""nnU-Net's commands with the smallest STU-Net on phantoms, from training to prediction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import PHANTOM_ID, Workspace

pytestmark = pytest.mark.slow

TRAINER = "STUNetTrainer_tiny"
FULLRES = "3d_fullres"
PREDICT = ("-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1)


def train(
    workspace: Workspace, configuration: str, fold: int, trainer: str, *more: object, **how: Any
) -> CompletedProcess[str]:
    words = (PHANTOM_ID, configuration, fold, "-tr", trainer, "-device", "cpu", *more)
    return workspace.run("nnUNetv2_train", *words, **how)


def load(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, map_location="cpu", weights_only=False)


@pytest.fixture(scope="module")
def trained(phantoms: Workspace) -> Workspace:
    """Fold 0 of 3d_fullres, trained for two epochs, validated with probabilities."""
    train(phantoms, FULLRES, 0, TRAINER, "--npz", STUNET_EPOCHS="2")
    return phantoms


@pytest.fixture
def fold(trained: Workspace) -> Path:
    return trained.model(TRAINER) / "fold_0"


def assert_same(first: Path, second: Path) -> None:
    one, two = (
        {x.name: sitk.GetArrayFromImage(sitk.ReadImage(str(x))) for x in folder.glob("*.nii.gz")}
        for folder in (first, second)
    )
    assert one
    np.testing.assert_equal(one, two)


def test_training_writes_what_stock_training_writes(fold: Path) -> None:
    for name in ("checkpoint_best.pth", "progress.png", "validation/summary.json"):
        assert (fold / name).is_file(), name
    for ending in (".npz", ".nii.gz"):
        assert len(list((fold / "validation").glob(f"*{ending}"))) == 2
    checkpoint = load(fold / "checkpoint_final.pth")
    assert (checkpoint["trainer_name"], checkpoint["current_epoch"]) == (TRAINER, 2)
    assert np.isfinite(checkpoint["logging"]["train_losses"]).all()


def test_prediction_equals_validation_also_after_export_and_install(
    trained: Workspace, fold: Path, tmp_path: Path, new_workspace: Callable[[str], Workspace]
) -> None:
    (images := tmp_path / "images").mkdir()
    splits = trained.dataset_folder(trained.preprocessed) / "splits_final.json"
    for case in json.loads(splits.read_text())[0]["val"]:
        name = f"imagesTr/{case}_0000.nii.gz"
        shutil.copy(trained.dataset_folder(trained.raw) / name, images)
    model = ("-d", PHANTOM_ID, "-c", FULLRES, "-tr", TRAINER)
    trained.run("nnUNetv2_predict", "-i", images, "-o", tmp_path / "p", *model, *PREDICT)
    assert_same(tmp_path / "p", fold / "validation")
    archive = tmp_path / "model.zip"
    trained.run("nnUNetv2_export_model_to_zip", "-o", archive, *model, "-f", 0)
    other = new_workspace("installed")
    other.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    words = ("-i", images, "-o", tmp_path / "p2", "-m", other.model(TRAINER), *PREDICT)
    other.run("nnUNetv2_predict_from_modelfolder", *words)
    assert_same(tmp_path / "p2", fold / "validation")


def test_continuing_resumes_and_validation_alone_repeats(
    trained: Workspace, fold: Path, tmp_path: Path
) -> None:
    before = load(fold / "checkpoint_final.pth")
    other = tmp_path / "continued"
    shutil.copytree(trained.results, other)
    copy = other / fold.relative_to(trained.results)
    cut_short = copy / "checkpoint_latest.pth.unfinished"
    cut_short.write_bytes(b"killed in the middle of a write")
    train(trained, FULLRES, 0, TRAINER, "--c", STUNET_EPOCHS="3", nnUNet_results=str(other))
    assert not cut_short.exists()
    after = load(copy / "checkpoint_final.pth")
    assert after["current_epoch"] == 3
    assert after["logging"]["train_losses"][:2] == before["logging"]["train_losses"]
    assert before["optimizer_state"]["state"][0]["momentum_buffer"].abs().sum() > 0
    log = max(copy.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime).read_text()
    assert "Epoch 2" in log
    assert "Epoch 1" not in log
    shutil.rmtree(copy / "validation")
    train(trained, FULLRES, 0, TRAINER, "--val", nnUNet_results=str(other))
    assert (copy / "validation" / "summary.json").is_file()


def test_fine_tuning_loads_everything_but_the_heads(trained: Workspace, fold: Path) -> None:
    weights = fold / "checkpoint_final.pth"
    tuning = (trained, FULLRES, 1, f"{TRAINER}_ft", "-pretrained_weights", weights)
    result = train(*tuning, STUNET_ITERATIONS="1")
    assert "no pretrained weights were given" not in result.stdout
    assert "Current learning rate: 0.001" in result.stdout
    folder = trained.model(f"{TRAINER}_ft") / "fold_1"
    start = load(weights)["network_weights"]
    tuned = load(folder / "checkpoint_final.pth")["network_weights"]
    heads = sum(".seg_layers." in name for name in start)
    log = next(folder.glob("training_log_*.txt")).read_text()
    assert f"Pretrained weights: {len(start) - heads} of {len(start)} tensors (99." in log
    # One step at a thousandth: still close to where it started, unlike a new initialisation.
    key = "encoder.stages.3.0.conv2.weight"
    assert (tuned[key] - start[key]).abs().max() < 0.05 * start[key].std()


def test_best_configuration_is_found_among_ours(trained: Workspace) -> None:
    train(trained, "2d", 0, TRAINER, "--npz", STUNET_ITERATIONS="1")
    words = ("-p", "nnUNetPlans", "-c", "2d", FULLRES, "-tr", TRAINER, "-f", 0, "-np", 1)
    trained.run("nnUNetv2_find_best_configuration", PHANTOM_ID, *words)
    information = trained.dataset_folder(trained.results) / "inference_information.json"
    assert TRAINER in json.dumps(json.loads(information.read_text())["considered_models"])


@pytest.mark.parametrize(
    ("trainer", "weights", "facts"),
    [
        ("STUNetTrainer_gigantic", "", ("list --trainers", "Could not find")),
        (TRAINER, None, ("nnUNet_results is not set",)),
        (
            "STUNetTrainer_small_ft",
            "checkpoint_final.pth",
            ("does not fit STUNetTrainer_small_ft", TRAINER, "of the same size"),
        ),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    trained: Workspace, fold: Path, trainer: str, weights: str | None, facts: tuple[str, ...]
) -> None:
    words = ("-pretrained_weights", fold / weights) if weights else ()
    unset = {"nnUNet_results": None} if weights is None else {}
    before = sorted((path, path.stat().st_mtime) for path in trained.results.rglob("*"))
    result = train(trained, FULLRES, 0, trainer, *words, check=False, **unset)
    assert result.returncode != 0
    assert sorted((path, path.stat().st_mtime) for path in trained.results.rglob("*")) == before
    for fact in facts:
        assert fact in result.stdout + result.stderr
