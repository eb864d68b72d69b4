"""Figures as PNG: overlays of segmentations, and what all figures share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class OverlayCase:
    """One row of an overlay: arrays with axes (z, y, x) of the same shape; the spacing in mm."""

    name: str
    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    spacing: Sequence[float]


@contextmanager
def saved_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure (in inches) and write it as a PNG, whole or not at all: whoever looks at it
    while a training runs never sees half of it."""
    from matplotlib import style
    from matplotlib.figure import Figure

    partial = path.with_name(f".{path.name}.partial")
    # nnU-Net's progress plot leaves letters of a poster's size behind.
    with style.context("default"):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, path)


def save_overlays(cases: Sequence[OverlayCase], class_names: dict[int, str], path: Path) -> None:
    """Write a PNG with one row per case (at least one): image, reference, prediction, on the slice
    that shows most classes. ``class_names`` is label value to name, without the background; other
    values are not shown."""
    from matplotlib.patches import Patch

    values = sorted(class_names)
    colours = dict(zip(values, distinct_colours(len(values)), strict=True))
    palette = np.zeros((2**16, 4))  # segmentations have 16 bits at most
    palette[values] = [(*colours[value], 0.55) for value in values]
    with saved_figure(path, 9, 2.7 * len(cases) + 0.6) as figure:
        for row, case in zip(figure.subplots(len(cases), 3, squeeze=False), cases, strict=True):
            index = _best_slice(case, values)
            labelled = case.image[case.reference > 0]
            low, high = np.percentile(labelled if labelled.size else case.image, [1, 99])
            low -= high - low  # around the labelled voxels, so that air does not take all grays
            aspect = case.spacing[1] / case.spacing[2]
            for axis in row:
                axis.imshow(case.image[index], cmap="gray", vmin=low, vmax=high, aspect=aspect)
                axis.set_axis_off()
            row[0].set_title(f"{case.name}: image, slice {index}", fontsize=9)
            for axis, title in zip(row[1:], ("reference", "prediction"), strict=True):
                labels = getattr(case, title)[index]
                axis.imshow(palette[labels], aspect=aspect, interpolation="nearest")
                axis.set_title(title, fontsize=9)
        patches = [Patch(color=colours[value], label=class_names[value]) for value in values[:20]]
        where = {"loc": "outside lower center", "ncols": min(6, len(patches))}
        figure.legend(handles=patches, fontsize=8, frameon=False, **where)


def _best_slice(case: OverlayCase, values: Sequence[int]) -> int:
    """Index of the slice with most classes, and of those with most labelled voxels."""
    scores = [
        (len(np.intersect1d(labels, values)), int((labels > 0).sum() + (predicted > 0).sum()))
        for labels, predicted in zip(case.reference, case.prediction, strict=True)
    ]
    return max(range(len(scores)), key=scores.__getitem__)


def distinct_colours(count: int) -> list[tuple[float, float, float]]:
    """Well separated colours that stand out from gray."""
    from matplotlib.colors import hsv_to_rgb

    golden_ratio = 0.618034
    return [tuple(hsv_to_rgb(((0.02 + x * golden_ratio) % 1, 0.85, 1.0))) for x in range(count)]
