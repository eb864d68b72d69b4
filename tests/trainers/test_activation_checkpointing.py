"""Activation checkpointing in a training: chosen by the free memory, or when it runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stunet_plugin.networks.activation_checkpointing import BLOCK, OFF, SETTINGS, STAGE
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.options import CHECKPOINTING
from stunet_plugin.plans.stunet_planners import PLANNERS
from stunet_plugin.trainers import activation_checkpointing
from stunet_plugin.trainers.activation_checkpointing import FIRST_STEPS, leanest

from trainer_helpers import Make, batch_for, equal, started, state


def test_plans_fit_the_memory_of_the_setting_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner = object.__new__(PLANNERS["STUNetPlanner_large"])
    architecture = stunet_architecture(PRESETS["large"], [[1, 1, 1], *[[2, 2, 2]] * 5])
    found = {}
    for word in ("", "auto", *SETTINGS):
        monkeypatch.setenv(CHECKPOINTING.variable, word)
        found[word] = planner.training_bytes(architecture, (128, 128, 128), 2, (1, 16))
    assert found[""] == found["auto"] == found[OFF] > found[STAGE] > found[BLOCK]


def ready(make: Make, setting: str = "") -> Any:
    """Return an initialised trainer of the size tiny."""
    options = {"STUNET_SEED": 1, CHECKPOINTING.variable: setting}
    return started(make("STUNetTrainer_tiny", options=options))


def test_auto_takes_the_least_that_is_needed_and_says_why(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trainer = ready(make)
    # As it is for all small sizes, and everywhere but on CUDA.
    assert trainer.network.checkpointing == OFF
    estimates = trainer.estimates()
    for available, setting, reason in (
        (None, OFF, "free memory is unknown"),
        (estimates[OFF] + 1, OFF, "(everything fits)"),
        (estimates[OFF] - 1, leanest(estimates), "(it fits, for the time of one more forward pass"),
        (1.0, leanest(estimates), "by the estimate it does not fit either"),
    ):
        monkeypatch.setattr(activation_checkpointing, "available_bytes", lambda _, x=available: x)
        capsys.readouterr()
        assert ready(make, "auto").network.checkpointing == setting
        log = capsys.readouterr().out
        assert f"Activation checkpointing: {setting}" in log
        assert reason in log
    assert ready(make, "stage").network.checkpointing == STAGE


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def run_out_of_memory(trainer: Any, always: bool) -> None:
    """In the middle of backward passes, when some gradients are there already."""

    def fail(_: torch.Tensor) -> None:
        if always or trainer.network.checkpointing == OFF:
            out_of_memory()

    next(iter(trainer.network.encoder.stages[1].parameters())).register_hook(fail)


def test_out_of_memory_steps_down_once_and_nothing_is_lost(make: Make, capsys: Any) -> None:
    plain, tried = trainers = ready(make), ready(make)
    for trainer in trainers:
        trainer.train_step(batch_for(trainer))
    plain.train_step(batch_for(plain))
    run_out_of_memory(tried, always=False)
    capsys.readouterr()
    tried.train_step(batch_for(tried))
    log = capsys.readouterr().out
    assert "Out of memory in step 2: " in log
    assert f"Activation checkpointing: {tried.network.checkpointing} from now on" in log
    assert tried.network.checkpointing == leanest(tried.estimates()) != OFF
    assert equal(state(plain), state(tried))


@pytest.mark.parametrize(
    ("setting", "steps_made", "advice"),
    [
        ("off", 0, "STUNET_CHECKPOINTING=stage needs less; the same command with --c resumes"),
        ("", FIRST_STEPS, "STUNET_CHECKPOINTING=stage needs less"),
        ("stage", 0, "No setting needs less. Plan for less memory"),
        ("", 0, "No setting needs less. Plan for less memory"),
        ("", None, "It was the optimizer's step"),
    ],
)
def test_out_of_memory_ends_the_training_where_stepping_down_is_not_asked_for_or_does_not_help(
    make: Make, capsys: Any, setting: str, steps_made: int | None, advice: str
) -> None:
    trainer = ready(make, setting)
    if steps_made is None:
        trainer.optimizer.register_step_pre_hook(out_of_memory)
    else:
        trainer._steps_made = steps_made
        run_out_of_memory(trainer, always=True)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer.train_step(batch_for(trainer))
    assert advice in capsys.readouterr().out
