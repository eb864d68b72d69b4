"""Mask of the body (foreground) of a scan, for nnU-Net's intensity statistics and patches.

1. Means over blocks of about 3 mm: fewer voxels, less noise.
2. A threshold: -350 HU for CT; for MR Otsu's on the square roots, because bright fat would
   otherwise push dark muscle and liver to the side of the air.
3. CT: an opening in the axial slices takes the table away, a dilation gives the skin back.
4. Components of at least a quarter of the largest: two legs are a body, a bottle is none.
5. Holes filled in axial slices: in 3D, airways connect the lungs with the outside.
6. Back to voxels: inner blocks as a whole, those on the surface by the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from stunet_plugin.unlabeled.checks import CT

WORKING_SPACING = 3.0
"""Millimetres; blocks are as many whole voxels as fit."""
CT_THRESHOLD = -350.0
"""Hounsfield units, between fat (-100) and blankets and lung (-600 and less)."""
OPENING_RADIUS = 6.0
"""Millimetres."""
COMPONENT_SHARE = 0.25
AIR_TO_TISSUE = 0.3
"""An MR whose dark voxels are on average brighter than this share of its bright ones shows no air:
a crop within the body."""
MINIMUM_SHARE = 0.005
"""Of all voxels; less is no body."""


def body_mask(
    array: np.ndarray, spacing: Sequence[float], axial: int, modality: str
) -> np.ndarray | None:
    """Return the body as uint8 of 0 and 1, or None if there is none.

    Args:
        array: intensities (z, y, x) in storage order; CT in Hounsfield units.
        spacing: mm, on the same axes.
        axial: the axis from foot to head.
        modality: ``CT`` or ``MR``.
    """
    factors = [
        max(1, min(int(WORKING_SPACING / step), size))
        for step, size in zip(spacing, array.shape, strict=True)
    ]
    means = block_means(array, factors)
    threshold = CT_THRESHOLD if modality == CT else mr_threshold(means)
    if threshold is None:
        return np.ones(array.shape, dtype=np.uint8)
    tissue = means > threshold
    body = tissue
    if modality == CT:
        steps = [step * factor for step, factor in zip(spacing, factors, strict=True)]
        body = _without_table(tissue, steps, axial)
    body = _fill_slices(_large_components(body), axial)
    if body.mean() < MINIMUM_SHARE:
        return None
    return _to_voxels(body, array, factors, threshold)


def block_means(array: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Return the means over blocks of voxels, float32; the last block of an axis may be smaller."""
    starts = [np.arange(0, size, factor) for size, factor in zip(array.shape, factors, strict=True)]
    means = np.empty([len(start) for start in starts], dtype=np.float32)
    rows, columns = (
        np.diff(start, append=size) for start, size in zip(starts[1:], array.shape[1:], strict=True)
    )
    area = np.outer(rows, columns).astype(np.float32)
    for index, start in enumerate(starts[0]):
        slab = array[start : start + factors[0]].mean(axis=0, dtype=np.float32)
        means[index] = (
            np.add.reduceat(np.add.reduceat(slab, starts[1], axis=0), starts[2], axis=1) / area
        )
    return means


def mr_threshold(means: np.ndarray) -> float | None:
    """Return the intensity between air and tissue, or None if there is no air in the image."""
    low, high = (float(value) for value in np.percentile(means, [0.1, 99.5]))
    if high <= low:
        return None
    compressed = np.sqrt(np.clip((means - low) / (high - low), 0, 1))
    split = float(threshold_otsu(compressed))
    dark, bright = means[compressed <= split], means[compressed > split]
    if not dark.size or not bright.size:
        return None
    # Air is near zero; images with negative values (normalised ones) are shifted by their lowest.
    zero = min(low, 0.0)
    if dark.mean(dtype=np.float64) - zero > AIR_TO_TISSUE * (bright.mean(dtype=np.float64) - zero):
        return None
    return low + split**2 * (high - low)


def _without_table(tissue: np.ndarray, steps: Sequence[float], axial: int) -> np.ndarray:
    radii = [
        0 if axis == axial else max(1, round(OPENING_RADIUS / step))
        for axis, step in enumerate(steps)
    ]
    opened = ndimage.binary_opening(tissue, _ellipsoid(radii))
    if not opened.any():
        # Nothing is thicker than the table: a finger, an animal.
        return tissue
    kept = _large_components(opened)
    return (
        ndimage.binary_dilation(kept, _ellipsoid([radius + (radius > 0) for radius in radii]))
        & tissue
    )


def _ellipsoid(radii: Sequence[int]) -> np.ndarray:
    grids = np.ogrid[tuple(slice(-radius, radius + 1) for radius in radii)]
    squares = [(grid / max(radius, 1)) ** 2 for grid, radius in zip(grids, radii, strict=True)]
    inside: np.ndarray = squares[0] + squares[1] + squares[2] <= 1
    return inside


def _large_components(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= COMPONENT_SHARE * sizes.max())[labels]


def _fill_slices(mask: np.ndarray, axial: int) -> np.ndarray:
    return np.stack(
        [ndimage.binary_fill_holes(part) for part in np.moveaxis(mask, axial, 0)], axis=axial
    )


def _to_voxels(
    body: np.ndarray, array: np.ndarray, factors: Sequence[int], threshold: float
) -> np.ndarray:
    if max(factors) == 1:
        return body.astype(np.uint8)
    block = np.ones((3, 3, 3), dtype=bool)
    inside = ndimage.binary_erosion(body, block, border_value=1)
    surface = ndimage.binary_dilation(body, block) & ~inside
    mask = np.empty(array.shape, dtype=np.uint8)
    _, rows, columns = array.shape
    # A layer of blocks at a time: both masks at full resolution would take twice the scan.
    for index, layers in enumerate(zip(inside, surface, strict=True)):
        whole, edge = (
            layer.repeat(factors[1], 0).repeat(factors[2], 1)[:rows, :columns] for layer in layers
        )
        slab = slice(index * factors[0], (index + 1) * factors[0])
        mask[slab] = whole | (edge & (array[slab] > threshold))
    return mask
