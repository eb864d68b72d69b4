"""Interaction curve: Dice of held-out objects with a box, and click after click in the middle of
the largest error, beside what automatic models reached on the same cases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from stunet_plugin.prompts import channels as drawing
from stunet_plugin.prompts.interaction import Interaction
from stunet_plugin.prompts.simulation import bounds
from stunet_plugin.utils.figures import distinct_colours, saved_figure

CLICKS = (1, 2, 3, 5, 10)
"""After which the Dice is noted."""
ENOUGH = 0.9
"""The Dice that clicks are counted to."""
MOST_CASES = 50
"""Cases take their time: a forward pass or more for each click and object."""


def spread(cases: Sequence[str]) -> list[str]:
    """Return the cases to measure, at equal distances in the list if there are too many."""
    if len(cases) <= MOST_CASES:
        return list(cases)
    return [cases[int(x)] for x in np.linspace(0, len(cases) - 1, MOST_CASES)]


def measure_case(
    network: nn.Module,
    image: Tensor,
    masks: Mapping[str, Tensor],
    configuration: ConfigurationManager,
    radii: Sequence[int],
    device: torch.device,
    case: str,
) -> list[dict[str, Any]]:
    """Return the Dice of each object in a preprocessed case (channel, three axes) by the prompts so
    far; absent objects are left out."""
    found = []
    spacing = [float(x) for x in configuration.spacing]
    for name, mask in masks.items():
        if not bool(mask.any()):
            continue
        new = (network, image, configuration.patch_size, device)
        nothing, boxed, clicked = Interaction(*new), Interaction(*new), Interaction(*new)
        nothing.segment_without_prompts()
        boxed.add(drawing.box(*bounds(mask), True))
        dice = {"no prompt": _dice(nothing.mask, mask), "box": _dice(boxed.mask, mask)}
        enough: int | None = None
        for click in range(1, max(CLICKS) + 1):
            place, positive = middle_of_largest_error(mask, clicked.mask, spacing)
            if place is not None:
                clicked.add(drawing.point(place, positive, radii))
            value = _dice(clicked.mask, mask)
            enough = click if enough is None and value >= ENOUGH else enough
            if click in CLICKS:
                dice[_step(click)] = value
        found.append({"case": case, "class": name, "dice": dice, "clicks_to_enough": enough})
    return found


def middle_of_largest_error(
    target: Tensor, found: Tensor, spacing: Sequence[float]
) -> tuple[list[int] | None, bool]:
    """Return the voxel deepest inside what is missed or too much, and whether it is missed; None
    where nothing is wrong. ``spacing``: of the axes, the first missing for a 2D network."""
    wrong = target != found
    if not bool(wrong.any()):
        return None, True
    low, high = bounds(wrong)
    part = tuple(slice(x, y) for x, y in zip(low, high, strict=True))
    steps = [1e3 * max(spacing)] * (3 - len(spacing)) + list(spacing)
    best: tuple[float, Any, bool] = (0.0, None, True)
    for positive, error in ((True, target & ~found), (False, found & ~target)):
        # Deep inside the error: what is outside of the image is another side of its border.
        depth = distance_transform_edt(np.pad(error[part].numpy(), 1), sampling=steps)
        depth = depth[1:-1, 1:-1, 1:-1]
        if depth.max() > best[0]:
            best = float(depth.max()), np.unravel_index(depth.argmax(), depth.shape), positive
    return [int(x) + y for x, y in zip(best[1], low, strict=True)], best[2]


def summarise(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over objects, over all and for each class."""
    names = sorted({str(one["class"]) for one in objects})
    classes = {name: _mean([x for x in objects if x["class"] == name]) for name in names}
    settings = {"enough_dice": ENOUGH, "most_clicks": max(CLICKS), "most_cases": MOST_CASES}
    return {**settings, "mean": _mean(objects), "classes": classes, "objects": list(objects)}


def _mean(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = list(objects[0]["dice"]) if objects else []
    counted = [x["clicks_to_enough"] for x in objects if x["clicks_to_enough"] is not None]
    return {
        "objects": len(objects),
        "dice": {step: float(np.mean([x["dice"][step] for x in objects])) for step in steps},
        "reach_enough": len(counted) / len(objects) if objects else 0.0,
        "mean_clicks_to_enough": float(np.mean(counted)) if counted else None,
    }


def automatic_models(fold: Path, labels: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the validation Dice by class of models without prompts of the same plan and fold,
    beside this one in nnUNet_results."""
    _, plans, configuration = fold.parent.name.split("__")
    found = {}
    for file in sorted(fold.parent.parent.glob(f"*__{plans}__{configuration}/{fold.name}")):
        try:
            mean = json.loads((file / "validation" / "summary.json").read_text())["mean"]
            dice = {name: float(mean[_key(label)]["Dice"]) for name, label in _named(labels)}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not validated, or other classes
        found[file.parent.name.partition("__")[0]] = dice
    return found


def _named(labels: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(x, y) for x, y in labels.items() if x not in ("background", "ignore")]


def _key(label: Any) -> str:
    # As nnU-Net writes regions into summary.json.
    return str(tuple(label)) if isinstance(label, (list, tuple)) else str(label)


def save_curve(found: Mapping[str, Any], path: Path) -> None:
    """Draw Dice over clicks, a line for each class; automatic models as dashed lines."""
    with saved_figure(path, 7, 4.5) as figure:
        plot = figure.subplots()
        colours = distinct_colours(len(found["classes"]))
        for (name, values), colour in zip(found["classes"].items(), colours, strict=True):
            dice = values["dice"]
            steps = [("0", "no prompt"), *((str(x), _step(x)) for x in CLICKS)]
            plot.plot(
                [int(x) for x, _ in steps],
                [dice[step] for _, step in steps],
                marker="o",
                color=colour,
                label=name,
            )
            plot.plot([0], [dice["box"]], marker="s", color=colour, linestyle="none")
            for automatic in found["automatic"].values():
                plot.axhline(automatic[name], color=colour, linestyle="--", linewidth=0.8)
        plot.set_xlabel("clicks (square: a box alone; dashed: automatic models)")
        plot.set_ylabel("mean Dice of held-out objects")
        plot.set_ylim(0, 1)
        plot.grid(alpha=0.3)
        plot.legend(fontsize=8)


def _step(clicks: int) -> str:
    return f"{clicks} click{'s' if clicks > 1 else ''}"


def _dice(found: Tensor, target: Tensor) -> float:
    both = int(found.sum()) + int(target.sum())
    return 2 * int((found & target).sum()) / both if both else 1.0
