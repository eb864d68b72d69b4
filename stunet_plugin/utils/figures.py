"""Figures as PNG: overlays of segmentations, and what all figures share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def save_overlays(cases: Sequence[OverlayCase], class_names: dict[int, str], path: Path) -> None:
    """Write a PNG with one row per case: image, reference, prediction, on the slice that shows most
    classes.

    Args:
        cases: at least one.
        class_names: label value to name, background left out.
        path: of the PNG.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = distinct_colours(len(class_names))
    values = sorted(class_names)
    figure = new_figure(9, 2.7 * len(cases) + 0.6)
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
            # Positions in the list of classes, as values may have gaps; background transparent.
            positions = np.searchsorted(values, labels).astype(float)
            positions[~np.isin(labels, values)] = np.nan
            axis.imshow(
                positions,
                cmap=ListedColormap(colours),
                vmin=-0.5,
                vmax=len(values) - 0.5,
                alpha=0.55,
                aspect=aspect,
                interpolation="nearest",
            )
            axis.set_title(title, fontsize=9)
    patches = [
        Patch(color=colour, label=class_names[value])
        for value, colour in zip(values[:20], colours, strict=False)
    ]
    columns = min(6, len(patches))
    figure.legend(
        handles=patches, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=130)


def _best_slice(case: OverlayCase, values: Sequence[int]) -> int:
    """Index of the slice with most classes, and of those with most labelled voxels."""
    scores = [
        (len(np.intersect1d(labels, values)), int((labels > 0).sum() + (predicted > 0).sum()))
        for labels, predicted in zip(case.reference, case.prediction, strict=True)
    ]
    return max(range(len(scores)), key=scores.__getitem__)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure (in inches) that no window is opened for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def distinct_colours(count: int) -> list[tuple[float, float, float]]:
    """Well separated colours that stand out from gray."""
    from matplotlib.colors import hsv_to_rgb

    golden_ratio = 0.618034
    hues = ((0.02 + index * golden_ratio) % 1 for index in range(max(count, 1)))
    return [tuple(hsv_to_rgb((hue, 0.85, 1.0))) for hue in hues]


def plain_style() -> AbstractContextManager[Any]:
    """matplotlib's own style: nnU-Net's progress plot leaves letters of a poster's size behind."""
    from matplotlib import style

    context: AbstractContextManager[Any] = style.context("default")
    return context


def save_atomically(figure: Figure, path: Path) -> None:
    """Write a figure so that whoever looks at it while a training runs never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, path)
