"""Estimate of the time of a few-shot comparison, from one measured training step per network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from stunet_plugin.few_shot.candidates import Candidate
from stunet_plugin.inference.build_network import build_network
from stunet_plugin.options import MIRRORING, Options
from stunet_plugin.preparation.fitting_plans import Preparation

START_SECONDS = 20.0
"""For a training to start, and to write what it has at the end."""
FORWARD = 1 / 3
"""Share of a training step that a prediction of as many windows takes."""


def seconds_of_training(
    candidate: Candidate, prepare: Preparation, iterations: int, tests: int, device: str
) -> float:
    """Return about how long a training with its predictions of the test cases takes."""
    chosen = prepare.configuration(candidate.plans)
    step = seconds_of_step(candidate, prepare, device)
    axes = len(chosen.patch_size)
    flips = 2**axes if Options().whole(MIRRORING, 1) else 1
    forwards = tests * _windows(chosen) * flips / chosen.batch_size
    return START_SECONDS + step * (iterations + FORWARD * forwards)


def seconds_of_step(candidate: Candidate, prepare: Preparation, device: str) -> float:
    """Train the network for two steps on noise; return the seconds of the second."""
    manager, chosen = prepare.manager(candidate.plans), prepare.configuration(candidate.plans)
    channels, outputs = len(prepare.dataset.channels), 2
    given: Any = (manager, chosen, channels, outputs, True)
    network = build_network(candidate.trainer, *given).to(device)
    images = torch.randn(chosen.batch_size, channels, *chosen.patch_size, device=device)
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        total = sum(level.float().square().mean() for level in network(images))
        assert isinstance(total, torch.Tensor)
        total.backward()
        float(total.detach())  # waits for a GPU
        seconds = time.monotonic() - started
    return seconds


def _windows(chosen: ConfigurationManager) -> int:
    """Return the windows of a case of median size."""
    patch: Sequence[int] = chosen.patch_size
    shape = [int(x) for x in chosen.configuration["median_image_size_in_voxels"]]
    slices = prod(shape[: len(shape) - len(patch)])
    shape = [max(*both) for both in zip(shape[-len(patch) :], patch, strict=True)]
    grid = compute_steps_for_sliding_window(tuple(shape), tuple(patch), 0.5)
    return slices * prod(map(len, grid))


def duration(seconds: float) -> str:
    """Return minutes, or hours and minutes, for people."""
    minutes = max(round(seconds / 60), 1)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
