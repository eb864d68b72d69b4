"""Activation checkpointing in a training: chosen by the free memory, or when it runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed, nn

from stunet_plugin.networks.activation_checkpointing import BLOCK, OFF, SETTINGS, STAGE
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.memory import GIGABYTE
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
    found = {}
    for word in (None, "auto", *SETTINGS):
        if word:
            monkeypatch.setenv(CHECKPOINTING.variable, word)
        architecture = stunet_architecture(PRESETS["large"], [[1, 1, 1], *[[2, 2, 2]] * 5])
        found[word] = planner.training_bytes(architecture, (128, 128, 128), 2, 1, 16)
    assert found[None] == found["auto"] == found[OFF] > found[STAGE] > found[BLOCK]


def ready(make: Make, setting: str | None = None, shard: bool = False) -> Any:
    """Return an initialised trainer of the size tiny."""
    options = {"STUNET_SEED": 1, "STUNET_SHARD": int(shard)}
    if setting:
        options[CHECKPOINTING.variable] = setting
    return started(make("STUNetTrainer_tiny", options=options))


def test_auto_takes_the_least_that_is_needed_and_says_why(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trainer = ready(make)
    # As it is for all small sizes, and everywhere but on CUDA.
    assert trainer.network.checkpointing == OFF
    estimates = trainer.estimates()
    for available, setting, reason in (
        (estimates[OFF] + 1, OFF, "everything fits"),
        (estimates[OFF] - 1, leanest(estimates), "it fits, for the time of one more forward pass"),
        (1.0, leanest(estimates), "by the estimate it does not fit either"),
    ):
        monkeypatch.setattr(
            activation_checkpointing, "available_bytes", lambda _, available=available: available
        )
        capsys.readouterr()
        assert ready(make, "auto").network.checkpointing == setting
        log = capsys.readouterr().out
        assert f"Activation checkpointing: {setting} (" in log
        assert reason in log
        assert f"off {estimates[OFF] / GIGABYTE:.1f}, stage" in log
    assert ready(make, "stage").network.checkpointing == STAGE


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def run_out_of_memory(trainer: Any, where: Callable[[], bool]) -> None:
    """In the middle of backward passes, when some gradients are there already."""

    def fail(_: torch.Tensor) -> None:
        if where():
            out_of_memory()

    next(iter(trainer.network.encoder.stages[1].parameters())).register_hook(fail)


def test_gradients_are_not_kept_while_validating_and_training_stays_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = ready(make), ready(make)
    for validates, trainer in enumerate(trainers):
        trainer.train_step(batch_for(trainer))
        assert all(parameter.grad is not None for parameter in trainer.network.parameters())
        if validates:
            trainer.on_validation_epoch_start()
            assert all(parameter.grad is None for parameter in trainer.network.parameters())
            with torch.no_grad():
                trainer.validation_step(batch_for(trainer))
            trainer.network.train()
        trainer.train_step(batch_for(trainer))
    assert equal(*map(state, trainers))
    # Nor in the final validation, where the logits of whole images need the room.
    seen: list[Any] = []
    monkeypatch.setattr(
        nnUNetTrainer,
        "perform_actual_validation",
        lambda self, _: seen.extend(p.grad for p in self.network.parameters()),
    )
    trainers[0].perform_actual_validation()
    assert seen
    assert not any(gradient is not None for gradient in seen)


@pytest.mark.parametrize("scaled", [False, True])
def test_out_of_memory_steps_down_once_and_nothing_is_lost(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any, scaled: bool
) -> None:
    trainers = ready(make), ready(make)
    for trainer in trainers:
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        trainer.train_step(batch_for(trainer))
    plain, tried = trainers
    if scaled:
        # Behind the scaler's division of the gradients, which it does once in a step.
        clip = nn.utils.clip_grad_norm_
        errors = iter([torch.OutOfMemoryError()])

        def fail_once(*given: Any) -> Any:
            for error in errors:
                raise error
            return clip(*given)

        plain.train_step(batch_for(plain))
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", fail_once)
    else:
        plain.train_step(batch_for(plain))
        run_out_of_memory(tried, lambda: tried.network.checkpointing == OFF)
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
        (None, FIRST_STEPS, "STUNET_CHECKPOINTING=stage needs less"),
        ("stage", 0, "No setting needs less. Plan for less memory"),
        (None, 0, "No setting needs less. Plan for less memory"),
        (None, None, "It was the optimizer's step"),
    ],
)
def test_out_of_memory_ends_the_training_where_stepping_down_is_not_asked_for_or_does_not_help(
    make: Make, capsys: Any, setting: str | None, steps_made: int | None, advice: str
) -> None:
    trainer = ready(make, setting)
    if steps_made is None:
        trainer.optimizer.register_step_pre_hook(lambda *_: out_of_memory())
    else:
        trainer._steps_made = steps_made
        run_out_of_memory(trainer, lambda: True)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer.train_step(batch_for(trainer))
    assert advice in capsys.readouterr().out


def test_works_together_with_sharding(make: Make) -> None:
    plain = ready(make)
    plain.train_step(batch_for(plain))
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        sharded = ready(make, "block", shard=True)
        for _ in range(2):
            loss = sharded.train_step(batch_for(sharded))["loss"]
        weights = sharded.whole_weights()
    finally:
        distributed.destroy_process_group()
    assert plain.train_step(batch_for(plain))["loss"] == pytest.approx(loss, rel=1e-5)
    for name, value in plain.network.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
