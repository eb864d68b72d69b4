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
    """One row of an overlay: arrays with axes (z, y, x) of the same shape, and the spacing in
    mm."""

    name: str
    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    spacing: Sequence[float]


def save_overlays(cases: Sequence[OverlayCase], class_names: dict[int, str], path: Path) -> None:
    """Write a PNG with one row per case: image, reference, prediction, on the slice that shows most
    classes.

    Args:
        cases: rows, at least one.
        class_names: label value to name, background left out.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = distinct_colours(len(class_names))
    values = sorted(class_names)
    figure = Figure(figsize=(9, 2.7 * len(cases) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 3, squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        index = _most_telling_slice(case, values)
        low, high = _gray_window(case)
        aspect = case.spacing[1] / case.spacing[2]
        for axis, title, labels in zip(
            row,
            ("image", "reference", "prediction"),
            (None, case.reference, case.prediction),
            strict=True,
        ):
            axis.imshow(case.image[index], cmap="gray", vmin=low, vmax=high, aspect=aspect)
            if labels is not None:
                # Position in the list of classes, background transparent; label values may have
                # gaps.
                positions = np.searchsorted(values, labels[index]).astype(float)
                positions[~np.isin(labels[index], values)] = np.nan
                axis.imshow(
                    positions,
                    cmap=ListedColormap(colours),
                    vmin=-0.5,
                    vmax=len(values) - 0.5,
                    alpha=0.55,
                    aspect=aspect,
                    interpolation="nearest",
                )
            axis.set_title(
                f"{case.name}: {title}, slice {index}" if title == "image" else title, fontsize=9
            )
            axis.set_axis_off()
    patches = [
        Patch(color=colour, label=class_names[value])
        for value, colour in zip(values, colours, strict=True)
    ]
    figure.legend(
        handles=patches[:20],
        loc="outside lower center",
        ncols=min(6, len(patches)),
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=130)


def _most_telling_slice(case: OverlayCase, values: Sequence[int]) -> int:
    """Index of the slice with most classes, and of those with most labelled voxels."""
    scores = [
        (len(np.intersect1d(labels, values)), int((labels > 0).sum() + (predicted > 0).sum()))
        for labels, predicted in zip(case.reference, case.prediction, strict=True)
    ]
    return max(range(len(scores)), key=scores.__getitem__)


def _gray_window(case: OverlayCase) -> tuple[float, float]:
    """Gray values from which to which to show: around those of the labelled voxels, so that air
    does not take it all."""
    labelled = case.image[case.reference > 0]
    low, high = np.percentile(labelled if labelled.size else case.image, [1, 99])
    return float(low - (high - low)), float(high)


def distinct_colours(count: int) -> list[tuple[float, float, float]]:
    """Well separated colours that stand out from gray."""
    from matplotlib.colors import hsv_to_rgb

    golden_ratio = 0.618034
    return [
        tuple(hsv_to_rgb(((0.02 + index * golden_ratio) % 1, 0.85, 1.0)))
        for index in range(max(count, 1))
    ]


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
