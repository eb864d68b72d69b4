"""Preview of a segmentation: three planes and a legend, as a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from stunet_plugin.segmentation.segmenter import Segmentation
from stunet_plugin.utils.figures import distinct_colours, saved_figure

NAMED = 24
"""Structures in the legend, the largest first."""
ENOUGH = 2_000_000
"""Voxels that tell the range of grey values."""


def save_preview(found: Segmentation, path: Path) -> None:
    """Write the plane of each axis that shows most of what was found, with the labels over it; of a
    picture, all."""
    from matplotlib.patches import Patch

    found, titles = _upright(found)
    colours = dict(zip(found.names, distinct_colours(len(found.names)), strict=True))
    palette = np.zeros((max(found.names) + 1, 4))
    for value, colour in colours.items():
        palette[value] = (*colour, 0.5)
    spacing = found.spacing or (1.0, 1.0, 1.0)
    every = max(1, round((found.image.size / ENOUGH) ** (1 / 3)))
    low, high = np.percentile(found.image[::every, ::every, ::every], [2, 99.5])
    axes = range(3) if found.labels.shape[0] > 1 else range(1)
    with saved_figure(path, 11, 4.8) as figure:
        for axis, plot in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
            others = tuple(other for other in range(3) if other != axis)
            counts = (found.labels > 0).sum(axis=others)
            index = int(counts.argmax()) if counts.any() else found.labels.shape[axis] // 2
            image, labels = (x.take(index, axis) for x in (found.image, found.labels))
            aspect = spacing[others[0]] / spacing[others[1]]
            plot.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect)
            plot.imshow(palette[labels], aspect=aspect, interpolation="nearest")
            plot.set_title(titles[axis], fontsize=9)
            plot.set_axis_off()
        planes = [np.bincount(x.ravel(), minlength=len(palette)) for x in found.labels]
        sizes = np.sum(planes, axis=0)
        named = sorted(found.names, key=lambda value: -sizes[value])
        shown = [value for value in named if sizes[value]][:NAMED]
        if shown:
            patches = [Patch(color=colours[value], label=found.names[value]) for value in shown]
            where = {"loc": "outside lower center", "ncols": min(6, len(shown))}
            figure.legend(handles=patches, fontsize=7, frameon=False, **where)
        else:
            figure.suptitle("Nothing was found", color="red")


def _upright(found: Segmentation) -> tuple[Segmentation, tuple[str, ...]]:
    """Turn a volume as radiologists look at it (head and front up, the patient's right on the
    left), where its orientation is known; return it with the titles of the planes."""
    nibabel, itk = (found.properties.get(f"{name}_stuff", {}) for name in ("nibabel", "sitk"))
    affine = nibabel.get("reoriented_affine", nibabel.get("original_affine"))
    if len(itk.get("direction", ())) == 9:
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        affine[:3, :3] @= np.reshape(itk["direction"], (3, 3))
    if affine is None:
        return found, ("axis z", "axis y", "axis x")
    change = ornt_transform(io_orientation(affine), axcodes2ornt("LPI"))
    return found.turned(change), ("axial", "coronal", "sagittal")
