"""Topology: strides, patch sizes and deep-supervision scales, shared by networks and planners.

Plain tuples, full resolution first: strides have one entry per resolution stage with one number per
axis; the first entry is all ones because the first stage works at full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import NUM_STAGES

Strides = tuple[tuple[int, ...], ...]


def as_strides(strides: Any) -> Strides:
    """Turn the nested lists of a plans file into tuples of ints (2.0 counts as 2)."""
    try:
        steps = np.asarray(strides)  # ValueError: not as many numbers in each stage
        if steps.dtype.kind in "iuf" and steps.ndim == 2 and steps.size:
            whole = steps.astype(int)
            if (whole >= 1).all() and (whole == steps).all():
                return tuple(map(tuple, whole.tolist()))
    except ValueError:
        pass
    raise PluginError(
        "Expected one list per stage with a positive integer per axis, as in [[1, 1, 1], [2, 2,"
        f" 2]], not {strides!r}."
    )


def published_strides(plan_strides: Sequence[Sequence[int]]) -> Strides:
    """Cut a plan's poolings after its first entry to five, or pad them with ones at the deep end.

    Facts from the published trainer (``pool_op_kernel_sizes[1:]``); kernels stay 3 everywhere.
    """
    strides = as_strides(plan_strides)
    no_pooling = (1,) * len(strides[0])
    return (no_pooling, *strides[1:], *[no_pooling] * NUM_STAGES)[:NUM_STAGES]


def strides_for_patch(patch_size: Sequence[int]) -> Strides:
    """Return six stages for isotropic spacing: an axis is halved, at most five times, while it is
    even and at least four voxels are left."""
    sizes = [int(size) for size in patch_size]
    stages = [(1,) * len(sizes)]
    for _ in range(NUM_STAGES - 1):
        steps = tuple(2 if size % 2 == 0 and size >= 8 else 1 for size in sizes)
        sizes = [size // step for size, step in zip(sizes, steps, strict=True)]
        stages.append(steps)
    if total_stride(tuple(stages)) == stages[0]:
        raise PluginError(
            f"A patch of {list(patch_size)} cannot be pooled: give even sizes of at least 8 voxels,"
            " such as 96 160 160."
        )
    return tuple(stages)


def token_strides(spacing: Sequence[float], patch: Sequence[int]) -> Strides:
    """Return five stages for a network of tokens: the second to fourth make up a token of 8 voxels
    on the finest axis and about as many millimetres on the others, of 1, 2, 4 or 8 voxels; coarse
    axes are pooled last. The last stage halves the tokens."""
    finest = min(spacing)
    halvings = [
        min(max(3 - round(math.log2(step / finest)), 0), max(int(size), 1).bit_length() - 1)
        for step, size in zip(spacing, patch, strict=True)
    ]
    stages = [tuple(2 if count >= left else 1 for count in halvings) for left in (3, 2, 1)]
    ones, twos = (1,) * len(patch), (2,) * len(patch)
    return (ones, *stages, twos)


def total_stride(strides: Strides) -> tuple[int, ...]:
    """Return by how much each axis shrinks from the input to the deepest stage."""
    # Without numpy, which torch.compile would trace: every forward pass asks.
    return tuple(map(prod, zip(*strides, strict=True)))


def stage_shapes(patch_size: Sequence[int], strides: Strides) -> list[tuple[int, ...]]:
    """Return the spatial shape of every stage for an input of ``patch_size`` voxels."""
    shapes = np.asarray(patch_size) // np.cumprod(strides, axis=0)
    return list(map(tuple, shapes.tolist()))


def deep_supervision_scales(strides: Strides) -> list[list[float]]:
    """Return one scale per decoder output (each stage but the deepest), as nnU-Net's target
    downsampling takes them."""
    scales: list[list[float]] = (1 / np.cumprod(strides, axis=0))[:-1].tolist()
    return scales


def check_patch_size(
    patch_size: Sequence[int], strides: Strides, who: str, advice: str = "Use one of them."
) -> None:
    """Raise a PluginError unless every axis of the patch is divisible by the total stride; ``who``
    names the network, ``advice`` says what to do with the nearest sizes that work."""
    total, given = total_stride(strides), list(patch_size)
    if len(given) != len(total):
        raise PluginError(f"{who} has {len(total)} spatial axes; patch size {given} does not fit.")
    pairs = list(zip(given, total, strict=True))
    if any(size % step or size < step for size, step in pairs):
        below = [max(size // step, 1) * step for size, step in pairs]
        above = [max(-(-size // step), 1) * step for size, step in pairs]
        raise PluginError(
            f"{who} takes patch sizes divisible by {list(total)}, not {given}. Nearest sizes that"
            f" work: {below} and {above}. {advice}"
        )
