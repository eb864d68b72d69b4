"""Checkpoints that are never half-written, steps that never carry a NaN into the weights, trainings
that resume where they stopped."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.trainers.safe_trainer import BEST, FINAL, LATEST, MOST_SKIPPED_IN_A_ROW

from conftest import Workspace
from trainer_helpers import Make, batch_for, equal, started, state


@pytest.fixture
def trainer(make: Make, tmp_path: Path) -> Any:
    """An initialised trainer with ``tmp_path`` as its folder."""
    trainer = started(make(options={"STUNET_SEED": 0}))
    trainer.output_folder = str(tmp_path)
    return trainer


@contextmanager
def full_disk() -> Iterator[None]:
    """Nothing larger than 10 kB can be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_keeps_the_earlier_checkpoint(
    trainer: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    latest = tmp_path / LATEST
    trainer.save_checkpoint(str(latest))
    before = latest.read_bytes()
    trainer.current_epoch = 7
    with full_disk():
        trainer.save_checkpoint(str(latest))
        text = capsys.readouterr().out
        assert f"Cannot write {LATEST} to {tmp_path} (File too large; " in text
        assert f"The earlier {LATEST} is kept. Training continues" in text
        with pytest.raises(PluginError, match=f"with --c: it resumes from {LATEST}"):
            trainer.save_checkpoint(str(tmp_path / FINAL))

    def interrupted(_: Any, file: BinaryIO) -> None:
        file.write(before[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.save_checkpoint(str(latest))
    assert latest.read_bytes() == before
    assert list(tmp_path.glob("*.pth*")) == [latest]
    trainer.save_checkpoint(str(latest))
    assert torch.load(latest, weights_only=False)["current_epoch"] == 8


def end_epoch(trainer: Any, epoch: int, dice: float) -> None:
    """What nnU-Net does at the end of an epoch, without its figure."""
    trainer.current_epoch = epoch
    trainer.on_epoch_start()
    for name in ("lrs", "train_losses", "val_losses"):
        trainer.logger.log(name, 1.0, epoch)
    trainer.logger.log("mean_fg_dice", dice, epoch)
    trainer.logger.log("dice_per_class_or_region", [dice, dice], epoch)
    trainer.logger.plot_progress_png = lambda folder: None
    trainer.on_epoch_end()


@pytest.mark.parametrize("full", [False, True])
def test_a_best_checkpoint_gives_way_to_a_better_one_only(
    trainer: Any, make: Make, tmp_path: Path, full: bool
) -> None:
    """nnU-Net writes the latest checkpoint before it knows that this epoch is the best, and does
    not know that the best could not be written."""
    trainer.save_every = 1
    end_epoch(trainer, 0, 0.5)
    if full:
        with full_disk():
            end_epoch(trainer, 1, 0.9)
    else:
        end_epoch(trainer, 1, 0.9)
        best, trainer = trainer._best_ema, started(make())
        trainer.output_folder = str(tmp_path)
        trainer.load_checkpoint(str(tmp_path / LATEST))
        assert (trainer.current_epoch, trainer._best_ema) == (2, best)
    end_epoch(trainer, 2, 0.48)  # better than epoch 0, worse than epoch 1
    assert torch.load(tmp_path / BEST, weights_only=False)["current_epoch"] == (3 if full else 2)


@pytest.mark.parametrize("name", ["STUNetTrainer", "PCTNetTrainer"])
def test_what_is_not_finite_never_reaches_the_weights(make: Make, name: str) -> None:
    """Neither weights nor momentum nor the running statistics of batch norm."""
    trainer = started(make(name))
    trainer.train_step(batch_for(trainer, 1))
    before = state(trainer)
    for poison in (float("nan"), float("inf")):
        bad = batch_for(trainer, 2)
        bad["data"][1, 0, 3, 3, 3] = poison
        trainer.train_step(bad)
        assert equal(state(trainer), before)
    # A loss may be infinite with gradients that are finite.
    infinite = trainer.loss.register_forward_hook(lambda _, __, x: x + float("inf"), prepend=True)
    assert trainer.train_step(batch_for(trainer))["loss"] == float("inf")
    assert equal(state(trainer), before)
    infinite.remove()
    losses = [{"loss": np.array(value)} for value in (1.0, np.nan, np.nan, 3.0)]
    trainer.on_train_epoch_end(losses)
    assert trainer.logger.get_value("train_losses", step=-1) == 2.0
    trainer.train_step(batch_for(trainer, 3))
    after = state(trainer)
    assert not equal(after, before)
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())


def test_steps_that_the_gradient_scaler_skips_are_counted_and_too_many_end_the_training(
    trainer: Any, tmp_path: Path, capsys: Any
) -> None:
    """It halves its scale forever, and the loss of such steps is finite."""
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    weight = next(trainer.network.parameters())
    hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    start = state(trainer)
    outputs = [trainer.train_step(batch_for(trainer)) for _ in range(3)]
    assert equal(state(trainer), start)
    trainer.on_train_epoch_end(outputs)
    assert "Skipped 3 of 3 steps" in capsys.readouterr().out
    trainer._skipped_in_a_row = MOST_SKIPPED_IN_A_ROW
    with pytest.raises(PluginError, match=f"the last {MOST_SKIPPED_IN_A_ROW} steps .*is good"):
        trainer.on_train_epoch_end(outputs)
    kept = torch.load(tmp_path / LATEST, weights_only=False)["network_weights"]
    assert all(torch.equal(kept[name], start[name]) for name in kept)
    hook.remove()
    trainer.train_step(batch_for(trainer))
    assert trainer._skipped_in_a_row == 0


def test_resuming_is_exact(make: Make, tmp_path: Path) -> None:
    """Four epochs at once, and two and two with a checkpoint between, on the same batches."""

    def train(trainer: Any, epochs: range) -> None:
        for trainer.current_epoch in epochs:
            trainer.lr_scheduler.step(trainer.current_epoch)
            trainer.train_step(batch_for(trainer, trainer.current_epoch))

    options = {"STUNET_EPOCHS": 4, "STUNET_SEED": 0}
    whole, first, second = (started(make(options=options)) for _ in range(3))
    train(whole, range(4))
    train(first, range(2))
    first.save_checkpoint(str(tmp_path / LATEST))
    with torch.no_grad():
        next(second.network.parameters()).zero_()
    second.load_checkpoint(str(tmp_path / LATEST))
    assert second.current_epoch == 2
    train(second, range(2, 4))
    assert equal(state(second), state(whole))


@pytest.mark.parametrize("name", ["PromptTrainer_STUNet_tiny", "SAMMed2DTrainer_tiny"])
def test_trainings_on_prompts_resume_where_they_stopped(
    make: Make, tmp_path: Path, name: str
) -> None:
    """Prompts are drawn anew; weights, momentum or Adam's moments, epoch and rate go on."""
    if name.startswith("SAM"):
        pytest.importorskip("transformers")
    first, second = (started(make(name, "2d", options={"STUNET_EPOCHS": 4})) for _ in range(2))
    batch = next(first.get_dataloaders()[0])
    first.current_epoch = 2
    first.train_step(batch)
    first.save_checkpoint(str(tmp_path / LATEST))
    second.load_checkpoint(str(tmp_path / LATEST))
    assert second.current_epoch == 3
    assert equal(state(second), state(first))
    assert any("momentum" in x or "exp_avg" in x for x in state(second))
    second.lr_scheduler.step(second.current_epoch)
    assert second.optimizer.param_groups[0]["lr"] < first.optimizer.param_groups[0]["lr"]
    assert np.isfinite(second.train_step(batch)["loss"])


@pytest.mark.slow
def test_killed_at_any_moment_there_is_a_checkpoint_to_resume_from(
    repository: Path, nnunet_environment: Workspace, tmp_path: Path
) -> None:
    plans, counted, checkpoints = (tmp_path / name for name in ("plans.json", "counts.json", "run"))
    plans.write_text(json.dumps(nnunet_environment.plans()))
    # A process of its own: it forks trainings, which must not follow on other tests' threads.
    script = repository / "tests" / "tools" / "kill_training.py"
    options = ["--plans", plans, "--folder", checkpoints, "--kills", "3", "--json", counted]
    subprocess.run([sys.executable, script, *options], check=True)
    counts = json.loads(counted.read_text())
    assert (counts["kills"], counts["did_not_load"], counts["epochs_lost"]) == (3, 0, 0)
    assert counts["checkpoints_saved"] > 0
    assert not list(tmp_path.rglob("*.unfinished"))
