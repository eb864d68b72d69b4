"""Activation checkpointing of an STU-Net: chosen by the free memory, or when memory runs out. Both
settings cost one more forward pass, so the one taken is the leaner (``networks.memory``)."""

from __future__ import annotations

import gc
from typing import Any

import torch

from stunet_plugin.networks.activation_checkpointing import AUTO, OFF, SETTINGS
from stunet_plugin.networks.memory import ADAM_VALUES, GIGABYTE, SGD_VALUES, STUNetShape
from stunet_plugin.networks.presets import find_preset
from stunet_plugin.options import CHECKPOINTING, SHARD, Options
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.distributed_trainer import world_size

AUTOMATIC_SIZES = ("large", "huge")
"""Sizes that check the free memory of a GPU unless told otherwise."""
FIRST_STEPS = 10
"""Memory no longer grows after these: momentum exists, convolutions have chosen algorithms."""


class CheckpointingTrainer(PluginTrainer):
    """Trainer of an STU-Net that sets its activation checkpointing."""

    can_checkpoint = True
    _may_step_down = False
    _steps_made = 0

    def initialize(self) -> None:
        super().initialize()
        setting = Options().word(CHECKPOINTING)
        # One process alone cannot repeat a step: the others are waiting for its gradients.
        self._may_step_down = setting in (None, AUTO) and not self.is_ddp
        if setting is None:
            shape = self._shape()
            preset = find_preset(shape.features, shape.blocks)
            large = preset is not None and preset.name in AUTOMATIC_SIZES
            setting = AUTO if large and self.device.type == "cuda" else OFF
        self._bare_network().checkpointing = self._choose() if setting == AUTO else setting

    def _shape(self) -> STUNetShape:
        encoder = self._bare_network().encoder
        blocks = tuple(len(stage) for stage in encoder.stages)
        outputs = self.label_manager.num_segmentation_heads
        return STUNetShape(
            encoder.output_channels, blocks, encoder.strides, self.num_input_channels, outputs
        )

    def estimates(self) -> dict[str, float]:
        """Return the estimated peak of a training step of this process in bytes, per setting."""
        shape, patch_size = self._shape(), self.configuration_manager.patch_size
        step = patch_size, self.batch_size, self.device.type == "cuda"
        processes = world_size() if self.sharded else 1
        # Volume Fusion pretrains with Adam.
        values = ADAM_VALUES if isinstance(self.optimizer, torch.optim.Adam) else SGD_VALUES
        return {x: shape.training_memory(*step, x, processes, values) for x in SETTINGS}

    def _choose(self) -> str:
        available = available_bytes(self.device)
        if available is None:
            self.print_to_log_file(f"Activation checkpointing: {OFF}; free memory is unknown.")
            return OFF
        estimates = self.estimates()
        # Processes that share a network have to compute alike.
        setting = leanest(estimates) if self.any_process(estimates[OFF] > available) else OFF
        if setting == OFF:
            why = "everything fits"
        elif estimates[setting] <= available:
            why = "it fits, for the time of one more forward pass"
        else:
            why = "the least, though by the estimate it does not fit either"
        figures = ", ".join(f"{name} {peak / GIGABYTE:.1f}" for name, peak in estimates.items())
        self.print_to_log_file(
            f"Activation checkpointing: {setting} ({why}). Estimated peak in GB: {figures};"
            f" available: {available / GIGABYTE:.1f}. {CHECKPOINTING.variable} overrides this."
        )
        return setting

    def train_step(self, batch: dict) -> dict:
        """As nnU-Net's; one of the first steps that runs out of memory before the optimizer's is
        repeated with activation checkpointing."""
        try:
            result: dict[str, Any] = super().train_step(batch)
        except torch.cuda.OutOfMemoryError as error:  # its name in every torch that nnU-Net takes
            setting, advice = self._next_setting()
            if setting is None:
                now = f"activation checkpointing {self._bare_network().checkpointing}"
                self.print_to_log_file(f"\nOut of memory with {now}. {advice}\n")
                raise
            self.print_to_log_file(f"\nOut of memory in step {self._steps_made + 1}: {error}")
        else:
            self._steps_made += 1
            return result
        # Outside the handler: the error's traceback keeps the activations alive.
        self._step_down(setting)
        # Not self.train_step: what derived classes do to a batch has been done.
        return CheckpointingTrainer.train_step(self, batch)

    def _next_setting(self) -> tuple[str | None, str]:
        """Return the setting to continue with, or None and what to do instead."""
        estimates, now = self.estimates(), self._bare_network().checkpointing
        best = leanest(estimates)
        if self._step_was_made:
            advice = "It was the optimizer's step. Take a smaller size, or"
            return None, f"{advice} {SHARD.variable}=1."
        if now != OFF and estimates[best] >= estimates[now]:
            advice = "No setting needs less. Plan for less memory (-gpu_memory_target), or use"
            return None, f"{advice} several GPUs ({SHARD.variable}=1)."
        if now != OFF or not self._may_step_down or self._steps_made >= FIRST_STEPS:
            advice = f"{CHECKPOINTING.variable}={best} needs less; the same command with --c"
            return None, f"{advice} resumes from the last checkpoint."
        return best, ""

    def _step_down(self, setting: str) -> None:
        self._may_step_down = False
        self.optimizer.zero_grad(set_to_none=True)
        if self.grad_scaler is not None:
            # It may have unscaled this step's gradients, which it does once.
            scaler = torch.amp.GradScaler(self.device.type)
            scaler.load_state_dict(self.grad_scaler.state_dict())
            self.grad_scaler = scaler
        self._bare_network().checkpointing = setting
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.print_to_log_file(
            f"Activation checkpointing: {setting} from now on; this step is repeated."
            f" {CHECKPOINTING.variable}={setting} does the same from the start.\n"
        )


def leanest(estimates: dict[str, float]) -> str:
    """Return the setting that needs the least memory; of equal ones the first."""
    return min(estimates, key=estimates.__getitem__)


def available_bytes(device: torch.device) -> float | None:
    """Return what this process may hold of a device's memory; None if unknown."""
    if device.type != "cuda":
        return None
    return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
