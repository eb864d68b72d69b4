"""Trainers in this process: pairing, gradients, hyper-parameters, and every refusal with its
message."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import (
    DownsampleSegForDSTransform,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet_plugin import trainers
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import PRESETS, get_preset
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.trainers.stunet_trainers import TRAINERS
from stunet_plugin.weights.pretrained import pretrained_weights_on_command_line

from conftest import PHANTOM_ID, Workspace

HOST_PLANS: dict[str, Any] = {
    "three poolings": {
        "patch_size": [16, 32, 32],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
    },
    "five poolings": {"patch_size": [32, 32, 64], "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5},
    "seven poolings": {
        "patch_size": [16, 128, 128],
        "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2]] + [[2, 2, 2]] * 3 + [[1, 2, 2]] * 2,
    },
    "2d": {"patch_size": [128, 64], "strides": [[1, 1]] + [[2, 2]] * 5 + [[2, 1]]},
}


@pytest.fixture
def make(nnunet_environment: Workspace) -> Callable[..., nnUNetTrainer]:
    """Make a trainer on the phantoms' plan, with changes to its configuration."""

    def build(
        name: str = "STUNetTrainer_tiny",
        changes: dict[str, Any] | None = None,
        configuration: str = "3d_fullres",
    ) -> Any:
        plans = copy.deepcopy(nnunet_environment.plans())
        chosen = plans["configurations"][configuration]
        for key, value in (changes or {}).items():
            if key == "strides":
                chosen["architecture"]["arch_kwargs"]["strides"] = value
            else:
                chosen[key] = value
        plans["continue_training"] = False
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "file_ending": ".nii.gz",
        }
        return TRAINERS[name](plans, configuration, 0, description, torch.device("cpu"))

    return build


@pytest.mark.parametrize("case", HOST_PLANS)
def test_targets_and_outputs_pair_and_every_parameter_gets_a_gradient(
    make: Callable[..., Any], case: str
) -> None:
    changes = HOST_PLANS[case]
    trainer = make(changes=changes, configuration="2d" if case == "2d" else "3d_fullres")
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    patch = changes["patch_size"]
    labels = torch.randint(0, 3, (1, *patch), dtype=torch.int16)
    downsample = DownsampleSegForDSTransform(ds_scales=trainer._get_deep_supervision_scales())
    targets = [
        target[None].repeat(2, *[1] * target.ndim)
        for target in downsample(segmentation=labels)["segmentation"]
    ]
    outputs = trainer.network(torch.randn(2, 1, *patch))
    assert [output.shape[2:] for output in outputs] == [target.shape[2:] for target in targets]
    assert len(trainer.loss.weight_factors) == len(outputs) == 5
    result = trainer.train_step({"data": torch.randn(2, 1, *patch), "target": targets})
    assert np.isfinite(result["loss"])
    without = [
        name for name, parameter in trainer.network.named_parameters() if parameter.grad is None
    ]
    assert without == []


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_same_weights_fit_whatever_the_plan(nnunet_environment: Workspace, name: str) -> None:
    shapes = set()
    for case, changes in HOST_PLANS.items():
        if case == "2d":
            continue
        plans = copy.deepcopy(nnunet_environment.plans())
        chosen = plans["configurations"]["3d_fullres"]
        chosen["architecture"]["arch_kwargs"]["strides"] = changes["strides"]
        chosen["patch_size"] = changes["patch_size"]
        manager = PlansManager(plans)
        with torch.device("meta"):
            network = TRAINERS[f"STUNetTrainer_{name}"].build_network_architecture(
                manager, manager.get_configuration("3d_fullres"), 1, 105, True
            )
        shapes.add(tuple((key, tuple(value.shape)) for key, value in network.state_dict().items()))
        assert (
            sum(parameter.numel() for parameter in network.parameters())
            == get_preset(name).parameters
        )
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("poolings", "expected"),
    [
        (5, (8, 4, 2, 1, 0)),
        (3, (2, 1, 0, 0, 0)),
        (2, (1, 0, 0, 0, 0)),
        (1, (1, 0, 0, 0, 0)),
        (6, (8, 4, 2, 1, 0)),
    ],
)
def test_deep_supervision_weighs_as_nnunet_does_for_the_plans_poolings(
    make: Callable[..., Any], poolings: int, expected: tuple[int, ...]
) -> None:
    """The weights the published training had: nnU-Net's halving over the plan's own poolings, the
    deepest left out."""
    strides = [[1, 1, 1], *[[2, 2, 2]] * poolings]
    trainer = make(changes={"strides": strides, "patch_size": [128, 128, 128], "batch_size": 2})
    weights = trainer._build_loss().weight_factors
    assert weights == pytest.approx([value / sum(expected) for value in expected], abs=2e-6)
    assert min(weights) > 0


def test_published_hyper_parameters() -> None:
    published = {
        "": (1e-2, 1000),
        "_ft": (1e-3, 1000),
        "_ep2k": (1e-2, 2000),
        "_ep4k": (1e-2, 4000),
    }
    for size in ("", "_small", "_base", "_large", "_huge"):
        for suffix, (rate, epochs) in published.items():
            trainer = TRAINERS[f"STUNetTrainer{size}{suffix}"]
            assert (trainer.learning_rate, trainer.epochs) == (rate, epochs)
            assert trainer.fine_tuning == (suffix == "_ft")
            assert trainer.__name__ == f"STUNetTrainer{size}{suffix}"
            assert (
                list(inspect.signature(trainer.__init__).parameters)[1:]
                == list(inspect.signature(nnUNetTrainer.__init__).parameters)[1:]
            )


def test_optimizer_is_nnunets_own(make: Callable[..., Any]) -> None:
    trainer = make("STUNetTrainer_tiny_ft")
    trainer.initialize()
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (
        1e-3,
        0.99,
        True,
        3e-5,
    )


def test_options_are_applied_and_checked(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUNET_EPOCHS", "7")
    monkeypatch.setenv("STUNET_SEED", "3")
    first, second = make(), make()
    first.initialize()
    torch.manual_seed(3)
    second.initialize()
    assert first.num_epochs == 7
    assert torch.equal(
        first.network.encoder.stages[0][0].conv1.weight,
        second.network.encoder.stages[0][0].conv1.weight,
    )
    monkeypatch.setenv("STUNET_EPOCHS", "many")
    with pytest.raises(PluginError, match="STUNET_EPOCHS='many' must be an integer from 1"):
        make()


def test_mirroring_is_left_out_of_augmentation_and_prediction(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def axes() -> tuple[Any, Any]:
        trainer = make("STUNetTrainer_tiny")
        *_, augmented = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return augmented, trainer.inference_allowed_mirroring_axes

    assert axes() == ((0, 1, 2), (0, 1, 2))
    monkeypatch.setenv("STUNET_MIRRORING", "0")
    assert axes() == (None, None)


def test_frozen_encoder_stays_until_its_epochs_are_over(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUNET_FROZEN_ENCODER_EPOCHS", "1")
    monkeypatch.setenv("STUNET_ENCODER_RATE", "0.5")
    trainer = make("STUNetTrainer_tiny_ft", {"patch_size": [16, 32, 32]})
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    outputs = trainer.network(torch.zeros(2, 1, 16, 32, 32))
    batch = {
        "data": torch.randn(2, 1, 16, 32, 32),
        "target": [
            torch.randint(0, 3, (2, 1, *output.shape[2:]), dtype=torch.int16) for output in outputs
        ],
    }
    weight = trainer.network.encoder.stages[0][0].conv2.weight
    start = weight.detach().clone()
    trainer.train_step(batch)
    assert torch.equal(weight, start)
    trainer.current_epoch = 1
    trainer.train_step(batch)
    assert not torch.equal(weight, start)


def test_trainer_without_size_follows_the_plan(make: Callable[..., Any]) -> None:
    trainer = make(
        "STUNetTrainer",
        {"architecture": stunet_architecture(get_preset("tiny"), [[1, 1, 1]] + [[2, 2, 2]] * 3)},
    )
    trainer.initialize()
    assert isinstance(trainer.network, STUNet)
    assert trainer.network.encoder.output_channels == get_preset("tiny").features_per_stage
    host_plan = make("STUNetTrainer")
    resolved = host_plan.resolve_architecture(host_plan.configuration_manager.configuration)
    assert resolved["arch_kwargs"]["features_per_stage"] == list(
        get_preset("base").features_per_stage
    )


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    (
        "STUNetTrainer_large_ft",
        {"architecture": stunet_architecture(get_preset("small"), [[1, 1, 1]] + [[2, 2, 2]] * 5)},
        (
            r"trains STU-Net large.*plan is for STU-Net small.*-tr STUNetTrainer_small_ft.*-p"
            r" STUNetPlans_large"
        ),
    ),
    (
        "STUNetTrainer_tiny",
        {
            "architecture": {
                "network_class_name": "other.Transformer",
                "arch_kwargs": {"strides": [[1, 1, 1]]},
            }
        },
        r"'other.Transformer'.*Allowed: plans of nnU-Net's own planners.*STUNetPlans_<size>",
    ),
    (
        "STUNetTrainer_tiny",
        {"patch_size": [40, 48, 60]},
        r"\[8, 8, 8\].*\[40, 48, 60\].*\[40, 48, 56\] and \[40, 48, 64\].*plans file",
    ),
    ("STUNetTrainer_tiny", {"patch_size": [8, 8, 8]}, "a single voxel at the deepest stage"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS)
def test_wrong_plans_are_refused_before_anything_is_written(
    make: Callable[..., Any],
    nnunet_environment: Workspace,
    name: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    before = sorted(nnunet_environment.results.rglob("*"))
    with pytest.raises(PluginError, match=message):
        make(name, changes)
    assert sorted(nnunet_environment.results.rglob("*")) == before


def test_missing_configuration_names_the_available_ones(
    make: Callable[..., Any], nnunet_environment: Workspace
) -> None:
    plans = {**nnunet_environment.plans(), "continue_training": False}
    with pytest.raises(
        PluginError, match="no configuration '3d_lowres'. Available: 2d, 3d_fullres"
    ):
        TRAINERS["STUNetTrainer_tiny"](plans, "3d_lowres", 0, {}, torch.device("cpu"))


def test_dataset_that_is_not_preprocessed(make: Callable[..., Any]) -> None:
    with pytest.raises(
        PluginError,
        match=(
            f"not preprocessed.*nnUNetv2_preprocess -d {PHANTOM_ID} -plans_name nnUNetPlans -c"
            " 3d_fullres"
        ),
    ):
        make(changes={"data_identifier": "nowhere"})


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_missing_variables(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(PluginError, match=f"export {variable}=/path/to/{variable}"):
        make()


def test_results_that_cannot_be_written(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file" / "results"))
    with pytest.raises(
        PluginError, match="Cannot write results to .*Set nnUNet_results to a folder"
    ):
        make()


def test_fine_tuning_without_weights_says_so_loudly(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer = make("STUNetTrainer_tiny_ft")
    trainer.initialize()
    trainer.on_train_start()
    assert "no pretrained weights were given" in capsys.readouterr().out
    trainer.network.load_state_dict(trainer.network.state_dict())
    trainer.on_train_start()
    assert "no pretrained weights" not in capsys.readouterr().out


def test_checkpoint_of_another_size_cannot_be_continued(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    large = make(
        "STUNetTrainer_tiny",
        {"architecture": stunet_architecture(get_preset("tiny"), [[1, 1, 1]] + [[2, 2, 2]] * 3)},
    )
    large.initialize()
    checkpoint = tmp_path / "checkpoint_final.pth"
    large.save_checkpoint(str(checkpoint))
    small = make("STUNetTrainer_small")
    with pytest.raises(
        PluginError,
        match=(
            r"Cannot resume STUNetTrainer_small.*STUNetTrainer_tiny.*have another shape.*Resume"
            r" with the"
        ),
    ):
        small.load_checkpoint(str(checkpoint))


def test_what_cannot_be_continued_says_why(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make()
    trainer.initialize()
    checkpoint = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(checkpoint))
    content = torch.load(checkpoint, weights_only=False)
    torch.save({**content, "optimizer_state": None}, checkpoint)
    with pytest.raises(
        PluginError, match=r"weights only.*-tr STUNetTrainer_tiny_ft -pretrained_weights"
    ):
        make().load_checkpoint(str(checkpoint))
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    with pytest.raises(
        PluginError, match=r"is no checkpoint or damaged .*, and there is no other.*without --c"
    ):
        make().load_checkpoint(str(checkpoint))
    (tmp_path / "checkpoint_latest.pth").write_bytes(whole[:-9])
    (tmp_path / "checkpoint_best.pth").write_bytes(whole)
    with pytest.raises(
        PluginError,
        match=r"but checkpoint_best.pth beside it is whole: move checkpoint_final.pth away",
    ):
        make().load_checkpoint(str(checkpoint))


def test_hints_for_names_that_do_not_exist(capsys: Any) -> None:
    assert not hasattr(trainers, "STUNetTrainer_lage")
    hint = capsys.readouterr().err
    assert "Unknown trainer 'STUNetTrainer_lage'" in hint
    assert "Did you mean STUNetTrainer_large?" in hint
    assert not hasattr(trainers, "SomebodyElsesTrainer")
    assert capsys.readouterr().err == ""


def test_pretrained_weights_are_read_off_the_command_line() -> None:
    assert (
        pretrained_weights_on_command_line(
            ["nnUNetv2_train", "4", "-pretrained_weights", "a.pth", "--c"]
        )
        == "a.pth"
    )
    assert (
        pretrained_weights_on_command_line(["nnUNetv2_train", "-pretrained_weights=b.pth"])
        == "b.pth"
    )
    assert (
        pretrained_weights_on_command_line(["nnUNetv2_train", "4", "-pretrained_weights"]) is None
    )
    assert pretrained_weights_on_command_line([os.devnull]) is None
