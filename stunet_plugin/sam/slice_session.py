"""Session of SAM-Med2D on one slice: a box, a mask or points in, the object's mask out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stunet_plugin.networks.sammed2d import NEGATIVE, POSITIVE, Prompts
from stunet_plugin.sam.images import Frame, normalise

Point = tuple[float, float]


@dataclass(frozen=True)
class SliceObject:
    """What was prompted in a slice so far, and what came of it.

    Attributes:
        points, labels: all so far; published: at test they add up.
        previous: probabilities (1, 1, mask_size, mask_size) of the last mask, the next mask prompt.
        mask: (height, width).
        iou: of the mask, as the network predicts it.
    """

    mask: Tensor
    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] = ()
    previous: Tensor | None = field(default=None, compare=False)
    iou: float = 0.0


class SliceSession:
    """A slice, encoded once; its prompts, decoded one after another.

    As in training a box is given alone, or with the mask so far; points come with that mask.

    Args:
        network: SAMMed2D in evaluation mode, on ``device``.
        image: (1 or 3, height, width), 0 to 255.
    """

    def __init__(self, network: Any, image: Tensor, device: torch.device) -> None:
        self.network, self.device = network, device
        _, height, width = image.shape
        self.frame = Frame(height, width, network.preset.image_size)
        pixels = self.frame.enter(normalise(image[None].float())).to(device)
        with torch.inference_mode(), self._autocast():
            self.embedding = network.vision_encoder(pixels).last_hidden_state
        self.reset()

    def reset(self) -> None:
        """Begin another object."""
        self.object = SliceObject(torch.zeros(self.frame.height, self.frame.width).bool())

    def box(self, start: Point, stop: Point) -> Tensor:
        """Take a box from ``start`` (x, y) up to, without, ``stop``; return the mask."""
        corners = self.frame.place((start, stop), edges=True).reshape(1, 4)
        return self._decode(Prompts(boxes=corners, masks=self.object.previous))

    def point(self, position: Point, positive: bool = True) -> Tensor:
        """Take a point (x, y) in the object, or where it is not; return the mask."""
        old = self.object
        label = POSITIVE if positive else NEGATIVE
        points, labels = (*old.points, position), (*old.labels, label)
        self.object = replace(old, points=points, labels=labels)
        given = {"points": self.frame.place(points)[None], "labels": torch.tensor([labels])}
        return self._decode(Prompts(**given, masks=old.previous))

    def take(self, mask: Tensor, refine: bool = True) -> Tensor:
        """Take a mask (height, width) as the one so far; ``refine``: let the network go over it."""
        square = self.frame.enter(mask[None, None].float())
        side = self.network.preset.mask_size
        previous = functional.interpolate(square, (side, side), mode="area")
        self.object = replace(self.object, previous=previous, mask=mask.bool())
        return self._decode(Prompts(masks=previous)) if refine else self.object.mask

    def _decode(self, prompts: Prompts) -> Tensor:
        given = {
            name: None if value is None else value.to(self.device)
            for name, value in vars(prompts).items()
        }
        with torch.inference_mode(), self._autocast():
            logits, iou = self.network.decode(self.embedding, Prompts(**given))
        best = iou[0].argmax()
        chosen = logits[:, best : best + 1].float().cpu()
        mask = self.frame.leave(chosen)[0, 0] > 0
        previous, score = torch.sigmoid(chosen), float(iou[0, best])
        self.object = replace(self.object, mask=mask, previous=previous, iou=score)
        return mask

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=self.device.type == "cuda")


def middle_of(mask: Tensor) -> Sequence[int]:
    """Return the pixel (x, y) that lies deepest in a mask that is not empty."""
    from scipy.ndimage import distance_transform_edt

    depth = torch.from_numpy(distance_transform_edt(functional.pad(mask.cpu().int(), (1,) * 4)))
    index = int(depth[1:-1, 1:-1].argmax())
    return index % mask.shape[1], index // mask.shape[1]
