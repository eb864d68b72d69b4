"""Prompt channels: what a click, a box, a scribble or a lasso is drawn as, for the network to see.

Channels, point kernel and decay are those of nnInteractive (arXiv:2503.08373; its published session
2.6.0 was run for them), so that its viewers can use a network that was trained with these. Axes are
the network's, three of them; a 2D network has one of length 1 in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional

PREVIOUS = 0
"""Channel of the mask so far. Of the other kinds the positive one; the negative one is next."""
BOX, POINT, SCRIBBLE = 1, 3, 5
CHANNELS = 7
OUTPUTS = 2
"""Background and object."""
CHANNEL_OF = {"box": BOX, "lasso": BOX, "point": POINT, "scribble": SCRIBBLE}
RADIUS = 4
"""Of a click, in voxels."""
DECAY = 0.98
"""What is left of all earlier prompts after another one."""
ENTRY = "prompts"
"""Entry of dataset.json, also in every checkpoint, that only a promptable model has."""


@dataclass(frozen=True)
class Prompt:
    """Something drawn by a user: values (0 to 1, three axes) from voxel ``start`` on, which may lie
    outside of an image."""

    channel: int
    start: tuple[int, ...]
    values: Tensor

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(x + size for x, size in zip(self.start, self.values.shape, strict=True))

    def draw(self, channel: Tensor, origin: Sequence[int] = (0, 0, 0), strength: float = 1) -> None:
        """Draw it into a channel whose first voxel is ``origin``, where that does not hold more."""
        shape = channel.shape
        low = [max(x - o, 0) for x, o in zip(self.start, origin, strict=True)]
        high = [min(x - o, n) for x, o, n in zip(self.stop, origin, shape, strict=True)]
        if any(x >= y for x, y in zip(low, high, strict=True)):
            return
        there = tuple(slice(x, y) for x, y in zip(low, high, strict=True))
        here = tuple(
            slice(x + o - s, y + o - s)
            for x, y, o, s in zip(low, high, origin, self.start, strict=True)
        )
        values = self.values[here].to(channel) * strength
        channel[there] = torch.maximum(channel[there], values)


def point(position: Sequence[int], positive: bool, radii: Sequence[int]) -> Prompt:
    """Return a click on a voxel."""
    start = tuple(int(x) - radius for x, radius in zip(position, radii, strict=True))
    return Prompt(POINT + (not positive), start, point_kernel(tuple(radii)))


def box(start: Sequence[int], stop: Sequence[int], positive: bool) -> Prompt:
    """Return a box from one voxel up to, without, another."""
    sizes = [int(y) - int(x) for x, y in zip(start, stop, strict=True)]
    return Prompt(BOX + (not positive), tuple(map(int, start)), torch.ones(1).expand(sizes))


def drawn(kind: str, mask: Tensor, positive: bool, start: Sequence[int] = (0, 0, 0)) -> Prompt:
    """Return a scribble or a lasso: a mask whose first voxel is ``start``."""
    return Prompt(CHANNEL_OF[kind] + (not positive), tuple(map(int, start)), mask)


@cache
def point_kernel(radii: tuple[int, ...]) -> Tensor:
    """Return a click's values: the distance to the rim of an ellipsoid, 1 in the middle."""
    axes = [radius for radius in radii if radius]
    if not axes:
        return torch.ones(1).expand([1] * len(radii))
    largest = max(axes)
    offsets = np.indices([2 * largest + 1] * len(axes)) - largest
    ball = torch.from_numpy(((offsets**2).sum(0) <= largest**2).astype(np.float32))
    size = [2 * radius + 1 for radius in axes]
    if list(ball.shape) != size:
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(axes)]
        ball = functional.interpolate(ball[None, None], size=size, mode=mode)[0, 0]
    distance = distance_transform_edt(ball.numpy() >= 0.5)
    kernel = torch.from_numpy((distance / distance.max()).astype(np.float32))
    return kernel.reshape([2 * radius + 1 for radius in radii])


def radii_for(spacing: Sequence[float], resamples: bool) -> tuple[int, int, int]:
    """Return the radii of a click for a plan's spacing (mm): of equal length in mm, 4 voxels along
    the finest axis. Without resampling, as in the viewers, each scan has its own: 4 everywhere."""
    if not resamples:
        axes = [RADIUS] * len(spacing)
    else:
        finest = min(spacing)
        axes = [max(round(RADIUS * finest / step), 1) for step in spacing]
    first, second, third = [0] * (3 - len(axes)) + axes
    return first, second, third


def add(channels: Tensor, prompt: Prompt) -> None:
    """Fade the prompts in the channels of a patch, and draw another one."""
    channels[PREVIOUS + 1 :] *= DECAY
    prompt.draw(channels[prompt.channel])
