"""Strides, patch sizes and deep-supervision scales: the arithmetic that the networks, trainers and
planners share.

Plain Python on tuples, full resolution first. A *stride* tuple has one entry per resolution stage,
each with one number per axis; the first entry is all ones because the first stage works at full
resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import NUM_STAGES

Strides = tuple[tuple[int, ...], ...]


def as_strides(strides: Any) -> Strides:
    """Turn the nested lists of a plans file into tuples of ints.

    Raises:
        PluginError: not a list of stages with one positive whole number per axis, the same number
            of axes everywhere.
    """
    if (
        not _is_list(strides)
        or not strides
        or not all(_is_list(stage) and stage for stage in strides)
    ):
        raise PluginError(
            "Expected one list per stage, with a number per axis, as [[1, 1, 1], [2, 2, 2]], not"
            f" {strides!r}."
        )
    numbers = tuple(tuple(_whole(step) for step in stage) for stage in strides)
    if (
        any(step is None for stage in numbers for step in stage)
        or len({len(stage) for stage in numbers}) != 1
    ):
        raise PluginError(
            "Expected whole numbers of 1 or more, as many for every stage as there are axes, not"
            f" {strides!r}."
        )
    return tuple(tuple(step or 0 for step in stage) for stage in numbers)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _whole(value: Any) -> int | None:
    """The value as an int if it is a positive whole number (2.0 in a plans file counts), else
    None."""
    if isinstance(value, (bool, str)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        return None
    return int(value) if value >= 1 and value == int(value) else None


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
    """Return six stages with the poolings that a patch allows, as nnU-Net plans them for isotropic
    spacing.

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
    """Return one scale per decoder output, full resolution first, as nnU-Net's target downsampling
    takes them.

    The decoder has one output for each stage but the deepest, so targets and outputs pair up by
    construction.
    """
    scales = []
    scale = [1.0] * len(strides[0])
    for stage in strides[:-1]:
        scale = [value / step for value, step in zip(scale, stage, strict=True)]
        scales.append(scale)
    return scales


def nearest_patch_sizes(
    patch_size: Sequence[int], strides: Strides
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the patch sizes just below (at least one step) and just above that the strides
    divide."""
    total = total_stride(strides)
    below = tuple(max(size // step, 1) * step for size, step in zip(patch_size, total, strict=True))
    above = tuple(
        max(-(-size // step), 1) * step for size, step in zip(patch_size, total, strict=True)
    )
    return below, above


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
        below, above = nearest_patch_sizes(patch_size, strides)
        raise PluginError(
            f"{who} reduces the axes by {list(total)}, so the patch size must be divisible by"
            f" {list(total)}, but it is {list(patch_size)}. Nearest sizes that work: {list(below)}"
            f" and {list(above)}. {advice}"
        )
