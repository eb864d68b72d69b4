"""Evaluation of SAM-Med2D: Dice by an exact box, and after 1, 3 and 5 simulated points.

As published, a mask is one object in one slice, and means are over masks. Deviation: points lie
deepest in the largest error instead of at random, so that a number can be had again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from stunet_plugin.sam.prompts import LEAST_PIXELS, boxes_of
from stunet_plugin.sam.slice_session import SliceSession, middle_of

POINTS = (1, 3, 5)
STEPS = ("box", *(f"{count} point{'s' if count > 1 else ''}" for count in POINTS))
MOST_SLICES = 10
"""Of a class in a case, evenly spread over those that show it."""


def chosen_slices(masks: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Return which objects (depth, height, width) are scored in which slices."""
    chosen: dict[int, list[str]] = {}
    for name, mask in masks.items():
        shown = np.flatnonzero((mask.flatten(1).sum(1) >= LEAST_PIXELS).numpy())
        picked = np.unique(np.linspace(0, len(shown) - 1, min(len(shown), MOST_SLICES)).astype(int))
        for index in shown[picked]:
            chosen.setdefault(int(index), []).append(name)
    return dict(sorted(chosen.items()))


def measure_case(
    network: Any, images: Tensor, masks: Mapping[str, Tensor], device: torch.device, case: str
) -> Iterator[dict[str, Any]]:
    """Yield the Dice of each scored mask.

    Args:
        images: (depth, channels, height, width), 0 to 255.
        masks: of each class, (depth, height, width).
    """
    for index, names in chosen_slices(masks).items():
        session = SliceSession(network, images[index], device)
        for name in names:
            dice = measure_object(session, masks[name][index])
            yield {"case": case, "slice": index, "class": name, "dice": dice}


def measure_object(session: SliceSession, target: Tensor) -> dict[str, float]:
    """Return the Dice of an object in a slice by the prompts so far."""
    session.reset()
    x0, y0, x1, y1 = boxes_of(target[None, None].long())[0].tolist()
    dice = {"box": dice_of(session.box((x0, y0), (x1, y1)), target)}
    session.reset()
    for count in range(1, max(POINTS) + 1):
        error, positive = largest_error(session.object.mask, target)
        if bool(error.any()):
            x, y = middle_of(error)
            session.point((x, y), positive)
        if count in POINTS:
            dice[STEPS[1 + POINTS.index(count)]] = dice_of(session.object.mask, target)
    return dice


def largest_error(found: Tensor, target: Tensor) -> tuple[Tensor, bool]:
    """Return the largest connected part of what is wrong, empty where nothing is, and whether it is
    missed."""
    best, positive = torch.zeros_like(target, dtype=torch.bool), True
    for missed, error in ((True, target.bool() & ~found), (False, found & ~target.bool())):
        parts, count = ndimage.label(error.numpy(), np.ones((3, 3)))
        if count and (sizes := np.bincount(parts.ravel())[1:]).max() > int(best.sum()):
            best, positive = torch.from_numpy(parts == 1 + sizes.argmax()), missed
    return best, positive


def dice_of(found: Tensor, target: Tensor) -> float:
    both = int(found.sum()) + int(target.sum())
    return 2 * int((found & target.bool()).sum()) / both if both else 1.0


def summarise(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean Dice over masks, of all and of each class."""
    names = sorted({str(one["class"]) for one in objects})
    classes = {name: _mean([x for x in objects if x["class"] == name]) for name in names}
    return {"mean": _mean(objects), "classes": classes, "objects": list(objects)}


def _mean(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    dice = {step: float(np.mean([x["dice"][step] for x in objects])) for step in STEPS}
    return {"masks": len(objects), "dice": dice}
