"""Interaction with SAM-Med2D in a volume, slice by slice: each slice that a prompt touches is
segmented by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from stunet_plugin.sam.slice_session import SliceObject, SliceSession


class SliceInteraction:
    """What was prompted so far in the slices of a volume, and the mask that came of it.

    Args:
        network: SAMMed2D in evaluation mode, on ``device``.
        slices: (slices, 1 or 3 channels, height, width), 0 to 255.
    """

    def __init__(self, network: Any, slices: Tensor, device: torch.device) -> None:
        self.network, self.slices, self.device = network, slices, device
        self._sessions: dict[int, SliceSession] = {}
        self._history: list[dict[int, SliceObject]] = []
        self.mask = torch.zeros((len(slices), *slices.shape[2:]), dtype=torch.bool)

    def point(self, index: int, row: int, column: int, positive: bool) -> None:
        """Take a click on a pixel of a slice."""
        self._change([index], lambda _, session: session.point((column, row), positive))

    def box(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> None:
        """Take a box (slice, row, column), which is a box in each of its slices."""
        first, last = (start[2], start[1]), (stop[2], stop[1])
        touched = range(start[0], stop[0])
        self._change(touched, lambda _, session: session.box(first, last))

    def set_mask(self, mask: Tensor) -> None:
        """Take a mask (slices, height, width) and let the network go over its slices."""
        touched = mask.flatten(1).any(1).nonzero()[:, 0].tolist()
        self._change(touched, lambda index, session: session.take(mask[index]))

    def undo(self) -> bool:
        """Take the last prompt or mask back; return whether there was one."""
        if not self._history:
            return False
        for index, before in self._history.pop().items():
            self._sessions[index].object = before
            self.mask[index] = before.mask
        return True

    def reset(self) -> None:
        """Forget all prompts and the mask; slices stay encoded."""
        while self.undo():
            pass

    def _change(
        self, touched: Iterable[int], prompt: Callable[[int, SliceSession], Tensor]
    ) -> None:
        before = {}
        for index in touched:
            if index not in self._sessions:
                new = SliceSession(self.network, self.slices[index], self.device)
                self._sessions[index] = new
            session = self._sessions[index]
            before[index] = session.object
            self.mask[index] = prompt(index, session)
        self._history.append(before)
