"""Draws of cases: held out to test on, and a few labelled ones to train on."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

from stunet_plugin.errors import PluginError

GOLDEN = 0.618
Draw = tuple[int, int]
"""Number of labelled cases, and of the draw, from 1."""


def hold_out(cases: Sequence[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Split cases into those to test on and the others, whatever their order."""
    shuffled = np.random.default_rng(seed).permutation(sorted(cases)).tolist()
    return sorted(shuffled[:count]), sorted(shuffled[count:])


def draw_labelled(
    pool: Sequence[str], shots: Sequence[int], draws: int, seed: int
) -> dict[Draw, list[str]]:
    """Return the labelled cases of each draw: those of a smaller number are among those of a larger
    one, no two draws of a number are the same, and more draws or numbers change no others.

    The cases stand in a circle, drawn with the seed; a draw is some that follow each other, and the
    draws begin far from each other (golden section), so that they share few cases.

    Raises:
        PluginError: there are too few cases.
    """
    size, most = len(pool), max(shots)
    if size < most:
        raise PluginError(
            f"{size} cases are left to train on, fewer than --shots {most}. Lower --test or"
            " --shots."
        )
    different = size if most < size else 1
    if draws > different:
        raise PluginError(
            f"--draws {draws}: of {size} cases left to train on, only {different} different"
            f" draw(s) of {most} are made. Lower --draws, --shots or --test."
        )
    circle = np.random.default_rng(seed).permutation(sorted(pool)).tolist() * 2
    step = min(
        (x for x in range(1, size + 1) if gcd(x, size) == 1), key=lambda x: abs(x - GOLDEN * size)
    )
    return {
        (count, draw): sorted(circle[(first := (draw - 1) * step % size) : first + count])
        for count in sorted(set(shots))
        for draw in range(1, draws + 1)
    }
