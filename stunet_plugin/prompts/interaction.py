"""Interaction: one object in an image, segmented by a promptable network prompt after prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.prompts.channels import CHANNELS, DECAY, POINT, PREVIOUS, Prompt
from stunet_plugin.prompts.simulation import bounds

ZOOM_STEP, LARGEST_ZOOM = 1.5, 4.0
LEAST_AT_BORDER = 6
"""What changes in so many voxels of a patch's face, as the network sees it, goes on outside."""
TILE_STEP = 0.75
"""Of patches that refine what was found in a smaller view, in patches."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First voxel, and where it ends."""


class Interaction:
    """What was prompted so far, and the mask that came of it. All in the network's own space.

    The network sees a patch around the newest prompt. Where what changes reaches the border of the
    patch, it sees more in a smaller view, and what it finds there again in patches of full
    resolution. A 2D network sees slices.

    Args:
        network: in evaluation mode, with one output.
        image: (channel, three axes), normalised.
        patch_size: two or three axes.
    """

    def __init__(
        self, network: nn.Module, image: Tensor, patch_size: Sequence[int], device: torch.device
    ) -> None:
        self.network, self.image, self.device = network, image, device
        self.flat = len(patch_size) == 2
        self.patch = (1, *patch_size) if self.flat else tuple(patch_size)
        self.shape = tuple(image.shape[1:])
        self.mask = torch.zeros(self.shape, dtype=torch.bool)
        self.prompts: list[Prompt] = []
        self._history: list[tuple[np.ndarray, int]] = []

    def add(self, prompt: Prompt) -> None:
        """Take one more prompt, and segment."""
        self._remember()
        self.prompts.append(prompt)
        low = [min(max(x, 0), n - 1) for x, n in zip(prompt.start, self.shape, strict=True)]
        high = [max(min(x, n), y + 1) for x, n, y in zip(prompt.stop, self.shape, low, strict=True)]
        if self.flat and prompt.channel in (POINT, POINT + 1):
            low[0] = prompt.start[0]
            high[0] = low[0] + 1
        self._segment((tuple(low), tuple(high)))

    def set_mask(self, mask: Tensor, refine: bool = True) -> None:
        """Take a mask, for example of an automatic model, as the one so far; ``refine``: let the
        network go over it."""
        self._remember()
        self.mask = mask.clone()
        if refine and bool(mask.any()):
            self._segment(bounds(mask), everywhere=True)

    def segment_without_prompts(self) -> None:
        """Find what is to be found without a prompt: in training, everything that had a label."""
        self._remember()
        self._segment(((0,) * 3, self.shape), everywhere=True)

    def undo(self) -> bool:
        """Take the last prompt or mask back; return whether there was one."""
        if not self._history:
            return False
        packed, count = self._history.pop()
        self.mask = self._unpacked(packed)
        del self.prompts[count:]
        return True

    def reset(self) -> None:
        """Forget all prompts and the mask."""
        self.mask = torch.zeros(self.shape, dtype=torch.bool)
        self.prompts.clear()
        self._history.clear()

    def masks(self) -> list[np.ndarray]:
        """Return the masks before each prompt, and the last one, a bit for each voxel."""
        return [*(packed for packed, _ in self._history), np.packbits(self.mask.numpy())]

    def restore(self, prompts: Sequence[Prompt | None], masks: Sequence[np.ndarray]) -> None:
        """Go on after prompts, None for a mask that was taken, with the masks of :meth:`masks`.

        Raises:
            ValueError: a mask is of another size.
        """
        *before, last = map(self._unpacked, masks)
        self.reset()
        for prompt, mask in zip(prompts, before, strict=True):
            self._history.append((np.packbits(mask.numpy()), len(self.prompts)))
            self.prompts += [prompt] if prompt else []
        self.mask = last

    def _unpacked(self, packed: np.ndarray) -> Tensor:
        count = int(np.prod(self.shape))
        if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
            raise ValueError(f"a mask of {packed.shape} bytes is not of {self.shape} voxels")
        return torch.from_numpy(np.unpackbits(packed, count=count)).reshape(self.shape).bool()

    def _remember(self) -> None:
        self._history.append((np.packbits(self.mask.numpy()), len(self.prompts)))

    @torch.inference_mode()
    def _segment(self, box: Box, everywhere: bool = False) -> None:
        """Segment around a box: in one part if a view can hold it, and for a 2D network on each of
        its slices."""
        sizes = [int(n * LARGEST_ZOOM) for n in self.patch]
        if self.flat:
            sizes[0] = 1
        edges = []
        for low, high, size in zip(*box, sizes, strict=True):
            count = -(-(high - low) // size)
            ends = np.rint(np.linspace(low, high, count + 1)).astype(int).tolist()
            edges.append(list(pairwise(ends)))
        for part in product(*edges):
            first = tuple(int(x) for x, _ in part)
            self._segment_one((first, tuple(int(x) for _, x in part)), everywhere)

    def _segment_one(self, box: Box, everywhere: bool) -> None:
        wanted = [y - x for x, y in zip(*box, strict=True)]
        zoom = max(1.0, *(w / p for w, p in zip(wanted[1:], self.patch[1:], strict=True)))
        if not self.flat:
            zoom = max(zoom, wanted[0] / self.patch[0])
        zoom = min(zoom, LARGEST_ZOOM)
        while True:
            window = self._window(box, zoom)
            found = self._run(window, self.mask)
            inside, there = self._within_image(window)
            changed = found[there] != self.mask[inside]
            if zoom >= LARGEST_ZOOM or not self._goes_on(changed, inside, zoom):
                break
            zoom = min(zoom * ZOOM_STEP, LARGEST_ZOOM)
        coarse = self.mask.clone()
        coarse[inside] = found[there]
        if zoom > 1:
            self._refine(coarse, coarse | self.mask if everywhere else coarse != self.mask)
        else:
            self.mask = coarse

    def _refine(self, coarse: Tensor, again: Tensor) -> None:
        """Go over voxels in patches of full resolution; the mask so far stays elsewhere."""
        if not bool(again.any()):
            return
        votes = torch.zeros(self.shape, dtype=torch.int16)
        seen = torch.zeros(self.shape, dtype=torch.int16)
        for window in self._tiles(bounds(again)):
            inside, there = self._within_image(window)
            if bool(again[inside].any()):
                votes[inside] += self._run(window, coarse)[there].short()
                seen[inside] += 1
        self.mask = torch.where(seen > 0, 2 * votes > seen, self.mask)

    def _tiles(self, box: Box) -> Iterator[Box]:
        """Yield patches that cover a box, centred on it."""
        starts = []
        for low, high, size in zip(*box, self.patch, strict=True):
            count = int(np.ceil(max(high - low - size, 0) / (TILE_STEP * size))) + 1
            first, last = low, max(high - size, low)
            if count == 1:
                first = last = (low + high - size) // 2
            starts.append(np.rint(np.linspace(first, last, count)).astype(int).tolist())
        for start in product(*starts):
            stop = tuple(x + size for x, size in zip(start, self.patch, strict=True))
            yield self._shifted(start, stop)

    def _window(self, box: Box, zoom: float) -> Box:
        """Return what the network sees at a zoom, around the middle of a box."""
        size = [round(n * zoom) for n in self.patch]
        if self.flat:
            size[0] = 1
        low = [(x + y - n) // 2 for x, y, n in zip(*box, size, strict=True)]
        return self._shifted(low, [x + n for x, n in zip(low, size, strict=True)])

    def _shifted(self, low: Sequence[int], high: Sequence[int]) -> Box:
        """Move a window into the image; the other way round where it is larger."""
        start = []
        for x, y, n in zip(low, high, self.shape, strict=True):
            room = n - (y - x)
            start.append(min(max(x, 0), room) if room >= 0 else room // 2)
        stop = [s + y - x for s, x, y in zip(start, low, high, strict=True)]
        return tuple(start), tuple(stop)

    def _within_image(self, window: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the part of a window that is in the image, in voxels of both."""
        ends = [(max(x, 0), min(y, n)) for x, y, n in zip(*window, self.shape, strict=True)]
        inside = tuple(slice(x, y) for x, y in ends)
        there = tuple(slice(x - s, y - s) for (x, y), s in zip(ends, window[0], strict=True))
        return inside, there

    def _goes_on(self, changed: Tensor, inside: tuple[slice, ...], zoom: float) -> bool:
        """Return whether what changed reaches a face of the window that is not the image's."""
        for axis, (part, size) in enumerate(zip(inside, self.shape, strict=True)):
            if self.flat and axis == 0:
                continue
            for index, at_end in ((0, part.start == 0), (-1, part.stop == size)):
                face = changed.select(axis, index)
                if not at_end and int(face.sum()) >= LEAST_AT_BORDER * zoom**2:
                    return True
        return False

    def _run(self, window: Box, mask: Tensor) -> Tensor:
        """Return the network's mask for a window, of the window's size."""
        size = [y - x for x, y in zip(*window, strict=True)]
        inside, there = self._within_image(window)
        x = torch.zeros((len(self.image) + CHANNELS, *self.patch))
        for channel, image in enumerate(self.image):
            whole = torch.zeros(size)
            whole[there] = image[inside]
            x[channel] = self._viewed(whole, "trilinear")
        whole = torch.zeros(size)
        whole[there] = mask[inside].float()
        x[len(self.image) + PREVIOUS] = self._viewed(whole, "nearest-exact")
        for channel in sorted({prompt.channel for prompt in self.prompts}):
            whole = torch.zeros(size)
            for age, prompt in enumerate(reversed(self.prompts)):
                if prompt.channel == channel:
                    prompt.draw(whole, window[0], DECAY**age)
            x[len(self.image) + channel] = self._viewed(whole, "prompt", channel)
        given: Any = x[None, :, 0] if self.flat else x[None]
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            logits = self.network(given.to(self.device))[0].float().cpu()
        logits = logits[:, None] if self.flat else logits
        if list(logits.shape[1:]) != size:
            logits = functional.interpolate(logits[None], size=size, mode="trilinear")[0]
        return logits[1] > logits[0]

    def _viewed(self, whole: Tensor, how: str, channel: int = 0) -> Tensor:
        """Return a channel of a window as the network sees it: smaller, where it is zoomed out."""
        if tuple(whole.shape) == self.patch:
            return whole
        if how == "prompt":
            how = "area"
            if channel >= POINT:
                # Little prompts would vanish in the mean.
                zoom = max(n / p for n, p in zip(whole.shape[1:], self.patch[1:], strict=True))
                reach = max(round(zoom) - 1, 0)
                steps = [0 if self.flat else reach, reach, reach]
                sides = [2 * step + 1 for step in steps]
                whole = functional.max_pool3d(whole[None, None], sides, 1, steps)[0, 0]
        return functional.interpolate(whole[None, None], size=self.patch, mode=how)[0, 0]
