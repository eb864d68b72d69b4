"""Sharding, in a process group of one process: the same steps, plain checkpoints, and what is
refused. tests/launch has four processes."""

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

SHARDED = {"STUNET_SEED": 1, "STUNET_SHARD": 1}
PLAIN = {"STUNET_SEED": 1, "STUNET_SHARD": 0}


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


def step(trainer: Any, seed: int) -> float:
    return float(trainer.train_step(batch_for(trainer, seed))["loss"])


def assert_same_training(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two checkpoints hold plain tensors of the same names and shapes, and nearly the same
    values."""
    parts = [(one["network_weights"], one["optimizer_state"]) for one in (first, second)]
    groups = [[group["params"] for group in states["param_groups"]] for _, states in parts]
    assert groups[0] == groups[1]
    assert parts[0][1]["state"]
    close = {"rtol": 1e-3, "atol": 1e-4}
    for one, other in zip(parts[0], parts[1], strict=True):
        plain, sharded = one.get("state", one), other.get("state", other)
        torch.testing.assert_close(dict(sharded), dict(plain), **close)
    tensors = [
        *parts[1][0].values(),
        *(x["momentum_buffer"] for x in parts[1][1]["state"].values()),
    ]
    assert {type(value) for value in tensors} == {torch.Tensor}


def test_steps_checkpoints_and_predictions_are_those_of_a_plain_training(
    make: Make, group_of_one: None, tmp_path: Path
) -> None:
    files = [str(tmp_path / name) for name in ("plain.pth", "sharded.pth")]
    plain, sharded = ready(make, PLAIN), ready(make, SHARDED)
    is_sharded = [isinstance(p, distributed.tensor.DTensor) for p in sharded.network.parameters()]
    assert all(is_sharded)
    for seed in (1, 2):
        assert step(plain, seed) == pytest.approx(step(sharded, seed), rel=1e-4)
        for trainer, file in zip((plain, sharded), files, strict=True):
            trainer.save_checkpoint(file)
        assert_same_training(*[torch.load(file, weights_only=False) for file in files])
        if seed == 1:  # each resumes from the other's file
            plain, sharded = ready(make, PLAIN), ready(make, SHARDED)
            plain.load_checkpoint(files[1])
            sharded.load_checkpoint(files[0])
            assert plain.current_epoch == sharded.current_epoch == 1

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
    for hook in trainer._prefix_hooks:
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
    for scale, same in ((1.0, True), (1.0, False)):
        step(trainer, 1)
        now = trainer.whole_weights()
        assert all(torch.equal(value, before[name]) for name, value in now.items()) == same
        assert trainer.grad_scaler.get_scale() == pytest.approx(scale)


def test_pretraining_is_sharded_too(make: Make, group_of_one: None) -> None:
    trainer = started(make("VolumeFusionTrainer_STUNet_tiny", options=SHARDED))
    batch = {"data": torch.randn(4, 1, *PATCH)}
    assert torch.isfinite(torch.as_tensor(trainer.train_step(batch)["loss"]))
    trainer._example = trainer._fuse(batch)
    trainer._save_example()
    assert Path(trainer.output_folder, "volume_fusion_epoch_0000.png").is_file()


def test_one_process_cannot_shard(make: Make) -> None:
    with pytest.raises(PluginError, match=r"this is one alone.*torchrun .* -m stunet_plugin.laun"):
        make(options=SHARDED)


def test_what_cannot_be_sharded_or_split_is_refused(
    make: Make, group_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PluginError, match=r"FMUNet is small enough.*Unset STUNET_SHARD"):
        make("FMUNetTrainer", options=SHARDED)
    monkeypatch.setattr(distributed_trainer, "world_size", lambda: 3)
    with pytest.raises(PluginError, match="batch of 2 cannot be split over 3.*Start at most 2"):
        make(options=PLAIN)
    with pytest.raises(PluginError, match="batch of 4 does not split evenly over 3.*batch_dice"):
        make(options=PLAIN, batch_size=4, batch_dice=True)
