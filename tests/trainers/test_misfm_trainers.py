"""PCTNetTrainer, FMUNetTrainer and their planners: the mode that a plan gets, refusals, pairing,
and the stock commands."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import (
    DownsampleSegForDSTransform,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import get_mode
from stunet_plugin.networks.from_plan import HOST_ARCHITECTURES, fitting_patch, resolve
from stunet_plugin.networks.memory import GIGABYTE
from stunet_plugin.networks.presets import MISFM_PRESETS, PCTNET, MISFMPreset
from stunet_plugin.plans.misfm_planners import PLANNERS
from stunet_plugin.trainers.misfm_trainers import TRAINERS

from conftest import PHANTOM_ID, Workspace

SMALL = {
    "PCTNet": {"features_per_stage": [4, 8, 16, 32, 64]},
    "FMUNet": {"features_per_stage": [4, 8, 16, 32, 64]},
}
"""Widths that keep the tests quick; a plans file may carry them."""


TRAIN = (PHANTOM_ID, "3d_fullres", 0, "-p", "PCTNetPlans", "-device", "cpu")


def host_configuration(patch_size: list[int], spacing: list[float]) -> dict[str, Any]:
    architecture = {
        "network_class_name": f"{HOST_ARCHITECTURES}PlainConvUNet",
        "arch_kwargs": {"strides": [[1, 1, 1]]},
    }
    return {"patch_size": patch_size, "spacing": spacing, "architecture": architecture}


def small_architecture(network: MISFMPreset, mode: int) -> dict[str, Any]:
    architecture = network.architecture(get_mode(mode))
    architecture["arch_kwargs"].update(SMALL[network.name])
    return architecture


@pytest.fixture
def make(nnunet_environment: Workspace) -> Callable[..., Any]:
    """Make a trainer on the phantoms' plan, with changes to its configuration."""

    def build(name: str, **changes: Any) -> Any:
        plans = copy.deepcopy(nnunet_environment.plans())
        plans["configurations"]["3d_fullres"].update(changes)
        plans["continue_training"] = False
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "file_ending": ".nii.gz",
        }
        return TRAINERS[name](plans, "3d_fullres", 0, description, torch.device("cpu"))

    return build


@pytest.mark.parametrize("network", MISFM_PRESETS, ids=lambda network: network.name)
@pytest.mark.parametrize(
    ("mode", "patch"), [(0, [32, 32, 32]), (1, [16, 32, 32]), (2, [8, 32, 32])]
)
def test_targets_and_outputs_pair_and_every_parameter_gets_a_gradient(
    make: Callable[..., Any], network: MISFMPreset, mode: int, patch: list[int]
) -> None:
    trainer = make(
        f"{network.name}Trainer",
        architecture=small_architecture(network, mode),
        patch_size=patch,
        batch_size=2,
    )
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    downsample = DownsampleSegForDSTransform(ds_scales=trainer._get_deep_supervision_scales())
    labels = torch.randint(0, 3, (1, *patch), dtype=torch.int16)
    targets = [
        target[None].repeat(2, 1, 1, 1, 1)
        for target in downsample(segmentation=labels)["segmentation"]
    ]
    outputs = trainer.network(torch.randn(2, 1, *patch))
    assert [output.shape[2:] for output in outputs] == [target.shape[2:] for target in targets]
    assert len(trainer.loss.weight_factors) == len(outputs) == 4
    assert np.isfinite(
        trainer.train_step({"data": torch.randn(2, 1, *patch), "target": targets})["loss"]
    )
    assert [
        name for name, parameter in trainer.network.named_parameters() if parameter.grad is None
    ] == []


@pytest.mark.parametrize("name", TRAINERS)
def test_published_hyper_parameters(make: Callable[..., Any], name: str) -> None:
    network = next(network for network in MISFM_PRESETS if name.startswith(network.name))
    trainer = make(name, architecture=small_architecture(network, 0), patch_size=[32, 32, 32])
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.Adam)
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], type(trainer).epochs) == (1e-3, 1e-5, 1000)
    assert trainer.fine_tuning == name.endswith("_ft")
    assert (
        list(inspect.signature(TRAINERS[name].__init__).parameters)[1:]
        == list(inspect.signature(nnUNetTrainer.__init__).parameters)[1:]
    )


@pytest.mark.parametrize(
    ("spacing", "patch", "mode"),
    [
        ([1.0, 1.0, 1.0], [96, 96, 96], 0),
        ([2.0, 1.0, 1.0], [64, 128, 128], 1),
        ([4.0, 1.0, 1.0], [32, 128, 128], 2),
    ],
)
def test_the_mode_follows_from_the_plan(spacing: list[float], patch: list[int], mode: int) -> None:
    architecture, reason = resolve(host_configuration(patch, spacing), PCTNET, "PCTNetTrainer")
    assert architecture["arch_kwargs"]["mode"] == mode
    assert reason.startswith(
        f"Mode {mode}, because the spacing on axis 0 is {spacing[0]:.2f} times"
    )
    planned = {"patch_size": patch, "spacing": spacing, "architecture": architecture}
    assert resolve(planned, PCTNET, "PCTNetTrainer")[0] == architecture


def test_mode_is_recorded_with_the_model_and_printed(make: Callable[..., Any], capsys: Any) -> None:
    trainer = make("PCTNetTrainer", patch_size=[16, 32, 32], spacing=[2.0, 1.0, 1.0], batch_size=1)
    assert trainer.plans_manager.plans["configurations"]["3d_fullres"][
        "architecture"
    ] == PCTNET.architecture(get_mode(1))
    assert (
        trainer.my_init_kwargs["plans"]["configurations"]["3d_fullres"]["architecture"][
            "arch_kwargs"
        ]["mode"]
        == 1
    )
    printed = capsys.readouterr().out
    assert "PCTNet: Mode 1, because the spacing on axis 0 is 2.00 times" in printed
    assert "A batch of 2 or more is safer" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"patch_size": [40, 56, 40], "spacing": [1.0, 1.0, 1.0]},
            (
                r"must be divisible by .*Nearest sizes that work: .* Plan with -pl PCTNetPlanner,"
                r" which makes PCTNetPlans"
            ),
        ),
        (
            {"patch_size": [64, 64], "spacing": [1.0, 1.0]},
            r"3D network: use a 3D configuration \(3d_fullres\), or STUNetTrainer for 2d",
        ),
        (
            {"architecture": {"network_class_name": "some.Other", "arch_kwargs": {}}},
            r"cannot use a plan for the network 'some.Other'.*-p PCTNetPlans",
        ),
        (
            {"architecture": {"network_class_name": PCTNET.class_name, "arch_kwargs": {"mode": 7}}},
            r"Unknown anisotropy mode 7. Modes: 0 ",
        ),
        (
            {"architecture": {"network_class_name": PCTNET.class_name, "arch_kwargs": {}}},
            r"lacks its mode",
        ),
        ({"architecture": None}, r"has no architecture with arch_kwargs"),
        (
            {"spacing": None, "patch_size": [32, 32, 32]},
            r"spacing in the plan .* must be a list of millimetres, not None",
        ),
        ({"patch_size": "big"}, r"patch_size in the plan .* must be a list of integers, not 'big'"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    configuration = {**host_configuration([32, 32, 32], [1.0, 1.0, 1.0]), **changes}
    with pytest.raises(PluginError, match=message):
        resolve(configuration, PCTNET, "PCTNetTrainer")


def test_patch_that_fits_is_near_and_divisible() -> None:
    assert fitting_patch([1.0, 1.0, 1.0], [40, 56, 40])[0] == [48, 64, 48]
    assert fitting_patch([5.0, 1.0, 1.0], [18, 256, 250])[0] == [20, 256, 256]
    assert fitting_patch([1.0, 1.0, 1.0], [3, 3, 3])[0] == [32, 32, 32]


@pytest.mark.parametrize("name", PLANNERS)
def test_plans_fit_the_memory_target(nnunet_environment: Workspace, name: str) -> None:
    planner = PLANNERS[name](int(PHANTOM_ID), gpu_memory_target_in_gb=4)
    plans = planner.plan_experiment()
    assert "2d" not in plans["configurations"]
    chosen = plans["configurations"]["3d_fullres"]
    resolved, _ = resolve(chosen, planner.network_record, "a trainer")
    assert resolved == chosen["architecture"]
    assert (
        planner.training_bytes(resolved, chosen["patch_size"], chosen["batch_size"], 1, 6)
        <= 4 * GIGABYTE
    )
    assert chosen["data_identifier"] == "nnUNetPlans_3d_fullres"
    with pytest.raises(
        PluginError,
        match=rf"{planner.network_name} does not fit into 1.5 GB.*Raise -gpu_memory_target",
    ):
        PLANNERS[name](int(PHANTOM_ID), gpu_memory_target_in_gb=1.5).plan_experiment()
    with pytest.raises(PluginError, match="belongs to plans of"):
        PLANNERS[name](int(PHANTOM_ID), plans_name="nnUNetPlans")


@pytest.fixture(scope="module")
def trained(phantoms: Workspace) -> Workspace:
    """PCT-Net planned by our planner (with small widths and patch) and trained for two iterations
    by the stock command."""
    phantoms.run(
        "stunet", "plan", "-d", PHANTOM_ID, "-pl", "PCTNetPlanner", "-gpu_memory_target", 4
    )
    plans_file = phantoms.dataset_folder(phantoms.preprocessed) / "PCTNetPlans.json"
    plans = json.loads(plans_file.read_text())
    chosen = plans["configurations"]["3d_fullres"]
    chosen.update(patch_size=[32, 48, 48], batch_size=2, architecture=small_architecture(PCTNET, 0))
    plans_file.write_text(json.dumps(plans))
    phantoms.run("nnUNetv2_train", *TRAIN, "-tr", "PCTNetTrainer")
    return phantoms


@pytest.mark.slow
def test_stock_commands_train_and_predict(trained: Workspace) -> None:
    model = trained.model("PCTNetTrainer", plans="PCTNetPlans")
    recorded = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"][
        "architecture"
    ]
    assert recorded == small_architecture(PCTNET, 0)
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    images, predicted = trained.root / "images_pctnet", trained.root / "predicted_pctnet"
    images.mkdir()
    source = sorted(trained.dataset_folder(trained.raw).glob("imagesTr/*"))[0]
    shutil.copyfile(source, images / source.name)
    arguments = (
        "-d",
        PHANTOM_ID,
        "-c",
        "3d_fullres",
        "-f",
        0,
        "-tr",
        "PCTNetTrainer",
        "-p",
        "PCTNetPlans",
        "-device",
        "cpu",
    )
    trained.run(
        "nnUNetv2_predict",
        *arguments,
        "-i",
        images,
        "-o",
        predicted,
        "--disable_tta",
        "-npp",
        0,
        "-nps",
        0,
    )
    assert len(list(predicted.glob("*.nii.gz"))) == 1


@pytest.mark.slow
def test_fine_tuning_takes_everything_but_the_heads(trained: Workspace) -> None:
    weights = (
        trained.model("PCTNetTrainer", plans="PCTNetPlans") / "fold_0" / "checkpoint_final.pth"
    )
    result = trained.run(
        "nnUNetv2_train",
        *TRAIN,
        "-tr",
        "PCTNetTrainer_ft",
        "-pretrained_weights",
        weights,
        STUNET_ITERATIONS="1",
    )
    heads = sum(
        ".seg_layers." in name
        for name in torch.load(weights, weights_only=False)["network_weights"]
    )
    assert (
        f"come from PCTNetTrainer; {heads} start at random: {heads} of the segmentation heads."
        in result.stdout
    )
