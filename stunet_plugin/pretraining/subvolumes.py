"""Sub-volumes for Volume Fusion: random crop and resize, flips, contrast and gamma.

Ranges as published (arXiv:2306.16925, section 3, and code of PyMIC). What differs: smaller scans
are padded, percentiles are those of sampled voxels, resizing aligns voxel centres, not corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import DataLoader
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from torch import Tensor
from torch.nn import functional

SCALE = (0.7, 1.5)
"""Size of a crop as a multiple of the patch, per axis."""
LOW_PERCENTILE, HIGH_PERCENTILE = (0.1, 2.0), (98.0, 99.9)
LOW_GRAY, HIGH_GRAY = 0.1, 0.9
"""What the two percentiles are mapped to."""
GAMMA = (0.7, 1.5)
SAMPLED_VOXELS = 2**15
"""Voxels that percentiles are estimated from; at the 0.1th, 33 of them lie below."""


def sub_volume_transforms(patch_size: Sequence[int]) -> BasicTransform:
    """Return the transform from a crop (channel, *spatial) to a sub-volume (channel, *patch) with
    values from 0 to 1."""
    mirror = MirrorTransform(allowed_axes=tuple(range(len(patch_size))))
    gamma = GammaTransform(
        gamma=GAMMA, p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=0
    )
    return ComposeTransforms([ResizeToPatch(patch_size), mirror, PercentileContrast(), gamma])


class ResizeToPatch(ImageOnlyTransform):
    """Resizes a crop to the patch, linearly; an axis shorter than the smallest scale is enlarged as
    far as that allows, then padded with each channel's minimum, which is air in most scans."""

    def __init__(self, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.patch_size = tuple(int(size) for size in patch_size)
        self.mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(self.patch_size)]

    def _apply_to_image(self, img: Tensor, **_: Any) -> Tensor:
        size = [
            patch if voxels >= int(SCALE[0] * patch) else max(round(voxels / SCALE[0]), 1)
            for voxels, patch in zip(img.shape[1:], self.patch_size, strict=True)
        ]
        if list(img.shape[1:]) != size:
            img = functional.interpolate(img[None], size, mode=self.mode, align_corners=False)[0]
        if tuple(size) == self.patch_size:
            return img
        padded = img.flatten(1).amin(dim=1).view(-1, *[1] * len(size)).repeat(1, *self.patch_size)
        starts = [
            (patch - length) // 2 for patch, length in zip(self.patch_size, size, strict=True)
        ]
        inside = (slice(at, at + length) for at, length in zip(starts, size, strict=True))
        padded[(slice(None), *inside)] = img
        return padded


class PercentileContrast(ImageOnlyTransform):
    """Maps gray values piecewise linearly to 0..1 (:func:`stretch`), each channel by its own
    percentiles, drawn from the published ranges."""

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        image, ranges = data_dict["image"], (LOW_PERCENTILE, HIGH_PERCENTILE)
        voxels = image[0].numel()
        few = voxels <= SAMPLED_VOXELS
        return {
            "percentiles": [[np.random.uniform(*one) for one in ranges] for _ in image],
            "sample": slice(None) if few else torch.randint(voxels, (SAMPLED_VOXELS,)),
        }

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        for channel, percentiles in zip(img, params["percentiles"], strict=True):
            sample = channel.reshape(-1)[params["sample"]]
            low, high = (
                float(sample.kthvalue(1 + round(percentile / 100 * (sample.numel() - 1))).values)
                for percentile in percentiles
            )
            channel.copy_(stretch(channel, low, high))
        return img


def stretch(image: Tensor, low: float, high: float) -> Tensor:
    """Map [min, low], [low, high] and [high, max] linearly to [0, 0.1], [0.1, 0.9] and [0.9, 1].

    An empty piece is left out: where many voxels have the minimum, they become 0.1.
    """
    darkest, brightest = (float(value) for value in torch.aminmax(image))
    result = _ramp(image, darkest, low) if low > darkest else torch.ones_like(image)
    result.mul_(LOW_GRAY)
    middle = _ramp(image, low, high) if high > low else (image > low).to(image.dtype)
    result.add_(middle, alpha=HIGH_GRAY - LOW_GRAY)
    if brightest > high:
        result.add_(_ramp(image, high, brightest), alpha=1 - HIGH_GRAY)
    return result


def _ramp(image: Tensor, start: float, end: float) -> Tensor:
    """0 up to ``start``, 1 from ``end``, linear between."""
    return image.clamp(start, end).sub_(start).div_(end - start)


def draw_crop(scan_shape: Sequence[int], patch_size: Sequence[int]) -> tuple[slice, ...]:
    """Draw a crop in a scan, each axis 0.7 to 1.5 times the patch's or as long as the scan's."""
    crop = []
    for patch, voxels in zip(patch_size, scan_shape, strict=True):
        length = min(max(int(np.random.uniform(*SCALE) * patch), 1), voxels)
        start = np.random.randint(voxels - length + 1)
        crop.append(slice(start, start + length))
    return tuple(crop)


def draw_pair(count: int) -> tuple[int, int]:
    """Draw two different numbers below ``count``; twice 0 if that is the only one."""
    first = np.random.randint(count)
    # np.random.choice without replacement would shuffle all cases, perhaps 100,000.
    return first, (first + (np.random.randint(1, count) if count > 1 else 0)) % count


class SubVolumeLoader(DataLoader):
    """Loads batches of sub-volumes from cases that nnU-Net preprocessed.

    A batch holds ``pairs`` foregrounds and then as many backgrounds of other cases: ``data``
    (2 * pairs, channel, *patch), ``keys``. Patches with two axes take random slices.
    """

    def __init__(self, dataset: nnUNetBaseDataset, pairs: int, patch_size: Sequence[int]) -> None:
        super().__init__(dataset, 2 * pairs, infinite=True)
        self.indices = dataset.identifiers
        self.patch_size = tuple(int(size) for size in patch_size)
        self.transforms = sub_volume_transforms(self.patch_size)

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        # batchgenerators seeds numpy in every worker, but not torch.
        torch.manual_seed(np.random.randint(2**31))

    def get_indices(self) -> list[str]:
        pairs = [draw_pair(len(self.indices)) for _ in range(self.batch_size // 2)]
        return [self.indices[pair[side]] for side in (0, 1) for pair in pairs]

    def generate_train_batch(self) -> dict[str, Any]:
        keys = self.get_indices()
        with torch.no_grad():
            return {"data": torch.stack([self._sub_volume(key) for key in keys]), "keys": keys}

    def _sub_volume(self, key: str) -> Tensor:
        scan = self._data.load_case(key)[0]
        in_slices = len(self.patch_size) == 2
        crop = draw_crop(scan.shape[1:], (1, *self.patch_size) if in_slices else self.patch_size)
        image = torch.from_numpy(np.array(scan[(slice(None), *crop)], dtype=np.float32))
        sub_volume: Tensor = self.transforms(image=image[:, 0] if in_slices else image)["image"]
        return sub_volume
