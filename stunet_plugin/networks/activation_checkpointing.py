"""Activation checkpointing: the backward pass computes again what is cheap to compute.

Imports torch only when used: ``stunet --help`` reads the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

OFF = "off"  # everything is kept
STAGE = "stage"  # the output of each stage is kept; one stage at a time exists again
BLOCK = "block"  # the output of each residual block is kept; one block at a time exists again
SETTINGS = (OFF, STAGE, BLOCK)
AUTO = "auto"  # the trainer chooses one of SETTINGS by the free memory


def checkpointed(
    module: nn.Module, forward: Callable[..., Tensor], *inputs: Tensor, random: bool = True
) -> Tensor:
    """Return ``forward(*inputs)``, of which the inputs alone are kept for the backward pass.

    The batch norms of ``module``, which ``forward`` runs, count the batch once. ``random``: it
    draws random numbers, which then repeat; False saves time.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*inputs)
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
    if not torch.compiler.is_compiling():  # the compiler repeats only what has no side effect
        settings["context_fn"] = lambda: (nullcontext(), _StatisticsKept(module))
    output: Tensor = checkpoint(forward, *inputs, **settings)
    return output


class _StatisticsKept:
    """Context in which batch norms normalise by the batch and keep their running statistics."""

    def __init__(self, module: nn.Module) -> None:
        from torch.nn.modules.batchnorm import _BatchNorm

        norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        self.kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]

    def __enter__(self) -> None:
        for norm, _, count in self.kept:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if count is None else count.clone()

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
