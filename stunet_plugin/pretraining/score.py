"""Scores of the pretext task: how well a network separates the fusion classes, over many draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

UNLEARNED_DICE = 0.05
"""A class below this Dice was not learned."""


def confusion_matrix(logits: Tensor, class_map: Tensor) -> Tensor:
    """Count voxels by (true class, predicted class), int64, on the CPU; logits (batch, class,
    *spatial), class map (batch, *spatial)."""
    classes = logits.shape[1]
    pairs = class_map.flatten().long() * classes + logits.argmax(1).flatten()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()


def overlap_counts(confusion: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives, false positives and false negatives of every class."""
    hits = confusion.diagonal()
    return hits.numpy(), (confusion.sum(0) - hits).numpy(), (confusion.sum(1) - hits).numpy()


def pretext_score(confusions: Sequence[Tensor], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the score over many draws, a confusion matrix each, ready for a JSON."""
    total = torch.stack(list(confusions)).sum(0)
    dice = _dice_per_class(total)
    means = [float(np.nanmean(_dice_per_class(confusion))) for confusion in confusions]
    alpha = torch.arange(len(total), dtype=torch.float64) / (len(total) - 1)
    error = (alpha[:, None] - alpha).abs()
    return {
        "dice_per_alpha": {
            name: None if np.isnan(value) else value
            for name, value in zip(class_names, dice, strict=True)
        },
        "mean_dice": float(np.nanmean(dice)),
        "mean_dice_of_batches": {
            "mean": float(np.mean(means)),
            "standard_deviation": float(np.std(means)),
            "batches": len(means),
        },
        "accuracy": float(total.diagonal().sum() / total.sum()),
        "mean_absolute_error_of_alpha": float((total * error).sum() / total.sum()),
        "confusion": {"rows": "true alpha", "columns": "predicted alpha", "voxels": total.tolist()},
    }


def _dice_per_class(confusion: Tensor) -> list[float]:
    """NaN for a class that is neither there nor predicted."""
    hits = confusion.diagonal().double()
    return (2 * hits / (confusion.sum(0) + confusion.sum(1))).tolist()


def unlearned_classes(dice_per_alpha: Mapping[str, float | None]) -> str:
    """Return the classes whose Dice is near 0, with it, as text; "" if all were learned."""
    known = {name: dice for name, dice in dice_per_alpha.items() if dice is not None}
    return ", ".join(
        f"{name} ({dice:.3f})" for name, dice in known.items() if dice < UNLEARNED_DICE
    )
