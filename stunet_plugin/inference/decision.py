"""Decision on a voxel's label from its logits: the greatest, or with regions the last one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stunet_plugin.inference.output_head import CHUNK, OutputHead
from stunet_plugin.inference.wanted_outputs import choose


def decide(
    values: Tensor,
    head: OutputHead | None,
    outputs: Sequence[int] | None,
    regions: Sequence[int] | None,
    confidence: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the labels (*spatial), and their confidence if asked for.

    Args:
        values: (channel, *spatial), logits, or features for the head.
        outputs: those to tell apart; None: all.
        regions: label value of each output, written over those before it; None without regions.
    """
    flat = values.flatten(1)
    labels = torch.zeros(flat.shape[1], dtype=torch.int16, device=flat.device)
    sure = torch.ones(flat.shape[1], device=flat.device)
    for start in range(0, flat.shape[1], CHUNK):
        part = flat[:, start : start + CHUNK]
        if head and not part[-1].any():
            continue  # The network was not run here.
        logits = head.logits(part) if head else part.T.float().contiguous()
        if head and outputs is not None:
            logits = choose(logits, outputs, regions is not None)
        found, decided = (
            _classes(logits, outputs, confidence)
            if regions is None
            else _regions(logits, outputs, regions, confidence)
        )
        labels[start : start + CHUNK] = found
        if decided is not None:
            sure[start : start + CHUNK] = decided
    shape = values.shape[1:]
    whole = labels.reshape(shape).cpu().numpy()
    return whole, sure.reshape(shape).cpu().numpy() if confidence else None


def _classes(
    logits: Tensor, outputs: Sequence[int] | None, confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the greatest of logits (voxel, output), and its probability."""
    top, labels = logits.max(1)
    sure = torch.exp(top - torch.logsumexp(logits, 1)) if confidence else None
    if outputs is not None:
        labels = torch.tensor([*outputs, 0], device=labels.device)[labels]
    return labels, sure


def _regions(
    logits: Tensor, outputs: Sequence[int] | None, regions: Sequence[int], confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the last region of each voxel, and how sure the least sure output is."""
    probabilities = torch.sigmoid(logits)
    labels = torch.zeros(len(logits), dtype=torch.int16, device=logits.device)
    for column, output in enumerate(outputs or range(len(regions))):
        labels[probabilities[:, column] > 0.5] = regions[output]
    sure = torch.maximum(probabilities, 1 - probabilities).amin(1) if confidence else None
    return labels, sure
