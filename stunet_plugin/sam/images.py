"""Images as SAM-Med2D takes them: 8-bit values, three channels, padded or resized to its size.

Facts from the published code (github.com/OpenGVLab/SAM-Med2D): images that are smaller than the
network's on both sides are padded with zeros after normalisation, centred; others are resized to
it by the nearest neighbour, whatever their aspect. Colours come as blue, green, red, with the means
of red, green, blue, in training; so they do here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CHANNELS = (1, 3)
"""Grey, or red, green and blue."""


def to_bytes(images: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return images with ``low`` mapped to 0 and ``high`` to 255, in whole numbers."""
    width = torch.as_tensor(high - low, dtype=images.dtype, device=images.device)
    scaled = (images - low) * 255 / torch.where(width > 0, width, 1)
    return scaled.clamp(0, 255).round()


def slices_to_bytes(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) with each one's own range mapped to 0 to 255."""
    dims = (1, 2, 3)
    return to_bytes(images, images.amin(dims, True), images.amax(dims, True))


def normalise(images: Tensor) -> Tensor:
    """Return the network's values (B, 3, H, W) of images of one or three channels, 0 to 255."""
    bgr = images.flip(1).expand(-1, 3, -1, -1)
    mean, deviation = (bgr.new_tensor(x)[:, None, None] for x in (MEAN, DEVIATION))
    return (bgr - mean) / deviation


@dataclass(frozen=True)
class Frame:
    """Where an image of a size (height, width) lies in the square that the network sees."""

    height: int
    width: int
    size: int

    @property
    def padded(self) -> bool:
        return self.height < self.size and self.width < self.size

    @property
    def offsets(self) -> tuple[int, int]:
        """Rows and columns before the image, where it is padded."""
        if not self.padded:
            return 0, 0
        return (self.size - self.height) // 2, (self.size - self.width) // 2

    def enter(self, images: Tensor) -> Tensor:
        """Return images or masks (B, C, height, width) in the network's square."""
        if self.padded:
            top, left = self.offsets
            bottom, right = self.size - self.height - top, self.size - self.width - left
            return functional.pad(images, (left, right, top, bottom))
        return functional.interpolate(images, (self.size, self.size), mode="nearest")

    def place(self, positions: Sequence[Sequence[float]], edges: bool = False) -> Tensor:
        """Return where (x, y) of the image lie in the square: middles of pixels, or ``edges``."""
        given = torch.as_tensor(positions, dtype=torch.float32)
        if self.padded:
            return given + torch.tensor(self.offsets[::-1])
        scale = torch.tensor((self.size / self.width, self.size / self.height))
        return given * scale if edges else (given + 0.5) * scale - 0.5

    def leave(self, logits: Tensor) -> Tensor:
        """Return the decoder's logits (B, C, ...) on the pixels of the image."""
        whole = functional.interpolate(
            logits, (self.size, self.size), mode="bilinear", align_corners=False
        )
        if self.padded:
            top, left = self.offsets
            return whole[..., top : top + self.height, left : left + self.width]
        return functional.interpolate(
            whole, (self.height, self.width), mode="bilinear", align_corners=False
        )
