"""Resampling plane by plane to the grid of an image, as nnU-Net's functions do it for a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from torch import Tensor
from torch.nn import functional

FIRST_AXIS_FROM = 0.6
"""Of the longest axis' length: from here on planes follow the first axis, in nnU-Net's order."""


class PlaneResampling:
    """Resampling along an axis: linear, or nearest along an axis of thick slices.

    Args:
        old, new: shapes before and after.
        nearest: the axis that takes the nearest plane, if there is one.
        rounded: to half precision, as nnU-Net's default does.
        flat: planes follow the first axis, as the windows of a 2D model do.
    """

    def __init__(
        self, old: Sequence[int], new: Sequence[int], nearest: int | None, rounded: bool, flat: bool
    ) -> None:
        longest = max(old)
        first = flat or old[0] >= FIRST_AXIS_FROM * longest
        self.axis = 0 if first else list(old).index(longest)
        self.old, self.new, self.nearest, self.rounded = old, new, nearest, rounded
        # Planes of the input, resampled within; None where the network was not run.
        self._kept: list[tuple[int, Tensor | None]] = []
        self._read = self._written = 0

    @classmethod
    def of(
        cls,
        chosen: Any,
        old: Sequence[int],
        new: Sequence[int],
        spacings: tuple[Sequence[float], Sequence[float]],
        flat: bool,
    ) -> PlaneResampling | None:
        """Return the resampling of a plan; None if it is of another kind.

        Args:
            chosen: a plan's ``resampling_fn_probabilities``.
            spacings: before and after.
            flat: the model is a 2D one.
        """
        settings = dict(chosen.keywords)
        default = chosen.func is resample_data_or_seg_to_shape
        expected: dict[str, Any] = {"is_seg": False}
        if default:
            expected |= {"order": 1, "order_z": 0}
            settings = {"order": 3, **settings}
        elif chosen.func is resample_torch_fornnunet:
            expected |= {"mode": "linear", "aniso_axis_mode": "nearest-exact"}
        else:
            return None
        if any(settings.get(key, value) != value for key, value in expected.items()):
            return None
        names = ("force_separate_z", "separate_z_anisotropy_threshold")
        how = {name: settings[name] for name in names if name in settings}
        how.setdefault("force_separate_z", False if default else None)
        _, axis = determine_do_sep_z_and_axis(how.pop("force_separate_z"), *spacings, **how)
        return cls(tuple(old), tuple(new), axis, default, flat)

    def planes(
        self, values: Tensor, was_run: Sequence[bool], elsewhere: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Take the next planes; yield those of the image that are complete with them.

        Args:
            values: (channel, plane, *others).
            was_run: whether the network was run on any voxel of each plane. Planes of the image
                that come from others alone are left out.
            elsewhere: (channel, 1, 1), the values where it was not.

        Yields:
            The index of a plane, and its values (channel, *others).
        """
        size, new = self.old[self.axis], self.new[self.axis]
        for plane, run in zip(values.unbind(1), was_run, strict=True):
            self._kept.append((self._read, self._within(plane) if run else None))
            self._read += 1
            while self._written < new:
                place = (self._written + 0.5) * size / new - 0.5
                if self.nearest == self.axis:
                    place = float(np.floor(place + 0.5))
                place = min(max(place, 0.0), size - 1.0)
                low = int(place)
                if min(low + (place > low), size - 1) >= self._read:
                    break
                self._kept = [(number, kept) for number, kept in self._kept if number >= low]
                pair = [kept for _, kept in self._kept[: 1 + (place > low)]]
                whole = [kept for kept in pair if kept is not None]
                if whole:
                    first, *second = [
                        elsewhere.float().expand_as(whole[0]) if kept is None else kept
                        for kept in pair
                    ]
                    mixed = torch.lerp(first, second[0], place - low) if second else first
                    yield self._written, mixed.half() if self.rounded else mixed
                self._written += 1

    def _within(self, plane: Tensor) -> Tensor:
        """Resample (channel, *others) within the plane."""
        others = [axis for axis in range(3) if axis != self.axis]
        plane = plane.float()
        for number, axis in enumerate(others):
            if axis == self.nearest and self.old[axis] != self.new[axis]:
                places = (torch.arange(self.new[axis]) + 0.5) * self.old[axis] / self.new[axis]
                index = places.long().clamp(max=self.old[axis] - 1).to(plane.device)
                plane = plane.index_select(1 + number, index)
        size = [self.new[axis] for axis in others]
        if list(plane.shape[1:]) == size:
            return plane.clone()  # of a slab, which moves on
        return functional.interpolate(plane[None], size, mode="bilinear")[0]
