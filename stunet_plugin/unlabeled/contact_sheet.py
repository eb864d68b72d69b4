"""A picture of some cases with the outline of the body, for a look at what became of a folder of
scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.unlabeled.checks import CT

CT_WINDOW = (-1000.0, 400.0)
MR_PERCENTILES = (0.5, 99.5)
PLANES = ("axes y, x", "axes z, x", "axes z, y")
INCHES = 2.6


@dataclass(frozen=True)
class SheetCase:
    """One row: a case and its files."""

    name: str
    image: Path
    label: Path


def save_contact_sheet(cases: Sequence[SheetCase], modality: str, path: Path) -> str:
    """Write a PNG with a row per case: the middle slices along each axis, in storage order, with
    the outline of the body.

    Args:
        cases: at least one.
        modality: ``CT`` or ``MR``, for the gray values.
        path: of the PNG.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * INCHES, len(cases) * INCHES), layout="constrained")
    FigureCanvasAgg(figure)
    for row, case in zip(figure.subplots(len(cases), 3, squeeze=False), cases, strict=True):
        _draw(row, case, modality)
    figure.savefig(path, dpi=90)
    return str(path)


def _draw(row: Sequence[Any], case: SheetCase, modality: str) -> None:
    image, label = (sitk.ReadImage(str(file)) for file in (case.image, case.label))
    array, mask = sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(label)
    low, high = CT_WINDOW if modality == CT else np.percentile(array, MR_PERCENTILES)
    spacing = image.GetSpacing()[::-1]
    for axis, (plot, plane) in enumerate(zip(row, PLANES, strict=True)):
        middle = array.shape[axis] // 2
        vertical, horizontal = (spacing[other] for other in range(3) if other != axis)
        outline = np.take(mask, middle, axis=axis)
        plot.imshow(
            np.take(array, middle, axis=axis),
            cmap="gray",
            vmin=low,
            vmax=high,
            aspect=vertical / horizontal,
        )
        if outline.min() != outline.max():
            plot.contour(outline, levels=[0.5], colors="red", linewidths=0.8)
        title = f"{case.name}: body {mask.mean():.0%}" if axis == 0 else f"{plane}, slice {middle}"
        plot.set_title(title, fontsize=7)
        plot.set_axis_off()
