"""Activation checkpointing of an STU-Net: chosen by the free memory, and switched on when a
training runs out of it.

Both settings that save memory cost the same time, one more forward pass; which of them needs less
depends on the number of outputs and blocks, and follows from the estimate of
``stunet_plugin.networks.memory``. So there is one step to go down: from keeping everything to the
leaner of the two.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from stunet_plugin.networks.checkpointing_settings import AUTO, OFF, SETTINGS
from stunet_plugin.networks.memory import ADAM_VALUES, GIGABYTE, SGD_VALUES, STUNetShape
from stunet_plugin.networks.presets import find_preset
from stunet_plugin.options import CHECKPOINTING, SHARD, Options
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.distributed_trainer import world_size

AUTOMATIC_SIZES = ("large", "huge")
"""Sizes that check the free memory of a GPU unless told otherwise."""
FIRST_STEPS = 10
"""Until then the optimizer has made its momentum, and convolutions have chosen their algorithms;
memory no longer grows."""


class CheckpointingTrainer(PluginTrainer):
    """Trainer of an STU-Net that sets its activation checkpointing."""

    _may_step_down = False
    _steps_made = 0
    _optimizer_has_begun = False

    def initialize(self) -> None:
        super().initialize()
        wish = Options().word(CHECKPOINTING)
        # One process alone cannot go back: the others are waiting for its gradients.
        self._may_step_down = wish in (None, AUTO) and not self.is_ddp
        setting = wish or (
            AUTO if self.device.type == "cuda" and self._size() in AUTOMATIC_SIZES else OFF
        )
        if setting == AUTO:
            setting = self._choose()
        self._bare_network().checkpointing = setting

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer, schedule = super().configure_optimizers()
        optimizer.register_step_pre_hook(self._note_optimizer)
        return optimizer, schedule

    # --- choosing

    def _shape(self) -> STUNetShape:
        encoder = self._bare_network().encoder
        blocks = tuple(len(stage) for stage in encoder.stages)
        outputs = self.label_manager.num_segmentation_heads
        return STUNetShape(
            encoder.output_channels, blocks, encoder.strides, self.num_input_channels, outputs
        )

    def _size(self) -> str | None:
        shape = self._shape()
        preset = find_preset(shape.features, shape.blocks)
        return preset.name if preset else None

    def estimates(self) -> dict[str, float]:
        """Return the estimated peak of a training step of this process, in bytes, for each
        setting."""
        shape = self._shape()
        processes = world_size() if self.sharded else 1
        # Volume Fusion pretrains with Adam.
        values = ADAM_VALUES if isinstance(self.optimizer, torch.optim.Adam) else SGD_VALUES
        return {
            setting: (
                shape.training_memory(
                    self.configuration_manager.patch_size,
                    self.batch_size,
                    self.device.type == "cuda",
                    setting,
                    processes,
                    values,
                ).total
            )
            for setting in SETTINGS
        }

    def _choose(self) -> str:
        available = available_bytes(self.device)
        if available is None:
            self.print_to_log_file(
                f"Activation checkpointing: {OFF}, since the free memory is known on CUDA alone."
            )
            return OFF
        estimates = self.estimates()
        # Processes that share the network out compute the same things at the same time.
        setting = leanest(estimates) if self.agree(estimates[OFF] > available) else OFF
        figures = ", ".join(
            f"{name} {estimate / GIGABYTE:.1f}" for name, estimate in estimates.items()
        )
        if setting == OFF:
            why = "everything fits"
        elif estimates[setting] <= available:
            why = "it fits, for the time of one more forward pass"
        else:
            why = "the least, though by the estimate it does not fit either"
        self.print_to_log_file(
            f"Activation checkpointing: {setting} ({why}). Estimated peak in GB: {figures};"
            f" available: {available / GIGABYTE:.1f}. {CHECKPOINTING.variable}={'|'.join(SETTINGS)}"
            " overrides this."
        )
        return setting

    # --- running out of memory

    def train_step(self, batch: dict) -> dict:
        """As nnU-Net's; one of the first steps that runs out of memory is made again with
        activation checkpointing.

        Weights and momentum are still those from before the step, since it is the forward or the
        backward pass that ran out, so the epoch goes on as if nothing had happened.

        Raises:
            torch.OutOfMemoryError: there is no setting that needs less, or it is not for this
            process to choose; the log says why.
        """
        self._optimizer_has_begun = False
        try:
            result: dict[str, Any] = super().train_step(batch)
        except torch.cuda.OutOfMemoryError as error:  # its name in every torch that nnU-Net takes
            setting, advice = self._next_setting()
            if setting is None:
                now = self._bare_network().checkpointing
                self.print_to_log_file(
                    f"\nOut of memory with activation checkpointing {now}. {advice}\n"
                )
                raise
            self.print_to_log_file(f"\nOut of memory in step {self._steps_made + 1}: {error}")
        else:
            self._steps_made += 1
            return result
        # Out of the handler: the error's traceback holds on to the activations.
        self._step_down(setting)
        # Not self.train_step: what derived classes do to a batch has been done.
        return CheckpointingTrainer.train_step(self, batch)

    def _next_setting(self) -> tuple[str | None, str]:
        """Return the setting to go on with, or None and what to do instead."""
        now = self._bare_network().checkpointing
        if self._optimizer_has_begun:
            return (
                None,
                (
                    "It was the optimizer's step, when no activations are left. Take a smaller"
                    f" size, or {SHARD.variable}=1."
                ),
            )
        estimates = self.estimates()
        best = leanest(estimates)
        if now != OFF and estimates[best] >= estimates[now]:
            return (
                None,
                (
                    "It saves no more. Plan for less memory (-gpu_memory_target), or use several"
                    f" GPUs ({SHARD.variable}=1)."
                ),
            )
        if now != OFF or not self._may_step_down or self._steps_made >= FIRST_STEPS:
            return (
                None,
                (
                    f"{CHECKPOINTING.variable}={best} needs less; the same command with --c goes on"
                    " from the last checkpoint."
                ),
            )
        return best, ""

    def _step_down(self, setting: str) -> None:
        self._may_step_down = False
        self.optimizer.zero_grad(set_to_none=True)
        if self.grad_scaler is not None:
            # It may have divided this step's gradients already, and would refuse to do so again.
            scaler = torch.amp.GradScaler(self.device.type)
            scaler.load_state_dict(self.grad_scaler.state_dict())
            self.grad_scaler = scaler
        self._bare_network().checkpointing = setting
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.print_to_log_file(
            f"Activation checkpointing: {setting}, from this step on, which is made again. Training"
            f" takes longer now; {CHECKPOINTING.variable}={setting} does the same from the start.\n"
        )

    def _note_optimizer(self, *_: Any) -> None:
        self._optimizer_has_begun = True


def leanest(estimates: Mapping[str, float]) -> str:
    """Return the setting that needs the least memory; of equal ones the first."""
    return min(estimates, key=lambda setting: estimates[setting])


def available_bytes(device: torch.device) -> float | None:
    """Return what a training in this process may take of a device's memory, what it has taken
    already included; None if unknown."""
    if device.type != "cuda":
        return None
    return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
