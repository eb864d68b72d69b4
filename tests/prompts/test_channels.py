"""Prompts as channels: as the published session draws them, clipped, faded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stunet_plugin.prompts import channels as drawing
from stunet_plugin.prompts.channels import BOX, CHANNELS, DECAY, POINT, PREVIOUS, SCRIBBLE


@pytest.mark.parametrize(
    ("name", "radii"),
    [("r4_3d", (4, 4, 4)), ("r4_2d", (0, 4, 4)), ("r2_3d", (2, 2, 2)), ("r1_4_4_3d", (1, 4, 4))],
)
def test_a_click_is_drawn_as_published(shared: Path, name: str, radii: tuple[int, ...]) -> None:
    expected = np.load(shared / "fixtures" / "prompts" / "nninteractive_point.npz")[name]
    assert np.array_equal(drawing.point_kernel(radii).numpy().reshape(expected.shape), expected)


def test_prompts_are_clipped_merged_and_faded() -> None:
    channels = torch.zeros(CHANNELS, 12, 12, 12)
    channels[PREVIOUS] = 1
    drawing.add(channels, drawing.point((0, 6, 11), True, (4, 4, 4)))
    assert channels[POINT, 0, 6, 11] == 1
    assert channels[POINT].count_nonzero() > 20
    drawing.add(channels, drawing.point((0, 6, 11), True, (4, 4, 4)))
    assert channels[POINT].max() == 1
    drawing.add(channels, drawing.box((2, 3, 4), (4, 6, 20), False))
    assert channels[BOX + 1].nonzero().amin(0).tolist() == [2, 3, 4]
    assert channels[BOX + 1].sum() == 2 * 3 * 8
    drawing.add(channels, drawing.drawn("scribble", torch.ones(1, 2, 2), True, (-1, 0, 0)))
    assert not channels[SCRIBBLE].any()
    assert channels[POINT].max() == pytest.approx(DECAY**2)
    # A window that begins elsewhere sees the same.
    window = torch.zeros(8, 8, 8)
    drawing.box((2, 3, 4), (4, 6, 20), False).draw(window, (3, 0, 6), 0.5)
    assert window.max() == 0.5
    assert window.nonzero().amin(0).tolist() == [0, 3, 0]
    assert window.count_nonzero() == 1 * 3 * 8
    assert channels[PREVIOUS].min() == 1


def test_the_radii_of_a_click_follow_the_spacing_of_a_plan() -> None:
    assert drawing.radii_for([1, 1, 1], resamples=True) == (4, 4, 4)
    assert drawing.radii_for([5, 0.8, 0.8], resamples=True) == (1, 4, 4)
    assert drawing.radii_for([5, 0.8, 0.8], resamples=False) == (4, 4, 4)
    assert drawing.radii_for([0.8, 0.8], resamples=True) == (0, 4, 4)
