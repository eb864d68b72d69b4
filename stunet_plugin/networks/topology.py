"""Topology: strides, patch sizes and deep-supervision scales, shared by networks and planners.

Plain tuples, full resolution first: strides have one entry per resolution stage with one number per
axis; the first entry is all ones because the first stage works at full resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import NUM_STAGES

Strides = tuple[tuple[int, ...], ...]


def as_strides(strides: Any) -> Strides:
    """Turn the nested lists of a plans file into tuples of ints (2.0 counts as 2).

    Raises:
        PluginError: not a list of stages, each with as many positive integers as there are axes.
    """
    lists = (list, tuple, np.ndarray)
    stages = list(strides) if isinstance(strides, lists) else []
    steps = [step for stage in stages if isinstance(stage, lists) for step in stage]
    if (
        not steps
        or not all(isinstance(stage, lists) for stage in stages)
        or len({len(stage) for stage in stages}) != 1
        or not all(map(_is_step, steps))
    ):
        raise PluginError(
            "Expected one list per stage with a positive integer per axis, as in [[1, 1, 1], [2, 2,"
            f" 2]], not {strides!r}."
        )
    return tuple(tuple(int(step) for step in stage) for stage in stages)


def _is_step(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return bool(value >= 1 and value == value // 1)


def published_strides(plan_strides: Sequence[Sequence[int]]) -> Strides:
    """Fit a plan's strides to the published six stages.

    The plan's poolings after its first entry are cut to five, or padded with ones at the deep end
    (facts from the published trainer, ``pool_op_kernel_sizes[1:]``). Kernel sizes stay 3
    everywhere, so weights fit whatever the plan.

    Args:
        plan_strides: strides of the plan, at least the first stage's.

    Returns:
        Six entries.
    """
    strides = as_strides(plan_strides)
    no_pooling = (1,) * len(strides[0])
    poolings = strides[1:NUM_STAGES]
    return (no_pooling, *poolings, *([no_pooling] * (NUM_STAGES - 1 - len(poolings))))


def strides_for_patch(patch_size: Sequence[int]) -> Strides:
    """Return six stages with the poolings that a patch allows, for isotropic spacing.

    An axis is halved, at most five times, while it is even and at least four voxels are left.

    Raises:
        PluginError: no axis can be halved even once.
    """
    sizes = [int(size) for size in patch_size]
    stages = [(1,) * len(sizes)]
    for _ in range(NUM_STAGES - 1):
        steps = tuple(2 if size % 2 == 0 and size // 2 >= 4 else 1 for size in sizes)
        sizes = [size // step for size, step in zip(sizes, steps, strict=True)]
        stages.append(steps)
    if total_stride(tuple(stages)) == stages[0]:
        raise PluginError(
            f"A patch of {list(patch_size)} cannot be pooled: give even sizes of at least 8 voxels,"
            " such as 96 160 160."
        )
    return tuple(stages)


def total_stride(strides: Strides) -> tuple[int, ...]:
    """Return by how much each axis shrinks from the input to the deepest stage."""
    total = [1] * len(strides[0])
    for stage in strides:
        total = [product * step for product, step in zip(total, stage, strict=True)]
    return tuple(total)


def num_poolings(strides: Strides) -> int:
    """Return how many stages pool at all; padded ones do not."""
    return sum(any(step > 1 for step in stage) for stage in strides)


def stage_shapes(patch_size: Sequence[int], strides: Strides) -> list[tuple[int, ...]]:
    """Return the spatial shape of every stage for an input of ``patch_size`` voxels."""
    shape = tuple(int(size) for size in patch_size)
    shapes = []
    for stage in strides:
        shape = tuple(size // step for size, step in zip(shape, stage, strict=True))
        shapes.append(shape)
    return shapes


def deep_supervision_scales(strides: Strides) -> list[list[float]]:
    """Return one scale per decoder output, as nnU-Net's target downsampling takes them.

    The decoder has one output for each stage but the deepest, so targets and outputs pair up by
    construction.
    """
    scales = []
    scale = [1.0] * len(strides[0])
    for stage in strides[:-1]:
        scale = [value / step for value, step in zip(scale, stage, strict=True)]
        scales.append(scale)
    return scales


def check_patch_size(
    patch_size: Sequence[int], strides: Strides, who: str, advice: str = "Use one of them."
) -> None:
    """Raise unless every axis of the patch is divisible by the network's total stride.

    Args:
        patch_size: voxels per axis.
        strides: of the network.
        who: what the message calls the network.
        advice: what to do with the nearest sizes that work.

    Raises:
        PluginError: names the patch, the total stride and the nearest sizes that work.
    """
    total = total_stride(strides)
    if len(patch_size) != len(total):
        raise PluginError(
            f"{who} has {len(total)} spatial axes, but the patch size {list(patch_size)} has"
            f" {len(patch_size)}."
        )
    if any(size % step or size < step for size, step in zip(patch_size, total, strict=True)):
        pairs = list(zip(patch_size, total, strict=True))
        below = [max(size // step, 1) * step for size, step in pairs]
        above = [max(-(-size // step), 1) * step for size, step in pairs]
        raise PluginError(
            f"{who} reduces the axes by {list(total)}, so the patch size must be divisible by"
            f" {list(total)}, but it is {list(patch_size)}. Nearest sizes that work: {below} and"
            f" {above}. {advice}"
        )
