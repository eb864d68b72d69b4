"""Volume Fusion: two sub-volumes blended block by block; the network predicts the foreground's
share of each voxel.

Papers: Wang et al., arXiv:2306.16925, section 3 ("2023" below), and IEEE TIP 34 (2025),
doi 10.1109/TIP.2025.3610249 ("2025"). Published code: github.com/HiLab-git/PyMIC, read for facts.

With K fusion classes beside the background, class map k(v) in {0, ..., K} and alpha = k / K::

    image(v) = alpha(v) * foreground(v) + (1 - alpha(v)) * background(v)
    target(v) = k(v) = K * alpha(v)

The network is trained on it as on a segmentation with K + 1 outputs. What differs from the
published code: sizes are fractions of the patch; the published ones are for [64, 128, 128].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stunet_plugin.errors import PluginError

Fraction = float | tuple[float, ...]
"""Of a patch's axes: one number for all of them, or one for each."""

PUBLISHED_CLASSES = 4
INVERTED = 0.25
"""Probability that both sub-volumes of a sample are inverted."""


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of blocks, uniform between two fractions of each axis of the patch, whole voxels."""

    smallest: Fraction
    largest: Fraction

    def __post_init__(self) -> None:
        smallest, largest = np.broadcast_arrays(self.smallest, self.largest)
        if not (smallest > 0).all() or not (smallest <= largest).all() or largest.max() > 1:
            raise PluginError(
                "Blocks of Volume Fusion need 0 < STUNET_VF_SMALLEST <= STUNET_VF_LARGEST <= 1, not"
                f" smallest {self.smallest} and largest {self.largest}. Set or unset them."
            )

    def size_range(self, patch_size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the smallest and the largest size in voxels, per axis; raise a PluginError if not
        even the largest block has a voxel."""
        patch = np.array(patch_size)
        # 0.29 * 100 is a little less than 29.
        largest = (np.multiply(self.largest, patch) + 1e-6).astype(int)
        if largest.min() < 1:
            raise PluginError(
                f"A patch of {list(patch_size)} voxels is too small for Volume Fusion: the largest"
                f" block, {self.largest} of an axis, has no voxel. Plan a larger patch, or set"
                f" STUNET_VF_LARGEST to {1 / min(patch_size):.2g} or more."
            )
        smallest = np.rint(np.multiply(self.smallest, patch)).astype(int).clip(1, largest)
        return smallest.tolist(), largest.tolist()


@dataclass(frozen=True)
class OverlappingBoxes(BlockSizes):
    """Scheme of 2023: M boxes, M uniform, each with a class 1..K; later ones cover earlier ones,
    the rest is class 0.

    Centres are uniform over the voxels of the patch; boxes are cut at its border. Published: M from
    10 to 40, in patch [64, 128, 128] depth 8 to 40 and the other axes 8 to 80.
    """

    smallest: Fraction = 1 / 16
    largest: Fraction = 5 / 8
    fewest: int = 10
    most: int = 40

    def paint(self, class_map: Tensor, classes: int, rng: np.random.Generator) -> None:
        """Draw the blocks of a sample and write their classes into its class map of zeros."""
        patch = np.array(class_map.shape)
        smallest, largest = self.size_range(class_map.shape)
        shape = (rng.integers(self.fewest, self.most, endpoint=True), len(patch))
        sizes = rng.integers(smallest, largest, shape, endpoint=True)
        starts = rng.integers(patch, size=shape) - sizes // 2
        drawn = rng.integers(1, classes, len(sizes), endpoint=True)
        for start, size, fusion_class in zip(starts, sizes, drawn.tolist(), strict=True):
            box = tuple(map(slice, start.clip(min=0), (start + size).clip(max=patch)))
            class_map[box] = fusion_class


@dataclass(frozen=True)
class TiledBlocks(BlockSizes):
    """Scheme of 2025: one block size per sample tiles the patch; a share of the tiles (at least
    one) gets a class 1..K, the rest is class 0.

    As many whole tiles as fit, at a random offset; the margin stays class 0. Published: 70 % of the
    tiles; each axis 8 to 32 voxels in patch [64, 128, 128]. As one fraction for all axes that is
    5/64 to 5/16, which gives blocks of the same volume on average.
    """

    smallest: Fraction = 5 / 64
    largest: Fraction = 5 / 16
    foreground: float = 0.7

    def paint(self, class_map: Tensor, classes: int, rng: np.random.Generator) -> None:
        """Draw the blocks of a sample and write their classes into its class map of zeros."""
        size = rng.integers(*self.size_range(class_map.shape), endpoint=True)
        grid, margin = np.divmod(class_map.shape, size)
        offset = rng.integers(0, margin, endpoint=True)
        drawn = np.zeros(grid, np.uint8)
        # If there is one tile only, 70 % of it would be none.
        blended = max(int(drawn.size * self.foreground), 1)
        chosen = rng.permutation(drawn.size)[:blended]
        drawn.flat[chosen] = rng.integers(1, classes, blended, endpoint=True)
        tiles = torch.from_numpy(drawn).to(class_map.device)
        for axis, (start, side) in enumerate(zip(offset.tolist(), size.tolist(), strict=True)):
            tiles = tiles.repeat_interleave(side, dim=axis)
            class_map = class_map.narrow(axis, start, tiles.shape[axis])
        class_map.copy_(tiles)


Scheme = OverlappingBoxes | TiledBlocks
SCHEMES: dict[int, Scheme] = {2023: OverlappingBoxes(), 2025: TiledBlocks()}
"""The published schemes, by the year of their paper."""
DEFAULT_SCHEME = 2025


@dataclass(frozen=True)
class VolumeFusion:
    """Fuses batches of sub-volume pairs.

    Attributes:
        classes: K, fusion classes beside the background, from 1 to 255 (class maps are uint8); 4 in
            every published run.
        scheme: how blocks are drawn.
        inverted: probability that a sample's two sub-volumes are both inverted (x to 1 - x).
        standardise: turn every channel of a fused sample to mean 0 and standard deviation 1, as
            nnU-Net's images have them, instead of the published range 0 to 1.
    """

    classes: int = PUBLISHED_CLASSES
    scheme: Scheme = SCHEMES[DEFAULT_SCHEME]
    inverted: float = INVERTED
    standardise: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.classes <= 255:
            raise PluginError(f"Volume Fusion needs 1 to 255 fusion classes, not {self.classes}.")

    def __call__(
        self, foreground: Tensor, background: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Fuse sub-volumes (batch, channel, *spatial) with values from 0 to 1; return images of
        that shape and class maps (batch, *spatial), uint8. The same state of ``rng`` gives the same
        result on any device."""
        class_map = self.draw_class_maps(foreground[:, 0], rng)
        inverted = rng.random(len(foreground)) < self.inverted
        return self.fuse(foreground, background, class_map, inverted.tolist()), class_map

    def draw_class_maps(self, like: Tensor, rng: np.random.Generator) -> Tensor:
        """Draw k of every voxel, uint8; ``like`` gives the shape (batch, *spatial) and device."""
        class_maps = torch.zeros_like(like, dtype=torch.uint8)
        for class_map in class_maps:
            self.scheme.paint(class_map, self.classes, rng)
        return class_maps

    def fuse(
        self, foreground: Tensor, background: Tensor, class_map: Tensor, inverted: Sequence[bool]
    ) -> Tensor:
        """Return the images; where alpha is 0 or 1 they equal the background or foreground bit for
        bit, as torch.lerp starts from the nearer end."""
        alpha = class_map[:, None].to(foreground.dtype) / self.classes
        images = torch.lerp(background, foreground, alpha)
        for index in itertools.compress(range(len(images)), inverted):
            # Inverting the blend is the same as blending the inverted sub-volumes.
            images[index] = 1 - images[index]
        if self.standardise:
            axes = tuple(range(2, images.ndim))
            spread, mean = torch.std_mean(images, dim=axes, keepdim=True)
            # A constant channel stays constant.
            images = (images - mean) / spread.clamp(min=1e-6)
        return images

    def class_names(self) -> list[str]:
        """Return the alpha of each class as text: 0, 1/4, ..., 1."""
        return ["0", *(f"{index}/{self.classes}" for index in range(1, self.classes)), "1"]
