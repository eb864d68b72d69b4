"""Prompts for training SAM-Med2D, drawn from masks and from what a network got wrong.

Source: the published code (github.com/OpenGVLab/SAM-Med2D), read for facts. Deviations: a box is
that of the whole target, and each of its sides moves by itself (published: the largest part's,
moved as a whole); half of the targets are one connected part of a class, as users often mean.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from stunet_plugin.networks.sammed2d import NEGATIVE, NO_POINT, POSITIVE, Prompts

IGNORED = -1
"""Value in a target of pixels that count for nothing; the object is 1."""
CORRECTIONS = (1, 3, 5, 9)
"""Numbers of points that a correction may have."""
MOST_JITTER = 5
"""Pixels by which a side of a box moves at most, and half of the shorter side."""
PART_SHARE = 0.5
"""Of the targets, those that are one connected part of a class."""
LEAST_PIXELS = 10
"""Of such a part."""


def draw_targets(classes: Tensor, known: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """Return ``count`` objects of each image, drawn with replacement.

    Args:
        classes: (B, classes, H, W), one mask per class or region.
        known: (B, 1, H, W), False where the label is ignored.

    Returns:
        (B * count, 1, H, W): 1 object, 0 the rest, IGNORED. Nothing is 1 where an image is empty.
    """
    there = classes.flatten(2).any(2).cpu().numpy()
    targets = []
    for image, present in enumerate(there):
        names = np.flatnonzero(present)
        for _ in range(count):
            mask = torch.zeros_like(known[0, 0])
            if names.size:
                mask = classes[image, int(random.choice(names))]
                if random.random() < PART_SHARE:
                    mask = _one_part(mask, random)
            targets.append(torch.where(known[image, 0], mask.long(), IGNORED))
    return torch.stack(targets)[:, None]


def _one_part(mask: Tensor, random: np.random.Generator) -> Tensor:
    """Return a connected part of a mask (8 neighbours); all of it where the parts are specks."""
    parts, _ = ndimage.label(mask.cpu().numpy(), np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    if not (large := np.flatnonzero(sizes >= LEAST_PIXELS)).size:
        return mask
    return torch.from_numpy(parts == 1 + int(random.choice(large))).to(mask.device)


def boxes_of(targets: Tensor) -> Tensor:
    """Return the bounding boxes (N, 4) of objects that are there: x0, y0, and where they end."""
    objects = targets[:, 0] == 1
    ends = []
    for axis in (1, 2):
        # Along x, then along y.
        hit = objects.any(axis).int()
        first, last = hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)
        ends.append((first, last))
    (x0, x1), (y0, y1) = ends
    return torch.stack((x0, y0, x1, y1), 1).float()


def first_prompts(targets: Tensor, random: np.random.Generator) -> Prompts:
    """Return a box for each target, or a point in it, by one coin for all; points where a target is
    empty, on what is not an object."""
    empty = not bool((targets == 1).flatten(1).any(1).all())
    if empty or random.random() < 0.5:
        found = (targets == 1).flatten(1).any(1)
        allowed = torch.where(found[:, None, None, None], targets == 1, targets == 0)
        labels = torch.where(found, POSITIVE, NEGATIVE)[:, None]
        return Prompts(points=_draw(allowed, 1), labels=labels)
    boxes = boxes_of(targets)
    shorter = torch.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    most = (shorter / 2).floor().clamp(max=MOST_JITTER)[:, None]
    return Prompts(boxes=boxes + ((torch.rand_like(boxes) * 2 - 1) * most).floor())


def corrections(
    found: Tensor, targets: Tensor, random: np.random.Generator, count: int | None = None
) -> Prompts:
    """Return points in what is wrong with masks (N, 1, H, W): positive where something is missed,
    negative where it is too much, "no point" where nothing is wrong. ``count``: of points, drawn if
    not given."""
    wrong = (found != (targets == 1)) & (targets != IGNORED)
    any_wrong = wrong.flatten(1).any(1)[:, None]
    count = count or int(random.choice(CORRECTIONS))
    points = _draw(torch.where(any_wrong[..., None, None], wrong, True), count)
    x, y = points.long().unbind(2)
    missed = targets[torch.arange(len(points), device=points.device)[:, None], 0, y, x] == 1
    labels = torch.where(missed, POSITIVE, NEGATIVE)
    return Prompts(points=points, labels=torch.where(any_wrong, labels, NO_POINT))


def _draw(allowed: Tensor, count: int) -> Tensor:
    """Return pixels (N, count, 2) as x, y, drawn with replacement from masks (N, 1, H, W)."""
    # A target that is ignored as a whole leaves nothing to draw from.
    flat = allowed.flatten(1).float()
    flat = torch.where(flat.any(1, keepdim=True), flat, 1.0)
    index = torch.multinomial(flat, count, replacement=True)
    width = allowed.shape[-1]
    return torch.stack((index % width, index // width), 2).float()
