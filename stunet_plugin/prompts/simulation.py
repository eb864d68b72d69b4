"""Simulation of prompts from labels, on the training device: an object, how a user would point at
it, and how he would correct what a network makes of that.

Sources: previous mask and corrections as in the interactive segmentation of RITM (arXiv:2102.06583)
and SAM-Med2D (arXiv:2308.16184), kinds of prompts of nnInteractive (arXiv:2503.08373), whose own
simulation is not published. Every number is in :class:`Recipe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stunet_plugin.prompts import channels as drawing
from stunet_plugin.prompts.channels import CHANNELS, PREVIOUS, Prompt

IGNORED = 2
"""Value in a target of what counts for nothing; the object is 1."""


@dataclass(frozen=True)
class Recipe:
    """What is drawn how often.

    Attributes:
        component: an object is one connected component of a class, not all of it.
        least_voxels: of such a component.
        absent: nothing is to be found, and a prompt says where it is not.
        kinds: of the first prompt; without one everything labelled is to be found.
        corrected: share of steps with corrections; ``corrections`` of them, least and most.
        corrections_by: kinds of corrections.
        zoomed: share of samples that are shrunk, by ``zoom``, rarely by ``far``.
        jitter, jitter_voxels: of each side of a box, as a share of its length and in voxels.
        damage: voxels by which a previous mask is grown, shrunk or moved, at most.
    """

    component: float = 0.5
    least_voxels: int = 20
    absent: float = 0.1
    kinds: dict[str, float] = field(
        default_factory=lambda: {
            "point": 0.4,
            "box": 0.15,
            "flat box": 0.1,
            "lasso": 0.1,
            "scribble": 0.1,
            "mask": 0.1,
            "none": 0.05,
        }
    )
    corrected: float = 0.5
    corrections: tuple[int, int] = (1, 4)
    corrections_by: dict[str, float] = field(
        default_factory=lambda: {"point": 0.7, "scribble": 0.2, "lasso": 0.1}
    )
    zoomed: float = 0.15
    zoom: tuple[float, float] = (1.0, 2.0)
    far: tuple[float, float] = (0.1, 4.0)
    jitter: float = 0.1
    jitter_voxels: int = 5
    damage: int = 3


class Simulator:
    """Draws objects and prompts.

    Args:
        random: draws everything.
        radii: of a click.
        flat: slices are far apart, or there is one: prompts in a slice lie in the first axis' only,
            and what is deep in an object is measured within slices.
    """

    def __init__(
        self,
        random: np.random.Generator,
        radii: Sequence[int],
        flat: bool,
        recipe: Recipe | None = None,
    ) -> None:
        self.random, self.radii, self.flat = random, tuple(radii), flat
        self.recipe = recipe or Recipe()

    def zoom_out(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image (channel, *spatial) and labels of the same axes as a viewer that zooms
        out shows them: smaller, with nothing around."""
        if not self._happens(self.recipe.zoomed):
            return image, labels
        rare, far = self.recipe.far
        factor = far if self._happens(rare) else self.random.uniform(*self.recipe.zoom)
        shape = image.shape[1:]
        first = 1 if self.flat else factor
        size = [max(round(n / f), 1) for n, f in zip(shape, (first, factor, factor), strict=True)]
        small = functional.interpolate(image[None], size=size, mode="trilinear")[0]
        few = functional.interpolate(labels[None].float(), size=size, mode="nearest-exact")[0]
        before = [(n - m) // 2 for n, m in zip(shape, size, strict=True)]
        after = [n - m - x for n, m, x in zip(shape, size, before, strict=True)]
        sides = [x for pair in zip(before[::-1], after[::-1], strict=True) for x in pair]
        return functional.pad(small, sides), functional.pad(few, sides).to(labels.dtype)

    def choose(self, classes: Sequence[Tensor]) -> tuple[Tensor, Tensor, str]:
        """Return an object out of the masks of the classes in a sample, a channel each with a
        prompt for it, and the kind of prompt."""
        there = [mask for mask in classes if mask.any()]
        shape, device = classes[0].shape, classes[0].device
        channels = torch.zeros((CHANNELS, *shape), device=device)
        nothing = torch.zeros(shape, dtype=torch.bool, device=device)
        if not there or self._happens(self.recipe.absent):
            elsewhere = there[self._index(len(there))] if there else ~nothing
            kind = self._of(self.recipe.corrections_by) if there else "point"
            self._prompt(channels, kind, elsewhere, False, self._weighted(elsewhere.float()))
            return nothing, channels, "absent"
        chosen = there[self._index(len(there))]
        if self._happens(self.recipe.component):
            part = self.component(chosen)
            chosen = part if int(part.sum()) >= self.recipe.least_voxels else chosen
        kind = self._of(self.recipe.kinds)
        if kind == "none":
            return torch.stack(there).any(0), channels, kind
        if kind == "mask":
            channels[PREVIOUS] = self._damaged(chosen, there).float()
        else:
            self._prompt(channels, kind, chosen, True)
        return chosen, channels, kind

    def correct(self, channels: Tensor, target: Tensor, predicted: Tensor) -> None:
        """Add what a user would do next to the channels of a sample: a prompt where a prediction is
        most wrong, as in RITM more than half as deep as the deepest error, and the prediction."""
        channels[PREVIOUS] = predicted.float()
        missed, excess = (target == 1) & ~predicted, (target == 0) & predicted
        if not (missed | excess).any():
            return
        kind = self._of(self.recipe.corrections_by)
        depths = depth(missed, self.flat) + depth(excess, self.flat)
        place = self._weighted((depths > depths.max() / 2).float())
        positive = bool(missed[place])
        self._prompt(channels, kind, missed if positive else excess, positive, place)

    def first(self, kind: str, target: Tensor) -> Tensor:
        """Return channels (channel, *spatial) with one prompt of a kind for an object, as exact as
        it can be: a box without jitter, a click at the deepest place. No prompt for no object."""
        channels = torch.zeros((CHANNELS, *target.shape), device=target.device)
        if not (target == 1).any():
            return channels
        if kind == "point":
            drawing.add(channels, drawing.point(deepest(target == 1, self.flat), True, self.radii))
        else:
            start, stop = bounds(target == 1)
            drawing.add(channels, drawing.box(start, stop, True))
        return channels

    def click(self, channels: Tensor, target: Tensor, predicted: Tensor) -> None:
        """Add a click at the deepest place of all errors to the channels, and the prediction."""
        channels[PREVIOUS] = predicted.float()
        missed, excess = (target == 1) & ~predicted, (target == 0) & predicted
        if not (missed | excess).any():
            return
        depths = [depth(mask, self.flat) for mask in (missed, excess)]
        positive = bool(depths[0].max() >= depths[1].max())
        place = np.unravel_index(int(depths[not positive].argmax()), tuple(target.shape))
        drawing.add(channels, drawing.point(list(map(int, place)), positive, self.radii))

    def component(self, mask: Tensor) -> Tensor:
        """Return one 26-connected component of a mask, large ones with more chance."""
        start, stop = bounds(mask)
        inside = mask[_slices(start, stop)].float()
        grown = torch.zeros_like(inside)
        grown[self._weighted(inside)] = 1
        # Flooded step by step, which a GPU does at once for all voxels.
        while True:
            before = grown.sum()
            for _ in range(8):
                grown = _pool(grown, 1) * inside
            if grown.sum() == before:
                break
        found = torch.zeros_like(mask)
        found[_slices(start, stop)] = grown > 0
        return found

    def sample(self, mask: Tensor) -> tuple[int, ...]:
        """Return a voxel of a mask, with a chance that grows with the square of its depth."""
        start, stop = _grown(*bounds(mask), mask.shape)
        inside = depth(mask[_slices(start, stop)], self.flat) ** 2
        return tuple(x + y for x, y in zip(start, self._weighted(inside), strict=True))

    def _prompt(
        self,
        channels: Tensor,
        kind: str,
        mask: Tensor,
        positive: bool,
        place: tuple[int, ...] | None = None,
    ) -> None:
        """Draw a prompt of a kind for a mask, in the slice of a place if there is one."""
        drawing.add(channels, self._drawn(kind, mask, positive, place))

    def _drawn(
        self, kind: str, mask: Tensor, positive: bool, place: tuple[int, ...] | None
    ) -> Prompt:
        if kind == "point":
            return drawing.point(place or self.sample(mask), positive, self.radii)
        if kind == "box":
            return self._box(mask, positive)
        axis = 0 if self.flat else self._index(3)
        index = place[axis] if place else self._slice(mask, axis)
        start = [0, 0, 0]
        start[axis] = index
        plane = mask.narrow(axis, index, 1)
        if kind == "flat box":
            return self._box(plane, positive, start, axis)
        if kind == "lasso":
            return drawing.drawn(kind, self._loosened(plane, axis), positive, start)
        return drawing.drawn(kind, self._scribble(plane, axis), positive, start)

    def _box(
        self, mask: Tensor, positive: bool, offset: Sequence[int] = (0, 0, 0), fixed: int = -1
    ) -> Prompt:
        low, high = (list(x) for x in bounds(mask))
        for axis, size in enumerate(mask.shape):
            if axis == fixed or size == 1:
                continue
            length = high[axis] - low[axis]
            most = min(self.recipe.jitter_voxels, self.recipe.jitter * length)
            change = np.rint(self.random.uniform(-most, most, 2)).astype(int)
            low[axis] = max(low[axis] + int(change[0]), 0)
            high[axis] = max(min(high[axis] + int(change[1]), size), low[axis] + 1)
        start = [x + o for x, o in zip(low, offset, strict=True)]
        stop = [x + o for x, o in zip(high, offset, strict=True)]
        return drawing.box(start, stop, positive)

    def _slice(self, mask: Tensor, axis: int) -> int:
        others = [other for other in range(3) if other != axis]
        return self._weighted(mask.sum(dim=others).float())[0]

    def _loosened(self, plane: Tensor, axis: int) -> Tensor:
        """Return a mask of one slice as a hand outlines it: a little larger."""
        return _pool(plane.float(), self._index(self.recipe.damage), axis)

    def _scribble(self, plane: Tensor, axis: int) -> Tensor:
        """Return a line through three places of a mask of one slice, two or three voxels wide."""
        line = torch.zeros_like(plane, dtype=torch.float32)
        weights = depth(plane, True, axis)
        places = np.array([self._weighted(weights) for _ in range(3)])
        for one, other in pairwise(places):
            steps = int(np.abs(other - one).max()) + 1
            voxels = np.rint(np.linspace(one, other, steps)).astype(int)
            line[tuple(torch.from_numpy(voxels.T).to(plane.device))] = 1
        wide = _pool(line, 1, axis)
        # Lines leave a bent object between two places, hands do not.
        return wide * _pool(plane.float(), 1, axis)

    def _damaged(self, mask: Tensor, classes: Sequence[Tensor]) -> Tensor:
        """Return what an automatic segmentation could have made of an object."""
        steps = self._index(self.recipe.damage) + 1
        how = self._index(5)
        if how == 0:
            return _pool(mask.float(), steps, 0 if self.flat else None) > 0
        if how == 1:
            return depth(mask, self.flat) > steps
        if how == 2:
            moves = self.random.integers(-steps, steps + 1, 3).tolist()
            moves = [0, *moves[1:]] if self.flat else moves
            return torch.roll(mask, moves, (0, 1, 2))
        if how == 3:
            # Half of it, as where a patch ends.
            axis = 1 + self._index(2) if self.flat else self._index(3)
            middle = self._slice(mask, axis)
            kept = torch.arange(mask.shape[axis], device=mask.device) < middle
            kept = kept ^ self._happens(0.5)
            return mask & kept.reshape([-1 if x == axis else 1 for x in range(3)])
        return mask | classes[self._index(len(classes))]

    def _happens(self, chance: float) -> bool:
        return bool(self.random.random() < chance)

    def _index(self, count: int) -> int:
        return int(self.random.integers(count))

    def _of(self, chances: dict[str, float]) -> str:
        names, weights = list(chances), np.array(list(chances.values()))
        return names[int(self.random.choice(len(names), p=weights / weights.sum()))]

    def _weighted(self, weights: Tensor) -> tuple[int, ...]:
        """Return the index of one weight, drawn by the weights."""
        sums = weights.flatten().cumsum(0)
        drawn = torch.searchsorted(sums, sums[-1] * self.random.random(), right=True)
        index = int(drawn.clamp(max=sums.numel() - 1))
        if weights.flatten()[index] == 0:  # by rounding
            index = int(weights.argmax())
        return tuple(int(x) for x in np.unravel_index(index, tuple(weights.shape)))


def bounds(mask: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first voxel of the box around a mask, which is not empty, and where it ends."""
    low, high = [], []
    for axis in range(mask.ndim):
        there = mask.any(dim=tuple(x for x in range(mask.ndim) if x != axis)).nonzero()
        low.append(int(there[0]))
        high.append(int(there[-1]) + 1)
    return tuple(low), tuple(high)


def depth(mask: Tensor, flat: bool, axis: int = 0) -> Tensor:
    """Return how many voxels each voxel of a mask (three axes) is from its rim, 0 outside of it;
    what is outside of the image is no rim. ``flat``: within slices across ``axis``."""
    inside = mask.float()
    total = inside.clone()
    for _ in range(max(mask.shape)):
        inside = 1 - _pool(1 - inside, 1, axis if flat else None)
        if not inside.any():
            break
        total += inside
    return total


def deepest(mask: Tensor, flat: bool) -> list[int]:
    """Return the voxel of a mask that is farthest from its rim."""
    place = np.unravel_index(int(depth(mask, flat).argmax()), tuple(mask.shape))
    return [int(x) for x in place]


def _pool(values: Tensor, steps: int, across: int | None = None) -> Tensor:
    """Return the maximum of every voxel's neighbours up to some steps away, within slices across an
    axis if one is named."""
    if not steps:
        return values
    reach = [0 if axis == across else steps for axis in range(3)]
    size = [2 * x + 1 for x in reach]
    return functional.max_pool3d(values[None, None], size, 1, reach)[0, 0]


def _slices(start: Sequence[int], stop: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(x, y) for x, y in zip(start, stop, strict=True))


def _grown(
    start: Sequence[int], stop: Sequence[int], shape: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return a box that is a voxel larger on every side, within an image."""
    low = [max(x - 1, 0) for x in start]
    return low, [min(x + 1, size) for x, size in zip(stop, shape, strict=True)]
