"""Window sums: weighted sums of a network's windows in a slab that moves along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Window = tuple[Any, ...]
"""Slices of (channel, *spatial), as nnU-Net makes them; an integer for the plane of a 2D model."""


class WindowSums:
    """Weighted sums of windows from a position along the axis on: (channel, depth, *others).

    ``elsewhere`` are the values (channel) where no window is. In float32 the values are features,
    the last of which is the sum of the weights.
    """

    def __init__(self, elsewhere: Tensor, size: Sequence[int], dtype: torch.dtype) -> None:
        self.start, self.elsewhere = 0, elsewhere[:, None, None]
        self.values = torch.zeros(len(elsewhere), *size, dtype=dtype, device=elsewhere.device)
        self.features = dtype == torch.float32
        self.weights = self.values[-1]
        if not self.features:
            self.weights = torch.zeros(*size, dtype=dtype, device=elsewhere.device)

    def move(self, start: int) -> None:
        """Move along the axis; the sums that are still inside move with it."""
        step, self.start = start - self.start, start
        depth = self.values.shape[1]
        for plane in range(depth if step else 0):
            for sums in (self.values.movedim(1, 0), self.weights):
                sums[plane] = sums[plane + step] if plane + step < depth else 0

    def add(self, window: Window, axis: int, prediction: Tensor, weight: Tensor, to: int) -> None:
        """Add the prediction (channel, *patch) of a window, weighted already, from a channel on."""
        first, second = [part for other, part in enumerate(window[1:]) if other != axis]
        if isinstance(window[1], int):  # a 2D model, whose slabs are single planes
            prediction, weight = prediction[:, None], weight[None] if weight.ndim else weight
        else:
            prediction = prediction.movedim(1 + axis, 1)
            weight = weight.movedim(axis, 0) if weight.ndim else weight
        self.values[to : to + len(prediction), :, first, second] += prediction
        self.weights[:, first, second] += weight

    def mean(self, depth: int) -> tuple[Tensor, list[bool]]:
        """Return the means in the first planes, whose sums are lost with it, and whether the
        network was run on any voxel of each."""
        values, weights = self.values[:, :depth], self.weights[:depth].clone()
        nowhere = weights == 0
        was_run = (~nowhere).flatten(1).any(1).tolist()
        if nowhere.any():
            weights.masked_fill_(nowhere, 1)
            if not self.features:
                values[:, nowhere] = self.elsewhere[:, :, 0].to(values.dtype)
        return values.div_(weights), was_run
