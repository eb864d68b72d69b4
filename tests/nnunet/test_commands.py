"""nnU-Net's commands with the smallest STU-Net on phantoms, from training to prediction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import PHANTOM_ID, Workspace

pytestmark = pytest.mark.slow

TRAINER = "STUNetTrainer_tiny"
FULLRES = "3d_fullres"
PREDICT = ("-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1)


def train(workspace: Workspace, configuration: str, *more: str, **variables: str) -> None:
    words = (PHANTOM_ID, configuration, 0, "-tr", TRAINER, "-device", "cpu", *more)
    workspace.run("nnUNetv2_train", *words, **variables)


@pytest.fixture(scope="module")
def trained(phantoms: Workspace) -> Workspace:
    """Fold 0 of 3d_fullres, trained for two epochs, validated with probabilities."""
    train(phantoms, FULLRES, "--npz", STUNET_EPOCHS="2")
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
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
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


def test_best_configuration_is_found_among_ours(trained: Workspace, fold: Path) -> None:
    shutil.rmtree(fold / "validation")
    train(trained, FULLRES, "--val", "--npz")
    train(trained, "2d", "--npz", STUNET_ITERATIONS="1")
    words = ("-p", "nnUNetPlans", "-c", "2d", FULLRES, "-tr", TRAINER, "-f", 0, "-np", 1)
    trained.run("nnUNetv2_find_best_configuration", PHANTOM_ID, *words)
    information = trained.dataset_folder(trained.results) / "inference_information.json"
    assert TRAINER in json.dumps(json.loads(information.read_text())["considered_models"])
