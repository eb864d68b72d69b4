"""Sharding, in a process group of one process: the same steps, plain checkpoints, and what is
refused. test_launch.py has four."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from stunet_plugin.errors import PluginError
from stunet_plugin.trainers import distributed_trainer
from stunet_plugin.trainers.misfm_trainers import TRAINERS as MISFM
from stunet_plugin.trainers.stunet_trainers import TRAINERS as STUNET
from stunet_plugin.trainers.volume_fusion_trainers import TRAINERS as VOLUME_FUSION

from conftest import Workspace

PATCH = [16, 32, 32]


@pytest.fixture
def group_of_one() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


@pytest.fixture
def make(nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a trainer with a small patch; the same seed for all."""

    def build(name: str = "STUNetTrainer_tiny", shard: bool = False, **changes: Any) -> Any:
        monkeypatch.setenv("STUNET_SEED", "1")
        monkeypatch.setenv("STUNET_SHARD", str(int(shard)))
        plans = copy.deepcopy(nnunet_environment.plans())
        plans["configurations"]["3d_fullres"].update(
            {"patch_size": PATCH, "batch_size": 2, **changes}
        )
        plans["continue_training"] = False
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "file_ending": ".nii.gz",
        }
        return {**STUNET, **MISFM, **VOLUME_FUSION}[name](
            plans, "3d_fullres", 0, description, torch.device("cpu")
        )

    return build


def started(trainer: Any) -> Any:
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    trainer.loss.weight_factors = tuple(
        100 * weight for weight in trainer.loss.weight_factors
    )  # so that clipping acts
    return trainer


def step(trainer: Any, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 1, *PATCH, generator=generator)
    scales = trainer._get_deep_supervision_scales()
    shapes = [
        [round(size * scale) for size, scale in zip(PATCH, output, strict=True)]
        for output in scales
    ]
    targets = [torch.randint(0, 3, (2, 1, *shape), generator=generator) for shape in shapes]
    return float(trainer.train_step({"data": images, "target": targets})["loss"])


def assert_same_training(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two checkpoints hold plain tensors of the same names and shapes, and nearly the same
    values."""
    for name, value in first["network_weights"].items():
        assert type(second["network_weights"][name]) is torch.Tensor
        torch.testing.assert_close(second["network_weights"][name], value, rtol=1e-4, atol=1e-5)
    states = first["optimizer_state"], second["optimizer_state"]
    assert [group["params"] for group in states[0]["param_groups"]] == [
        group["params"] for group in states[1]["param_groups"]
    ]
    assert states[0]["state"].keys() == states[1]["state"].keys() != set()
    for number, values in states[0]["state"].items():
        other = states[1]["state"][number]["momentum_buffer"]
        assert type(other) is torch.Tensor
        torch.testing.assert_close(other, values["momentum_buffer"], rtol=1e-3, atol=1e-4)


def test_steps_checkpoints_and_predictions_are_those_of_a_plain_training(
    make: Callable[..., Any], group_of_one: None, tmp_path: Path
) -> None:
    plain, sharded = started(make()), started(make(shard=True))
    assert all(
        isinstance(parameter, distributed.tensor.DTensor)
        for parameter in sharded.network.parameters()
    )
    assert step(plain, 1) == pytest.approx(step(sharded, 1), rel=1e-5)
    files = [str(tmp_path / name) for name in ("plain.pth", "sharded.pth")]
    for trainer, file in zip((plain, sharded), files, strict=True):
        trainer.save_checkpoint(file)
    assert_same_training(*[torch.load(file, weights_only=False) for file in files])

    # Each goes on from the other's file.
    plain, sharded = started(make()), started(make(shard=True))
    plain.load_checkpoint(files[1])
    sharded.load_checkpoint(files[0])
    assert plain.current_epoch == sharded.current_epoch == 1
    assert step(plain, 2) == pytest.approx(step(sharded, 2), rel=1e-4)
    for trainer, file in zip((plain, sharded), files, strict=True):
        trainer.save_checkpoint(file)
    assert_same_training(*[torch.load(file, weights_only=False) for file in files])

    # What the final validation predicts with.
    whole = sharded._whole_network().eval()
    assert not any(
        isinstance(parameter, distributed.tensor.DTensor) for parameter in whole.parameters()
    )
    image = torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        torch.testing.assert_close(
            whole(image)[0], plain._bare_network().eval()(image)[0], rtol=1e-3, atol=1e-3
        )


def test_pretrained_weights_go_into_a_sharded_network(
    make: Callable[..., Any], group_of_one: None, tmp_path: Path
) -> None:
    file = str(tmp_path / "pretrained.pth")
    plain = started(make())
    plain.save_checkpoint(file)
    trainer = make("STUNetTrainer_tiny_ft", shard=True)
    torch.manual_seed(2)
    trainer.load_pretrained_weights(file)
    assert trainer._weights_were_loaded
    taken = trainer.whole_weights()
    for name, value in plain._bare_network().state_dict().items():
        assert torch.equal(taken[name], value) == (".seg_layers." not in name or value.ndim == 1)


def test_half_precisions_scaler_passes_over_infinite_gradients(
    make: Callable[..., Any], group_of_one: None
) -> None:
    trainer = started(make(shard=True))
    # The first scale is too large for the loss; the next one is 1.
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-38)
    before = {name: value.clone() for name, value in trainer.whole_weights().items()}
    step(trainer, 1)
    assert all(torch.equal(value, before[name]) for name, value in trainer.whole_weights().items())
    assert trainer.grad_scaler.get_scale() == pytest.approx(1.0)
    step(trainer, 1)
    assert not all(
        torch.equal(value, before[name]) for name, value in trainer.whole_weights().items()
    )


def test_pretraining_is_sharded_too(
    make: Callable[..., Any], group_of_one: None, nnunet_environment: Workspace
) -> None:
    trainer = make("VolumeFusionTrainer_STUNet_tiny", shard=True)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    batch = {"data": torch.randn(4, 1, *PATCH)}
    assert torch.isfinite(torch.as_tensor(trainer.train_step(batch)["loss"]))
    trainer._example = trainer._fuse(batch)
    trainer._save_example()
    assert Path(trainer.output_folder, "volume_fusion_epoch_0000.png").is_file()


def test_what_cannot_be_sharded_is_refused(make: Callable[..., Any], group_of_one: None) -> None:
    with pytest.raises(
        PluginError,
        match=r"STUNET_SHARD=1 shards an STU-Net; FMUNet is small enough.*Unset STUNET_SHARD",
    ):
        make("FMUNetTrainer", shard=True, patch_size=[32, 32, 32])


def test_one_process_has_nothing_to_share_out(make: Callable[..., Any]) -> None:
    with pytest.raises(
        PluginError,
        match=r"over several processes, but this is one alone.*torchrun .* -m stunet_plugin.launch",
    ):
        make(shard=True)


def test_a_batch_that_cannot_be_split_is_refused(
    make: Callable[..., Any], group_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_trainer, "world_size", lambda: 3)
    with pytest.raises(
        PluginError, match="batch of 2 cannot be split over 3 processes.*Start at most 2"
    ):
        make()
    with pytest.raises(
        PluginError, match="batch of 4 does not split evenly over 3 processes.*batch_dice"
    ):
        make(batch_size=4, batch_dice=True)
