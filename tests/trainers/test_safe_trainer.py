"""Checkpoints that are never half-written, steps that never carry a NaN into the weights, training
that goes on where it was."""

from __future__ import annotations

import copy
import importlib
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import get_preset
from stunet_plugin.trainers.misfm_trainers import TRAINERS as MISFM
from stunet_plugin.trainers.safe_trainer import (
    BEST,
    FINAL,
    MOST_SKIPPED_IN_A_ROW,
    TO_RESUME_FROM,
    UNFINISHED,
)
from stunet_plugin.trainers.stunet_trainers import TRAINERS as STUNET

from conftest import Workspace

PATCH = [16, 16, 16]


@pytest.fixture
def make(nnunet_environment: Workspace, tmp_path: Path) -> Callable[..., Any]:
    """Make an initialised trainer on the phantoms with a folder of its own."""

    def build(name: str = "STUNetTrainer_tiny", **changes: Any) -> Any:
        plans = copy.deepcopy(nnunet_environment.plans())
        strides = [[1, 1, 1], *[[2, 2, 2]] * 3]
        architecture = (
            stunet_architecture(get_preset("tiny"), strides) if name.startswith("STUNet") else None
        )
        configuration = {
            "patch_size": PATCH,
            "batch_size": 2,
            **({"architecture": architecture} if architecture else {}),
        }
        plans["configurations"]["3d_fullres"].update({**configuration, **changes})
        plans["continue_training"] = False
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "file_ending": ".nii.gz",
        }
        torch.manual_seed(0)
        trainer = {**STUNET, **MISFM}[name](
            plans, "3d_fullres", 0, description, torch.device("cpu")
        )
        trainer.initialize()
        trainer.set_deep_supervision_enabled(True)
        trainer.output_folder = str(tmp_path)
        return trainer

    return build


def batch_for(trainer: Any, seed: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    data = torch.randn(2, 1, *patch, generator=random)
    shapes = [
        [max(round(size * scale), 1) for size, scale in zip(patch, scales, strict=True)]
        for scales in trainer._get_deep_supervision_scales()
    ]
    return {
        "data": data,
        "target": [
            torch.randint(0, 3, (2, 1, *shape), generator=random).short() for shape in shapes
        ],
    }


def state(trainer: Any) -> dict[str, torch.Tensor]:
    momentum = trainer.optimizer.state_dict()["state"]
    kept = {
        f"{number} {name}": value
        for number, values in momentum.items()
        for name, value in values.items()
    }
    return {
        name: value.detach().clone()
        for name, value in {**trainer.network.state_dict(), **kept}.items()
        if value is not None
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full: nothing can be written beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_earlier_checkpoint_and_training_goes_on(
    make: Callable[..., Any], capsys: Any
) -> None:
    trainer = make()
    latest = Path(trainer.output_folder, TO_RESUME_FROM[0])
    trainer.save_checkpoint(str(latest))
    before = latest.read_bytes()
    trainer.current_epoch = 7
    with files_of_at_most(100_000):
        trainer.save_checkpoint(str(latest))
    assert latest.read_bytes() == before
    assert list(latest.parent.glob("*.pth*")) == [latest]
    text = capsys.readouterr().out
    assert f"Cannot write checkpoint_latest.pth to {latest.parent} (File too large; " in text
    assert "The earlier checkpoint_latest.pth is kept. Training continues" in text
    trainer.save_checkpoint(str(latest))
    assert torch.load(latest, weights_only=False)["current_epoch"] == 8


def test_a_final_checkpoint_that_does_not_fit_ends_the_training_with_advice(
    make: Callable[..., Any],
) -> None:
    trainer = make()
    latest, final = (Path(trainer.output_folder, name) for name in (TO_RESUME_FROM[0], FINAL))
    trainer.save_checkpoint(str(latest))
    with (
        files_of_at_most(100_000),
        pytest.raises(PluginError, match="with --c: it resumes from checkpoint_latest.pth"),
    ):
        trainer.save_checkpoint(str(final))
    assert list(latest.parent.glob("*.pth*")) == [latest]


def test_ctrl_c_in_the_middle_of_a_write_leaves_the_earlier_checkpoint(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    latest = Path(trainer.output_folder, TO_RESUME_FROM[0])
    trainer.save_checkpoint(str(latest))
    before = latest.read_bytes()

    def interrupted(_: Any, file: BinaryIO) -> None:
        file.write(before[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(latest))
    assert latest.read_bytes() == before
    assert list(latest.parent.glob("*.pth*")) == [latest]


def end_epoch(trainer: Any, epoch: int, dice: float) -> None:
    """What nnU-Net does at the end of an epoch, but for its picture."""
    trainer.current_epoch = epoch
    trainer.on_epoch_start()
    for name, value in (
        ("lrs", 1.0),
        ("train_losses", 1.0),
        ("val_losses", 1.0),
        ("mean_fg_dice", dice),
    ):
        trainer.logger.log(name, value, epoch)
    trainer.logger.log("dice_per_class_or_region", [dice, dice], epoch)
    trainer.logger.plot_progress_png = lambda folder: None
    trainer.on_epoch_end()


def epochs_of_best(trainer: Any) -> int:
    return int(torch.load(Path(trainer.output_folder, BEST), weights_only=False)["current_epoch"])


def test_a_best_checkpoint_gives_way_to_a_better_one_alone(make: Callable[..., Any]) -> None:
    """nnU-Net writes the latest checkpoint before it knows that this epoch is the best."""
    trainer = make()
    trainer.save_every = 1
    end_epoch(trainer, 0, 0.5)
    end_epoch(trainer, 1, 0.9)
    resumed = make()
    resumed.load_checkpoint(str(Path(trainer.output_folder, TO_RESUME_FROM[0])))
    assert (resumed.current_epoch, resumed._best_ema) == (2, trainer._best_ema)
    end_epoch(resumed, 2, 0.48)  # Better than epoch 0, worse than epoch 1.
    assert epochs_of_best(resumed) == 2


def test_a_best_checkpoint_that_did_not_fit_is_made_up_for(make: Callable[..., Any]) -> None:
    trainer = make()
    end_epoch(trainer, 0, 0.5)
    with files_of_at_most(100_000):
        end_epoch(trainer, 1, 0.9)
    assert epochs_of_best(trainer) == 1
    end_epoch(trainer, 2, 0.48)  # Below epoch 1, above what the file holds.
    assert epochs_of_best(trainer) == 3


@pytest.mark.parametrize(
    ("name", "changes"),
    [("STUNetTrainer_tiny", {}), ("PCTNetTrainer", {"patch_size": [16, 32, 32]})],
)
def test_what_is_not_finite_never_reaches_the_weights(
    make: Callable[..., Any], name: str, changes: dict[str, Any]
) -> None:
    """Neither weights nor momentum nor the running statistics of batch norm."""
    small = MISFM[name].network_record if name in MISFM else None
    if small is not None:
        from stunet_plugin.networks.anisotropy import get_mode

        architecture = small.architecture(get_mode(1))
        architecture["arch_kwargs"]["features_per_stage"] = [4, 8, 16, 32, 64]
        changes = {**changes, "spacing": [2.0, 1.0, 1.0], "architecture": architecture}
    trainer = make(name, **changes)
    trainer.train_step(batch_for(trainer, 1))
    before = state(trainer)
    for poison in (float("nan"), float("inf")):
        bad = batch_for(trainer, 2)
        bad["data"][1, 0, 3, 3, 3] = poison
        trainer.train_step(bad)
        assert equal(state(trainer), before)
    losses = [{"loss": np.array(value)} for value in (1.0, np.nan, np.nan, 3.0)]
    trainer.on_train_epoch_end(losses)
    assert trainer.logger.get_value("train_losses", step=-1) == 2.0
    trainer.train_step(batch_for(trainer, 3))
    assert not equal(state(trainer), before)
    assert all(
        value.isfinite().all() for value in state(trainer).values() if value.is_floating_point()
    )


def test_a_loss_that_is_not_finite_is_enough(make: Callable[..., Any]) -> None:
    """Its gradients may be finite all the same."""
    trainer = make()
    before = state(trainer)
    trainer.loss.register_forward_hook(lambda _, __, loss: loss + float("inf"), prepend=True)
    assert trainer.train_step(batch_for(trainer, 1))["loss"] == float("inf")
    assert equal(state(trainer), before)


def test_steps_that_the_gradient_scaler_leaves_out_are_counted(
    make: Callable[..., Any], capsys: Any
) -> None:
    """It halves its scale and goes on for ever, and the loss of such steps is finite."""
    trainer = make()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    hook = next(trainer.network.parameters()).register_hook(
        lambda gradient: gradient * float("inf")
    )
    start = state(trainer)
    outputs = [trainer.train_step(batch_for(trainer, 1)) for _ in range(3)]
    assert equal(state(trainer), start)
    trainer.on_train_epoch_end(outputs)
    assert "Skipped 3 of 3 steps" in capsys.readouterr().out
    trainer._skipped_in_a_row += MOST_SKIPPED_IN_A_ROW - 4
    outputs = [trainer.train_step(batch_for(trainer, 1))]
    with pytest.raises(PluginError, match=f"the last {MOST_SKIPPED_IN_A_ROW} steps"):
        trainer.on_train_epoch_end(outputs)
    hook.remove()
    trainer.train_step(batch_for(trainer, 1))
    assert trainer._skipped_in_a_row == 0


def test_training_ends_when_no_step_is_finite(make: Callable[..., Any], capsys: Any) -> None:
    trainer = make()
    bad = batch_for(trainer, 1)
    bad["data"][:] = float("nan")
    start = state(trainer)
    outputs = [trainer.train_step(bad) for _ in range(3)]
    with pytest.raises(PluginError, match=r"the last 3 steps .*checkpoint_latest.pth is good"):
        trainer.on_train_epoch_end(outputs)
    assert "Skipped 3 of 3 steps" in capsys.readouterr().out
    kept = torch.load(Path(trainer.output_folder, TO_RESUME_FROM[0]), weights_only=False)[
        "network_weights"
    ]
    assert all(torch.equal(kept[name], start[name]) for name in kept)


def test_continuing_is_exact(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four epochs at once, and two and two with a checkpoint between, on the same batches: the same
    weights and momentum."""

    def train(trainer: Any, epochs: range) -> None:
        for epoch in epochs:
            trainer.current_epoch = epoch
            trainer.lr_scheduler.step(epoch)
            trainer.network.train()
            for seed in (2 * epoch, 2 * epoch + 1):
                trainer.train_step(batch_for(trainer, seed))

    monkeypatch.setenv("STUNET_EPOCHS", "4")
    whole = make()
    train(whole, range(4))
    first = make()
    train(first, range(2))
    first._best_ema = 0.25
    first.save_checkpoint(str(tmp_path / "latest.pth"))
    second = make()
    with torch.no_grad():
        next(second.network.parameters()).zero_()
    second.load_checkpoint(str(tmp_path / "latest.pth"))
    assert (second.current_epoch, second._best_ema) == (2, 0.25)
    train(second, range(second.current_epoch, 4))
    assert equal(state(second), state(whole))


def test_killed_at_any_moment_there_is_a_checkpoint_to_go_on_from(
    repository: Path, monkeypatch: pytest.MonkeyPatch, nnunet_environment: Workspace, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "tests" / "tools"))
    script = importlib.import_module("kill_training")
    counts = script.kill_many(3, nnunet_environment.plans(), tmp_path, seed=1)
    assert (counts["kills"], counts["did_not_load"], counts["epochs_lost"]) == (3, 0, 0)
    assert counts["checkpoints_saved"] > 0
    assert not list(tmp_path.rglob(f"*{UNFINISHED}"))
