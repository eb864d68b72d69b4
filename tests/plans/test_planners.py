"""Planners: what they plan, that it fits the memory, whose data they use, and stock trainers."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin import plans as planners
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import STUNET_CLASS, fitting_patch, options_of, resolve
from stunet_plugin.networks.memory import GIGABYTE, STUNetShape
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.networks.topology import as_strides, total_stride
from stunet_plugin.plans.misfm_planners import PLANNERS as MISFM
from stunet_plugin.plans.stunet_planners import PLANNERS

from conftest import PHANTOM_ID, Workspace
from dataset_helpers import change_json, write_dataset

HOST = "nnUNetPlans_3d_fullres"


@pytest.fixture
def large(nnunet_folders: Path) -> Path:
    """The fingerprint of 300 large anisotropic scans with five classes, as dataset 7, all that
    planners read; returns its folder in nnUNet_preprocessed."""
    labels = {name: value for value, name in enumerate(("background", *"abcde"))}
    write_dataset(nnunet_folders / "nnUNet_raw" / "Dataset007_Large", labels, 1, numTraining=300)
    folder = nnunet_folders / "nnUNet_preprocessed" / "Dataset007_Large"
    folder.mkdir()
    fingerprint = {
        "shapes_after_crop": [[180, 512, 512]] * 6,
        "spacings": [[2.5, 0.8, 0.8]] * 6,
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
        "median_relative_size_after_cropping": 1.0,
    }
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return folder


@pytest.mark.parametrize("size", PRESETS)
def test_plans_carry_the_published_network_and_fit_the_target(large: Path, size: str) -> None:
    preset = PRESETS[size]
    plans: dict[str, Any] = PLANNERS[f"STUNetPlanner_{size}"](7).plan_experiment()
    assert plans["plans_name"] == f"STUNetPlans_{size}"
    for name in ("2d", "3d_lowres", "3d_fullres"):
        chosen = plans["configurations"][name]
        architecture = chosen["architecture"]
        assert architecture["network_class_name"] == STUNET_CLASS
        kwargs = architecture["arch_kwargs"]
        assert kwargs["features_per_stage"] == list(preset.features_per_stage)
        assert kwargs["n_blocks_per_stage"] == [preset.blocks] * 6
        assert len(kwargs["strides"]) == 6
        shape = STUNetShape.of_preset(preset, as_strides(kwargs["strides"]), 1, 6)
        target = preset.gpu_memory_gb * GIGABYTE
        assert shape.training_memory(chosen["patch_size"], chosen["batch_size"]) <= target
        assert chosen["batch_size"] >= 2
    full = plans["configurations"]["3d_fullres"]
    assert full["data_identifier"] == f"STUNetPlans_{size}_3d_fullres"
    assert plans["configurations"]["3d_cascade_fullres"]["inherits_from"] == "3d_fullres"


@pytest.mark.parametrize(("name", "gigabytes"), [("PCTNetPlanner", 4), ("FMUNetPlanner", 3)])
def test_plans_of_misfm_fit_the_target(large: Path, name: str, gigabytes: int) -> None:
    # Small scans, since larger patches take longer to trace.
    shapes = [[40, 128, 128]] * 6
    change_json(large / "dataset_fingerprint.json", shapes_after_crop=shapes)
    planner = MISFM[name](7, gpu_memory_target_in_gb=gigabytes)
    plans = planner.plan_experiment()
    assert "2d" not in plans["configurations"]
    chosen = plans["configurations"]["3d_fullres"]
    resolved = resolve(chosen, planner.network_record, "a trainer").architecture
    assert resolved == chosen["architecture"]
    needed = planner.training_bytes(resolved, chosen["patch_size"], chosen["batch_size"], (1, 6))
    assert needed <= gigabytes * GIGABYTE


def test_plans_with_shape_priors_count_their_maps_and_leave_room(large: Path) -> None:
    change_json(large / "dataset_fingerprint.json", shapes_after_crop=[[40, 128, 128]] * 6)
    plain, priors = (PLANNERS[f"STUNetPlanner_tiny{suffix}"](7) for suffix in ("", "_SPM"))
    plans = priors.plan_experiment()
    assert plans["plans_name"] == "STUNetPlans_tiny_SPM"
    chosen = plans["configurations"]["3d_fullres"]
    assert options_of(chosen)["spm"]["stages"]
    patch, batch, architecture = (
        chosen[key] for key in ("patch_size", "batch_size", "architecture")
    )
    needed = priors.training_bytes(architecture, patch, batch, (1, 6))
    assert needed <= priors._target_bytes
    without = architecture["arch_kwargs"]["network"]
    alone = plain.training_bytes(without, patch, batch, (1, 6))
    # The arithmetic of the plain network, and the trace of the whole, measure alike.
    traced = priors.training_bytes(without, patch, batch, (1, 6))
    assert traced == pytest.approx(alone, rel=0.1)
    assert needed > traced
    assert resolve(chosen, PRESETS["tiny"], "a trainer").architecture == architecture


def test_plans_of_unetr_choose_tokens_by_the_spacing_and_fit_the_target(large: Path) -> None:
    change_json(large / "dataset_fingerprint.json", shapes_after_crop=[[40, 128, 128]] * 6)
    planner = planners.PLANNERS["UNETRPlanner_tiny_STP"](7, 3.0)
    plans = planner.plan_experiment()
    assert plans["plans_name"] == "UNETRPlans_tiny_STP"
    for name, token in (("2d", (8, 8)), ("3d_fullres", (2, 8, 8))):
        chosen = plans["configurations"][name]
        architecture, patch, batch = (
            chosen[key] for key in ("architecture", "patch_size", "batch_size")
        )
        assert total_stride(as_strides(architecture["arch_kwargs"]["strides"][:-1])) == token
        assert architecture["arch_kwargs"]["pruning"]["ratio"] == 0.75
        assert planner.training_bytes(architecture, patch, batch, (1, 6)) <= 3 * GIGABYTE
        found = resolve(chosen, planner.preset, "UNETRTrainer_tiny_STP")
        assert found.architecture == architecture
        with pytest.raises(PluginError, match="has pruning .*, not None. Train it as planned"):
            resolve(chosen, replace(planner.preset, ratio=None), "UNETRTrainer_tiny")


def test_prompt_plans_take_images_as_they_are_with_patches_for_the_viewers(large: Path) -> None:
    change_json(large / "dataset_fingerprint.json", shapes_after_crop=[[20, 512, 500]] * 6)
    plans = planners.PromptPlanner_STUNet_tiny(7).plan_experiment()
    assert set(plans["configurations"]) == {"2d", "3d_fullres"}
    chosen = plans["configurations"]["3d_fullres"]
    assert min(chosen["patch_size"]) == 64
    strides = as_strides(chosen["architecture"]["arch_kwargs"]["strides"])
    assert not any(x % y for x, y in zip(chosen["patch_size"], total_stride(strides), strict=True))
    kinds = ("data", "seg", "probabilities")
    assert {chosen[f"resampling_fn_{kind}"] for kind in kinds} == {"no_resampling_hack"}
    assert chosen["normalization_schemes"] == ["ZScoreNormalization"]
    assert chosen["data_identifier"] == "PromptPlans_STUNet_tiny_3d_fullres"
    with pytest.raises(PluginError, match="least patch of 64 voxels per axis does not fit into 4"):
        planners.PromptPlanner_STUNet_large(7, 4.0).plan_experiment()


def test_patch_that_fits_is_near_and_divisible() -> None:
    assert fitting_patch([1.0, 1.0, 1.0], [40, 56, 40])[0] == [48, 64, 48]
    assert fitting_patch([5.0, 1.0, 1.0], [18, 256, 250])[0] == [20, 256, 256]
    assert fitting_patch([1.0, 1.0, 1.0], [3, 3, 3])[0] == [32, 32, 32]


def test_more_memory_gives_a_larger_patch(large: Path) -> None:
    def voxels(gigabytes: float) -> int:
        plans = PLANNERS["STUNetPlanner_base"](7, gigabytes).plan_experiment()
        return math.prod(plans["configurations"]["3d_fullres"]["patch_size"])

    assert voxels(6) < voxels(24)
    refused = "STU-Net huge does not fit into 8 GB.*Raise -gpu_memory_target.* small, base, large"
    with pytest.raises(PluginError, match=refused):
        PLANNERS["STUNetPlanner_huge"](7, 8.0).plan_experiment()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpu_memory_target_in_gb": math.nan}, "-gpu_memory_target must be a number of gig"),
        ({"plans_name": "nnUNetPlans"}, "belongs to plans of nnU-Net.*-overwrite_plans_name"),
        ({"plans_name": "Others"}, "belongs to plans of OtherPlanner"),
        ({"plans_name": "../elsewhere"}, "-overwrite_plans_name may hold"),
        ({"overwrite_target_spacing": [1.0, 0.0, 1.0]}, "takes three millimetres above 0"),
    ],
)
def test_wrong_arguments_are_refused(large: Path, wrong: dict[str, Any], message: str) -> None:
    (large / "Others.json").write_text('{"experiment_planner_used": "OtherPlanner"}')
    with pytest.raises(PluginError, match=message):
        PLANNERS["STUNetPlanner_tiny"](7, **wrong)


def test_data_is_shared_only_where_asked_for_and_alike(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = PLANNERS["STUNetPlanner_small"]
    alike = planner(7)
    assert alike.generate_data_identifier("3d_fullres") == "STUNetPlans_small_3d_fullres"
    monkeypatch.setenv("STUNET_SHARE_DATA", "1")
    assert alike.generate_data_identifier("3d_fullres") == HOST
    assert alike.generate_data_identifier("3d_lowres") == "STUNetPlans_small_3d_lowres"
    other = planner(7, overwrite_target_spacing=[6.0, 6.0, 6.0], plans_name="Coarse")
    assert other.generate_data_identifier("3d_fullres") == "Coarse_3d_fullres"
    special = planner(7, preprocessor_name="MyPreprocessor")
    assert special.generate_data_identifier("3d_fullres") == "STUNetPlans_small_3d_fullres"
    # nnU-Net would delete it before it fills it again.
    (large / HOST).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["/bin/nnUNetv2_plan_and_preprocess", "-d", "7"])
        with pytest.raises(PluginError, match="would delete them .* nnUNetv2_plan_experiment"):
            alike.generate_data_identifier("3d_fullres")
    # What nnUNetPlans say counts, not what would be planned.
    planned = {"configurations": {"3d_fullres": {"spacing": [6.0, 6.0, 6.0]}}}
    (large / "nnUNetPlans.json").write_text(json.dumps(planned))
    assert alike.generate_data_identifier("3d_fullres") == "STUNetPlans_small_3d_fullres"
    assert other.generate_data_identifier("3d_fullres") == HOST


@pytest.mark.slow
def test_planning_and_preprocessing_leaves_the_data_of_others(
    nnunet_environment: Workspace,
) -> None:
    folder = nnunet_environment.dataset_folder(nnunet_environment.preprocessed)
    files = sorted((folder / "nnUNetPlans_3d_fullres").iterdir())
    before = [file.stat() for file in files]
    _, plans = plan_experiment_dataset(int(PHANTOM_ID), planners.PLANNERS["FMUNetPlanner"])
    preprocess_dataset(int(PHANTOM_ID), plans, ("3d_fullres",), (1,))
    assert [file.stat().st_mtime_ns for file in files] == [one.st_mtime_ns for one in before]
    assert [file.stat().st_ino for file in files] == [one.st_ino for one in before]
    made = {file.name for file in (folder / f"{plans}_3d_fullres").iterdir()}
    assert made == {file.name for file in files}


@pytest.mark.slow
def test_stock_trainer_trains_from_the_plan(
    nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = PLANNERS["STUNetPlanner_tiny"](int(PHANTOM_ID)).plan_experiment()
    preprocess_dataset(int(PHANTOM_ID), plans["plans_name"], ("3d_fullres",), (1,))
    patch = plans["configurations"]["3d_fullres"]["patch_size"]
    description = json.loads(
        (nnunet_environment.dataset_folder(nnunet_environment.raw) / "dataset.json").read_text()
    )
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = nnUNetTrainer(
        {**plans, "continue_training": False}, "3d_fullres", 0, description, torch.device("cpu")
    )
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()
    assert isinstance(trainer.network, STUNet)
    assert list(trainer.configuration_manager.patch_size) == list(patch)
    assert torch.isfinite(torch.tensor(trainer.logger.get_value("train_losses", step=-1)))


def test_plan_command_without_registration(
    large: Path, stunet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "plan -d 7 -pl STUNetPlanner_tiny -overwrite_plans_name Mine"
    assert "Next: nnUNetv2_preprocess -d 7 -plans_name Mine -c 3d_fullres" in stunet(words)
    (large / HOST).mkdir()
    monkeypatch.setenv("STUNET_SHARE_DATA", "1")
    assert "Next: nnUNetv2_train 7 3d_fullres 0 -p Mine -tr TRAINER" in stunet(words)
    plans = json.loads((large / "Mine.json").read_text())
    assert plans["experiment_planner_used"] == "STUNetPlanner_tiny"
    refused = stunet.refuse("plan -d 7 -pl STUNetPlanner_big")
    assert "Unknown planner 'STUNetPlanner_big'. Did you mean" in refused


def test_plan_command_on_what_is_not_there(nnunet_folders: Path, stunet: Any) -> None:
    words = "plan -pl STUNetPlanner_tiny -d"
    assert "There is no dataset 7 (Dataset007_...) in " in stunet.refuse(words, "7")
    assert "-np must be at least 1, not 0" in stunet.refuse(words, "7 -np 0")
    broken = nnunet_folders / "nnUNet_raw" / "Dataset008_Broken"
    (broken / "imagesTr").mkdir(parents=True)
    labels = '"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"'
    for content, message in (
        (None, "Dataset008_Broken has no dataset.json"),
        ("{", "dataset.json cannot be read"),
        ("{}", "lacks labels, file_ending"),
        (f"{{{labels}}}", "lacks channel_names"),
        (f'{{{labels}, "channel_names": {{"0": "CT"}}}}', "imagesTr holds no *.nii.gz files"),
    ):
        if content is not None:
            (broken / "dataset.json").write_text(content)
        assert message in stunet.refuse(words, "8")
    stunet.patch.delenv("nnUNet_raw")
    assert "export nnUNet_raw=" in stunet.refuse(words, "7")


def test_hint_for_a_planner_that_does_not_exist(capsys: Any) -> None:
    assert not hasattr(planners, "STUnetPlanner_smal")
    assert "Did you mean STUNetPlanner_small?" in capsys.readouterr().err
