"""Coarse box: where a prediction at 3 mm finds something, so that the fine one looks only there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional

COARSE_MM = 3.0
"""Spacing of the coarse prediction."""
MARGIN_MM = 20.0
"""Around what it finds."""

Box = tuple[slice, slice, slice]
"""A part of the network's input, without its channels."""
LeaveOut = Callable[[Sequence[slice]], bool]
"""Tells of a window, by its slices of the three axes, whether it is background."""


def coarse_copy(data: Tensor, spacing: Sequence[float]) -> Tensor | None:
    """Return a network's input (channel, *spatial) at COARSE_MM; None if that is hardly coarser."""
    old, fine = np.asarray(data.shape[1:]), np.asarray(spacing, float)
    new = np.maximum(np.rint(old * fine / np.maximum(fine, COARSE_MM)), 1).astype(int)
    if new.prod() > old.prod() / 2:
        return None
    return functional.interpolate(data[None], tuple(new.tolist()), mode="area")[0]


def coarse_leave_out(leave_out: LeaveOut | None, scale: Sequence[float]) -> LeaveOut | None:
    """Return the same function for windows of the coarse copy, whose voxels are ``scale`` long."""
    if leave_out is None:
        return None

    def leave_out_coarse(window: Sequence[slice]) -> bool:
        return leave_out(
            [
                slice(int(part.start * factor), int(np.ceil(part.stop * factor)))
                for part, factor in zip(window, scale, strict=True)
            ]
        )

    return leave_out_coarse


def box_around(labels: np.ndarray, size: Sequence[int], spacing: Sequence[float]) -> Box:
    """Return the box around labels, with a margin, on a grid of ``size`` and ``spacing`` (mm)."""
    sides = []
    for axis, (whole, step) in enumerate(zip(size, spacing, strict=True)):
        first, last = _extent(labels, axis, whole)
        margin = MARGIN_MM / step
        sides.append(slice(max(int(first - margin), 0), min(int(last + margin) + 1, whole)))
    return sides[0], sides[1], sides[2]


def reaches_a_side(labels: np.ndarray, box: Box, size: Sequence[int]) -> bool:
    """Return whether labels reach a side of a box that is not one of the image; the box is of a
    grid of ``size``, the labels of another of the same image."""
    if not labels.any():
        return False
    for axis, (side, length) in enumerate(zip(box, size, strict=True)):
        first, last = _extent(labels, axis, length)
        near = 1 + length / labels.shape[axis]
        if side.start > 0 and first < side.start + near:
            return True
        if side.stop < length and last > side.stop - near:
            return True
    return False


def _extent(labels: np.ndarray, axis: int, length: int) -> tuple[float, float]:
    """Return where labels begin and end along an axis of another grid, of ``length`` voxels."""
    others = tuple(other for other in range(labels.ndim) if other != axis)
    found, scale = np.flatnonzero(labels.any(others)), length / labels.shape[axis]
    return found[0] * scale, (found[-1] + 1) * scale
