"""Plain transcription of the published Volume Fusion pipeline, in the published order of
operations; the yardstick.

From the paper of 2025 and github.com/HiLab-git/PyMIC (Apache-2.0, read for facts): numpy and scipy
on whole float arrays, one sample at a time, both sub-volumes from the same scan. Nothing here is
part of the package.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

SCALE = GAMMA = (0.7, 1.5)
BLOCK = (8, 32)
FOREGROUND = 0.7
CLASSES = 4


def fused_sample(scan: np.ndarray, patch_size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return image (1, *patch) and class map (1, *patch) from a scan (1, *spatial)."""
    first, second = (resized_crop(scan, patch_size) for _ in range(2))
    first, second = random_flip(first), random_flip(second)
    first, second = (
        random_gamma(contrast(view, random.uniform(0.1, 2.0), random.uniform(98, 99.9)))
        for view in (first, second)
    )
    if random.random() < 0.25:
        first, second = 1 - first, 1 - second
    class_map = tile_classes(patch_size)
    alpha = class_map * 1.0 / CLASSES
    return alpha * first + (1.0 - alpha) * second, class_map


def resized_crop(scan: np.ndarray, patch_size: Sequence[int]) -> np.ndarray:
    """Crop at a random scale per axis, inside the scan, and zoom it linearly to the patch."""
    axes = scan.shape[1:]
    wanted = [int(patch * random.uniform(*SCALE)) for patch in patch_size]
    lengths = [min(*pair) for pair in zip(wanted, axes, strict=True)]
    starts = [random.randint(0, axis - one) for axis, one in zip(axes, lengths, strict=True)]
    crop = scan[(slice(None), *block_at(starts, lengths))]
    return ndimage.zoom(crop, [1.0, *np.divide(patch_size, lengths)], order=1)


def block_at(starts: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    pairs = zip(starts, sizes, strict=True)
    return tuple(slice(start, start + size) for start, size in pairs)


def random_flip(image: np.ndarray) -> np.ndarray:
    axes = [axis for axis in range(1, image.ndim) if random.random() > 0.5]
    return np.flip(image, axes) if axes else image


def contrast(image: np.ndarray, low_percentile: float, high_percentile: float) -> np.ndarray:
    """Map the percentiles to 0.1 and 0.9 and the tails to 0 and 1, through masks; writes into the
    image."""
    darkest, brightest = image.min(), image.max()
    low, high = np.percentile(image, low_percentile), np.percentile(image, high_percentile)
    below, above = image < low, image > high
    between = (image >= low) & (image <= high)
    image[below] = (image[below] - darkest) * 0.1 / (low - darkest)
    image[between] = (image[between] - low) / (high - low) * 0.8 + 0.1
    image[above] = (image[above] - high) / (brightest - high) * 0.1 + 0.9
    return image


def random_gamma(image: np.ndarray) -> np.ndarray:
    darkest, brightest = image.min(), image.max()
    if darkest == brightest:
        return image
    scaled = (image - darkest) / (brightest - darkest)
    return np.power(scaled, random.uniform(*GAMMA)) * (brightest - darkest) + darkest


def tile_classes(patch_size: Sequence[int]) -> np.ndarray:
    """Tile the patch with blocks of one random size and give 70 % of them a class, one after the
    other."""
    sizes = [random.randint(*BLOCK) for _ in patch_size]
    offsets = [random.randint(0, axis % size) for axis, size in zip(patch_size, sizes, strict=True)]
    grid = [axis // size for axis, size in zip(patch_size, sizes, strict=True)]
    blocks = int(np.prod(grid))
    chosen = [index < int(blocks * FOREGROUND) for index in range(blocks)]
    random.shuffle(chosen)
    class_map = np.zeros((1, *patch_size), np.uint8)
    for position, is_chosen in zip(np.ndindex(*grid), chosen, strict=True):
        if is_chosen:
            steps = zip(position, sizes, offsets, strict=True)
            starts = [index * size + offset for index, size, offset in steps]
            class_map[(slice(None), *block_at(starts, sizes))] = random.randint(1, CLASSES)
    return class_map
