"""Confidence maps in files: integers, since nnU-Net's writers take nothing else."""

from __future__ import annotations

import numpy as np

STEPS = 200
"""Of a confidence of 1. One of nnU-Net's writers takes no more than 255."""


def encode(confidence: np.ndarray) -> np.ndarray:
    """Return confidences (0 to 1) as integers, rounded to the nearest step."""
    return np.rint(confidence * STEPS).astype(np.uint8)


def decode(steps: np.ndarray) -> np.ndarray:
    """Return the confidences (float32) that a file has as integers."""
    return steps.astype(np.float32) / STEPS
