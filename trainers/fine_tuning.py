"""Fine-tuning options: warm-up, a frozen encoder, a lower learning rate for the encoder.

None is published for STU-Net; all are off by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


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
    inside = {id(parameter) for parameter in encoder}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in inside]
    return [{"params": rest, "rate_factor": 1.0}, {"params": encoder, "rate_factor": encoder_rate}]


def encoder_parameters(network: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    network = getattr(network, "_orig_mod", network)
    return network.get_submodule(str(network.key_to_encoder)).parameters()


def discard_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Make an optimizer's step skip parameters: no update, no weight decay, no momentum.

    Unlike ``requires_grad = False`` this keeps the graph the same, so DDP and torch.compile work.
    """
    for parameter in parameters:
        parameter.grad = None
