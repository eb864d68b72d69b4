"""Patches of training cases to fit heads to: around voxels of every class, and some anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PATCHES = 24
"""Patches that are taken in any case."""
MOST_CASES = 100
"""Cases that are looked through for classes which the patches lack."""
ANYWHERE = 3
"""Every third patch is not around a voxel of a class: background has to be known, too."""


@dataclass(frozen=True)
class Patch:
    """A patch of a preprocessed case: image (channel, z, y, x) and labels (z, y, x), both cut where
    the case ends; a patch of a 2D network is one slice."""

    name: str
    case: int
    image: Tensor
    labels: np.ndarray


def training_patches(
    dataset: Any, patch_size: Sequence[int], classes: Sequence[int], seed: int
) -> Iterator[Patch]:
    """Yield patches, always the same ones for the same seed.

    Args:
        dataset: nnU-Net's, of preprocessed cases.
        patch_size: three or two axes.
        classes: label values; each patch is around a voxel of the one seen least so far.
    """
    size = np.array([*(1,) * (3 - len(patch_size)), *patch_size])
    rng, seen = np.random.default_rng(seed), dict.fromkeys(classes, 0)
    order = rng.permutation(sorted(dataset.identifiers)).tolist()
    number = 0
    while True:
        lacking = {label for label, voxels in seen.items() if not voxels}
        more = lacking and number < min(len(order), MOST_CASES)
        if number >= PATCHES and not more:
            return
        turn = number % len(order)
        image, segmentation, *_ = dataset.load_case(order[turn])
        # Outside of the region that nnU-Net normalises, labels are -1.
        labels = np.maximum(np.asarray(segmentation[0]), 0)
        counts = np.bincount(labels.astype(np.int64).ravel(), minlength=max(classes) + 1)
        there = [label for label in classes if counts[label]]
        number += 1
        if number > PATCHES and not lacking.intersection(there):
            continue
        wanted = min(there, key=lambda label: seen[label]) if there else None
        anywhere = wanted is None or (number % ANYWHERE == 0 and wanted not in lacking)
        found = np.arange(labels.size) if anywhere else np.flatnonzero(labels == wanted)
        centre = np.array(np.unravel_index(rng.choice(found), labels.shape))
        first = np.clip(centre - size // 2, 0, np.maximum(labels.shape - size, 0))
        box = tuple(slice(x, x + length) for x, length in zip(first, size, strict=True))
        part = labels[box]
        counts = np.bincount(part.astype(np.int64).ravel(), minlength=max(classes) + 1)
        seen = {label: voxels + int(counts[label]) for label, voxels in seen.items()}
        values = np.ascontiguousarray(image[(slice(None), *box)], dtype=np.float32)
        yield Patch(f"{order[turn]} {number}", turn, torch.from_numpy(values), part)
