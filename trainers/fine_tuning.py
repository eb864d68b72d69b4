"""Fine-tuning: warm-up of the learning rate, and a rate of its own for the encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from stunet_plugin import options as names
from stunet_plugin.errors import PluginError


class FineTuningScheduler(PolyLRScheduler):
    """nnU-Net's poly schedule, times the warm-up, times each parameter group's ``rate_factor``."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, rate: float, max_steps: int, warmup_epochs: int
    ) -> None:
        self.warmup_epochs = warmup_epochs
        super().__init__(optimizer, rate, max_steps)

    def step(self, current_step: int | None = None) -> None:
        super().step(current_step)
        # As in the parent: without an argument its own counter, which it has just raised.
        epoch = self.ctr - 1 if current_step is None or current_step == -1 else current_step
        warmup = min(1.0, (epoch + 1) / (self.warmup_epochs + 1))
        for group in self.optimizer.param_groups:
            group["lr"] *= warmup * group.get("rate_factor", 1.0)


def parameter_groups(network: torch.nn.Module, encoder_rate: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: one, or (rest, encoder) where the encoder's rate, a fraction
    of the rest's, differs; nnU-Net logs the first group's learning rate."""
    if encoder_rate == 1.0:
        return [{"params": list(network.parameters())}]
    encoder = list(encoder_parameters(network))
    inside = set(map(id, encoder))
    rest = [parameter for parameter in network.parameters() if id(parameter) not in inside]
    return [{"params": rest, "rate_factor": 1.0}, {"params": encoder, "rate_factor": encoder_rate}]


def encoder_parameters(network: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    """Return the parameters of the encoder, its stem included; raise if it is not known."""
    keys = [getattr(network, key, None) for key in ("key_to_encoder", "key_to_stem")]
    if not all(keys):
        raise PluginError(
            f"{type(network).__name__} does not say which part is its encoder (key_to_encoder,"
            f" key_to_stem). Unset {names.FROZEN_ENCODER_EPOCHS.variable} and"
            f" {names.ENCODER_RATE.variable}."
        )
    parts = [network.get_submodule(str(key)) for key in keys]
    return dict.fromkeys(parameter for part in parts for parameter in part.parameters())
