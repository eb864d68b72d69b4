"""Strong view of images: the same place with other gray values, and a box that is not shown.

The weak view is what nnU-Net's loader hands over; as gray values alone change, voxels of both views
correspond.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA, CONTRAST, BRIGHTNESS, NOISE = 2.0, 0.4, 0.3, 0.3
"""Gray values to the power of 1/GAMMA to GAMMA; times 1 - CONTRAST to 1 + CONTRAST; plus up to
BRIGHTNESS standard deviations; noise of up to NOISE standard deviations."""
SMALLEST_BOX, LARGEST_BOX = 0.1, 0.4
"""Sides of the box as fractions of the patch."""


def strong_view(images: Tensor) -> Tensor:
    """Return the strong view of images (sample, channel, *spatial), each with its own draws."""
    if not len(images):
        return images
    spatial = tuple(range(2, images.ndim))
    shape = (*images.shape[:2], *(1,) * len(spatial))

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape, device=images.device).uniform_(low, high)

    low, high = images.amin(spatial, keepdim=True), images.amax(spatial, keepdim=True)
    reach = (high - low).clamp(min=1e-6)
    exponent = GAMMA ** uniform(-1, 1)
    changed = ((images - low) / reach).clamp(min=0) ** exponent * reach + low
    # Only the shape of the histogram changes, as in nnU-Net's gamma.
    mean, deviation = images.mean(spatial, keepdim=True), images.std(spatial, keepdim=True)
    now = changed.std(spatial, keepdim=True).clamp(min=1e-6)
    changed = (changed - changed.mean(spatial, keepdim=True)) / now * deviation
    changed = changed * uniform(1 - CONTRAST, 1 + CONTRAST)
    changed = changed + mean + deviation * uniform(-BRIGHTNESS, BRIGHTNESS)
    changed = changed + torch.randn_like(images) * deviation * uniform(0, NOISE)
    return torch.where(_boxes(images), mean, changed)


def _boxes(images: Tensor) -> Tensor:
    """Return a box of voxels of each image, booleans (sample, 1, *spatial)."""
    inside = torch.ones(len(images), 1, *images.shape[2:], dtype=torch.bool, device=images.device)
    for axis in range(2, images.ndim):
        size = images.shape[axis]
        side, place = torch.rand(2, len(images), device=images.device)
        length = (SMALLEST_BOX + (LARGEST_BOX - SMALLEST_BOX) * side) * size
        start = place * (size - length)
        voxels = torch.arange(size, device=images.device)
        along = (voxels >= start[:, None]) & (voxels < (start + length)[:, None])
        inside &= along.view(-1, *(size if x == axis else 1 for x in range(1, images.ndim)))
    return inside
