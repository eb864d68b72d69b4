"""Less memory in training: what is cheap to compute is computed again in the backward pass instead
of being kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def compute_again_in_backward(
    module: nn.Module, forward: Callable[..., Tensor], *inputs: Tensor, random: bool = True
) -> Tensor:
    """Return ``forward(*inputs)`` without keeping what is inside; the backward pass, if there is
    one, computes it again.

    Args:
        module: what ``forward`` runs; its batch norms count the batch once.
        forward: a function of tensors and of the module's parameters.
        inputs: to it.
        random: it draws random numbers, which then repeat; False saves the effort where it draws
            none.
    """
    if not torch.is_grad_enabled():
        return forward(*inputs)
    if torch.compiler.is_compiling():  # The compiler itself repeats only what has no side effect.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=random)
    contexts = nullcontext(), _StatisticsKept(module)
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=random,
        context_fn=lambda: contexts,
    )


class _StatisticsKept:
    """Context in which batch norms of a module normalise by the batch without changing their
    running statistics."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept: list[tuple[_BatchNorm, float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        norms = [part for part in self.module.modules() if isinstance(part, _BatchNorm)]
        self.kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm, _, count in self.kept:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if count is None else count.clone()

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
