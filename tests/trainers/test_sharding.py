"""Sharding, in a process group of one process; tests/launch has four processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from stunet_plugin.errors import PluginError
from stunet_plugin.trainers import distributed_trainer

from trainer_helpers import PATCH, Make, batch_for, started

PLAIN = {"STUNET_SEED": 1, "STUNET_SHARD": 0, "STUNET_CHECKPOINTING": "off"}
SHARDED = {**PLAIN, "STUNET_SHARD": 1}


@pytest.fixture
def group_of_one() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


def ready(make: Make, options: dict[str, object]) -> Any:
    """Return an initialised trainer with a large loss, so that clipping acts."""
    trainer = started(make(options=options))
    trainer.loss.weight_factors = tuple(100 * one for one in trainer.loss.weight_factors)
    return trainer


def step(trainer: Any, seed: int = 1) -> float:
    return float(trainer.train_step(batch_for(trainer, seed))["loss"])


def saved(trainer: Any, file: str) -> dict[str, torch.Tensor]:
    """Write a checkpoint; return the weights and momentum in it, which are plain tensors."""
    trainer.save_checkpoint(file)
    content = torch.load(file, weights_only=False)
    momentum = content["optimizer_state"]["state"]
    named = {str(number): values["momentum_buffer"] for number, values in momentum.items()}
    tensors = {**content["network_weights"], **named}
    assert named
    assert {type(value) for value in tensors.values()} == {torch.Tensor}
    return tensors


def test_steps_checkpoints_and_predictions_are_those_of_a_plain_training(
    make: Make, group_of_one: None, tmp_path: Path
) -> None:
    files = [str(tmp_path / name) for name in ("plain.pth", "sharded.pth")]
    plain, sharded = ready(make, PLAIN), ready(make, SHARDED)
    tensor = distributed.tensor.DTensor
    assert all(isinstance(value, tensor) for value in sharded.network.parameters())
    for seed in (1, 2):
        assert step(plain, seed) == pytest.approx(step(sharded, seed), rel=1e-4)
        expected, found = (saved(*one) for one in zip((plain, sharded), files, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        if seed == 1:  # each resumes from the other's file, now with activation checkpointing
            plain = ready(make, PLAIN)
            sharded = ready(make, {**SHARDED, "STUNET_CHECKPOINTING": "block"})
            plain.load_checkpoint(files[1])
            sharded.load_checkpoint(files[0])
            assert plain.current_epoch == sharded.current_epoch == 1

    # What the final validation predicts with.
    whole = sharded._whole_network().eval()
    assert not any(isinstance(value, tensor) for value in whole.parameters())
    image, bare = torch.randn(1, 1, *PATCH), plain._bare_network().eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(image)[0], bare(image)[0], rtol=1e-3, atol=1e-3)


def test_pretrained_weights_go_into_a_sharded_network(
    make: Make, group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "pretrained.pth")
    plain = started(make(options=PLAIN))
    plain.save_checkpoint(file)
    content = torch.load(file, weights_only=False)
    weights = {f"module.{name}": value for name, value in content["network_weights"].items()}
    torch.save({**content, "network_weights": weights}, file)
    monkeypatch.setattr("sys.argv", ["launch", "-pretrained_weights", file])
    trainer = make(options=SHARDED)
    torch.manual_seed(2)
    trainer.load_pretrained_weights(file)
    for hook in trainer._name_hooks:
        hook.remove()
    assert trainer._weights_were_loaded
    taken = trainer.whole_weights()
    for name, value in plain._bare_network().state_dict().items():
        assert torch.equal(taken[name], value) == (".seg_layers." not in name or value.ndim == 1)


def test_half_precisions_scaler_skips_infinite_gradients(make: Make, group_of_one: None) -> None:
    trainer = ready(make, SHARDED)
    # The first scale is too large for the loss; the next one is 1.
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-38)
    before = {name: value.clone() for name, value in trainer.whole_weights().items()}
    for same in (True, False):
        step(trainer)
        now = trainer.whole_weights()
        assert all(torch.equal(value, before[name]) for name, value in now.items()) == same
        assert trainer.grad_scaler.get_scale() == pytest.approx(1.0)


def test_pretraining_is_sharded_too(make: Make, group_of_one: None) -> None:
    trainer = started(make("VolumeFusionTrainer_STUNet_tiny", options=SHARDED))
    assert step(trainer) < float("inf")
    trainer._example = trainer._fuse(batch_for(trainer))
    trainer._save_example()
    assert Path(trainer.output_folder, "volume_fusion_epoch_0000.png").is_file()


def test_what_cannot_be_sharded_or_split_is_refused(
    make: Make, group_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, options: dict[str, object], *name: str, **changes: Any) -> None:
        with pytest.raises(PluginError, match=message):
            make(*name, options=options, **changes)

    refused("FMUNet is small enough.*Unset STUNET_SHARD", SHARDED, "FMUNetTrainer")
    with monkeypatch.context() as patch:
        patch.setattr(distributed_trainer, "_in_a_group", lambda: False)
        refused("this is one alone.*torchrun .* -m stunet_plugin.laun", SHARDED)
    monkeypatch.setattr(distributed_trainer, "world_size", lambda: 3)
    refused("batch of 2 cannot be split over 3.*Start at most 2", PLAIN)
    uneven: dict[str, Any] = {"batch_size": 4, "batch_dice": True}
    refused("batch of 4 does not split evenly over 3.*batch_dice", PLAIN, **uneven)
