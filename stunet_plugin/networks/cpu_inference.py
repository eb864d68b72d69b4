"""Predicting on the CPU: the same functions in another order of memory.

On the CPU, three things cost more than they look. Its convolutions are up to three times faster
with the channels last in memory. Every large new tensor has to be paged in by the system, which
takes longer than to compute its values. And what does not fit the cache is read from memory anew at
each step. So where no gradient is wanted, the networks keep the channels last, go through feature
maps slab by slab with all steps at a time, and overwrite what nothing else reads any more.
Measurements: docs/decisions.md.

Axes of feature maps: (batch, channel, depth, height, width).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

SLAB_ELEMENTS = 1 << 18
"""A slab of float32 takes one MiB, which fits the second-level cache of today's processors."""


SMALLEST_VOLUME = 48**3
"""Voxels of an image below which everything is small enough as it is."""


def applies(module: nn.Module, x: Tensor) -> bool:
    """Return whether this is a prediction on the CPU in full precision (torch.compile makes its own
    order)."""
    if (
        x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or _mixed_precision()
    ):
        return False
    return not module.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _mixed_precision() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled()


def begins(module: nn.Module, image: Tensor) -> bool:
    """Return whether a network's stem shall put the channels of this image's features last."""
    return applies(module, image) and image[0, 0].numel() >= SMALLEST_VOLUME


def goes_on(module: nn.Module, x: Tensor) -> bool:
    """Return whether the stem has put the channels last, so that what follows goes on like that."""
    return applies(module, x) and x.is_contiguous(memory_format=torch.channels_last_3d)


def channels_last(x: Tensor) -> Tensor:
    """Return the feature map with its channels last in memory; a copy only where they are not."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def slab_length(x: Tensor, axis: int) -> int:
    """Return how many steps along an axis make a slab."""
    return max(SLAB_ELEMENTS * x.shape[axis] // max(x.numel(), 1), 1)


def norm_and_activation(
    norms: list[nn.Module], act: Callable[[Tensor], Tensor], inputs: list[Tensor], overwrite: bool
) -> Tensor:
    """Return ``act(norm(x))`` of all inputs, concatenated along the channels; the list of inputs is
    emptied.

    Args:
        norms: batch or instance norm, one per input.
        act: any activation, element by element.
        inputs: feature maps.
        overwrite: a single input may be overwritten with the result.
    """
    if len(inputs) == 1 and overwrite:
        result = channels_last(inputs[0])
    else:
        first = inputs[0]
        shape = (first.shape[0], sum(x.shape[1] for x in inputs), *first.shape[2:])
        result = torch.empty(shape, dtype=first.dtype, memory_format=torch.channels_last_3d)
        del first
    places = result.split([x.shape[1] for x in inputs], 1)
    for norm, x, place in zip(norms, inputs, places, strict=True):
        scale, shift = scale_and_shift(norm, x)
        length = slab_length(x, 2)
        for read, write in zip(x.split(length, 2), place.split(length, 2), strict=True):
            write.copy_(act(torch.addcmul(shift, read, scale)))
    inputs.clear()
    return result


def norm_sum_activation(
    norm: nn.Module,
    act: Callable[[Tensor], Tensor],
    x: Tensor,
    shortcut: Callable[[int, int], Tensor],
) -> Tensor:
    """Overwrite ``x`` with ``act(norm(x) + shortcut)`` and return it.

    Args:
        norm: batch or instance norm.
        act: any activation, element by element; may overwrite its input.
        x: feature map, channels last.
        shortcut: from a range of ``x``'s depth to what is added there.
    """
    scale, shift = scale_and_shift(norm, x)
    length = slab_length(x, 2)
    for start in range(0, x.shape[2], length):
        slab = x[:, :, start : start + length]
        total = torch.addcmul(shift, slab, scale)
        total += shortcut(start, start + length)
        slab.copy_(act(total))
    return x


def scale_and_shift(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a batch or instance norm multiplies by and adds in a prediction, (1 or batch,
    channel, 1, 1, 1) each."""
    everywhere = (-1, x.shape[1], 1, 1, 1)
    if isinstance(norm, _BatchNorm):
        mean, variance = norm.running_mean, norm.running_var
    else:
        mean = x.mean((2, 3, 4))
        around, length = mean.reshape(everywhere), slab_length(x, 2)
        # In two passes: mean square minus squared mean would lose digits.
        squares = [(slab - around).square_().sum((2, 3, 4)) for slab in x.split(length, 2)]
        variance = torch.stack(squares).sum(0) / x[0, 0].numel()
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale.reshape(everywhere), (norm.bias - mean * scale).reshape(everywhere)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Return ``conv(x)`` with the channels last."""
    if isinstance(conv, nn.Conv3d) and conv.kernel_size == (1, 1, 1):
        # torch's convolutions have no such kernel for this layout; a matrix product is one.
        return functional.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)
    return channels_last(conv(x))


def repeat_and_join(x: Tensor, skip: Tensor) -> Tensor:
    """Repeat the voxels of a coarser feature map and put a finer one behind it, channels last."""
    shape = (x.shape[0], x.shape[1] + skip.shape[1], *skip.shape[2:])
    result = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last_3d)
    repeated, behind = result.split([x.shape[1], skip.shape[1]], 1)
    behind.copy_(skip)
    for axis in (4, 3, 2):
        repeated = repeated.unflatten(axis, (x.shape[axis], -1))
    repeated.copy_(x[:, :, :, None, :, None, :, None])
    return result


def in_place(
    function: Callable[[Tensor], Tensor], x: Tensor, axis: int, add: bool = False
) -> Tensor:
    """Overwrite ``x`` with ``function(x)``, or add that to it, slab by slab along an axis; return
    it."""
    for slab in x.split(slab_length(x, axis), axis):
        if add:
            slab += function(slab)
        else:
            slab.copy_(function(slab))
    return x
