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
    factors = (WORKING_SPACING / np.asarray(spacing)).astype(int).clip(1, array.shape)
    means = block_means(array, factors)
    threshold = CT_THRESHOLD if modality == CT else mr_threshold(means)
    if threshold is None:
        return np.ones(array.shape, dtype=np.uint8)
    tissue = means > threshold
    body = tissue
    if modality == CT:
        body = _without_table(tissue, factors * spacing, axial)
    in_slice = np.expand_dims(ndimage.generate_binary_structure(2, 1), axial)
    body = ndimage.binary_fill_holes(_large_components(body), in_slice)
    if body.mean() < MINIMUM_SHARE:
        return None
    return _to_voxels(body, array, factors, threshold)


def block_means(array: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the means over blocks of voxels, float32; the last block of an axis may be smaller."""
    starts = [np.arange(0, size, factor) for size, factor in zip(array.shape, factors, strict=True)]
    # A layer of blocks at a time: float32 at full resolution would take twice the scan.
    slabs = (array[start : start + factors[0]].sum(axis=0, dtype=np.float32) for start in starts[0])
    sums = np.stack([np.add.reduceat(slab, starts[1], axis=0) for slab in slabs])
    counts = [np.diff(start, append=size) for start, size in zip(starts, array.shape, strict=True)]
    voxels = np.einsum("i,j,k", *counts).astype(np.float32)
    means: np.ndarray = np.add.reduceat(sums, starts[2], axis=2) / voxels
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


def _without_table(tissue: np.ndarray, steps: np.ndarray, axial: int) -> np.ndarray:
    radii = np.round(OPENING_RADIUS / steps).astype(int).clip(1)
    radii[axial] = 0
    opened = ndimage.binary_opening(tissue, _ellipsoid(radii))
    if not opened.any():
        # Nothing is thicker than the table: a finger, an animal.
        return tissue
    kept = _large_components(opened)
    return ndimage.binary_dilation(kept, _ellipsoid(radii + (radii > 0))) & tissue


def _ellipsoid(radii: np.ndarray) -> np.ndarray:
    z, y, x = np.ogrid[tuple(slice(-radius, radius + 1) for radius in radii)]
    depth, height, width = radii.clip(1)
    inside: np.ndarray = (z / depth) ** 2 + (y / height) ** 2 + (x / width) ** 2 <= 1
    return inside


def _large_components(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= COMPONENT_SHARE * sizes.max())[labels]


def _to_voxels(
    body: np.ndarray, array: np.ndarray, factors: np.ndarray, threshold: float
) -> np.ndarray:
    if factors.max() == 1:
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
