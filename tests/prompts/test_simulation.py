"""Simulated prompts: objects, first prompts, corrections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from stunet_plugin.prompts.channels import BOX, CHANNELS, DECAY, POINT, PREVIOUS, SCRIBBLE
from stunet_plugin.prompts.simulation import Recipe, Simulator, bounds, deepest, depth

CERTAIN: dict[str, Any] = {"component": 0, "absent": 0, "zoomed": 0}


def simulator(seed: int = 0, flat: bool = False, **recipe: Any) -> Simulator:
    radii = (0, 2, 2) if flat else (2, 2, 2)
    chosen = Recipe(**{**CERTAIN, **recipe})
    return Simulator(np.random.default_rng(seed), radii, flat, chosen)


def blobs(*boxes: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(20, 24, 22, dtype=torch.bool)
    for low, high in boxes:
        mask[low:high, low:high, low:high] = True
    return mask


LARGE, SMALL = blobs((3, 12)), blobs((14, 19))


def test_a_component_is_26_connected_and_whole() -> None:
    corner = blobs((3, 6), (6, 9), (12, 18))
    found = {int(simulator(seed).component(corner).sum()) for seed in range(12)}
    labels, count = ndimage.label(corner.numpy(), np.ones((3, 3, 3)))
    assert found == {int((labels == x + 1).sum()) for x in range(count)} == {54, 216}


def test_depth_and_the_deepest_voxel() -> None:
    assert depth(LARGE, flat=False).max() == 5
    assert deepest(LARGE, flat=False) == [7, 7, 7]
    bar = torch.zeros(5, 9, 9, dtype=torch.bool)
    bar[2, 2:7, 2:7] = True
    assert depth(bar, flat=False).max() == 1
    assert deepest(bar, flat=True) == [2, 4, 4]
    assert depth(torch.ones(3, 4, 5, dtype=torch.bool), flat=False).min() > 0
    voxels = [simulator(seed).sample(LARGE | SMALL) for seed in range(200)]
    assert all((LARGE | SMALL)[place] for place in voxels)
    assert sum(bool(LARGE[place]) for place in voxels) > 170


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["point", "box", "flat box", "lasso", "scribble", "mask"])
def test_a_first_prompt_points_at_its_object_alone(kind: str, flat: bool) -> None:
    near = torch.from_numpy(ndimage.binary_dilation(LARGE.numpy(), np.ones((3, 3, 3)), 3))
    for seed in range(8):
        draws = simulator(seed, flat, kinds={kind: 1.0})
        target, channels, name = draws.choose([LARGE, torch.zeros_like(LARGE)])
        assert name == kind
        assert torch.equal(target, LARGE)
        used = channels.flatten(1).any(1).nonzero().flatten().tolist()
        expected = {"point": POINT, "scribble": SCRIBBLE, "mask": PREVIOUS}.get(kind, BOX)
        assert used == [expected]
        drawn = channels[expected] > 0
        assert not (drawn & ~near).any()
        assert (drawn & LARGE).any()
        assert channels.max() <= 1
        low, high = bounds(drawn)
        if kind in ("flat box", "lasso", "scribble"):
            assert 1 in (y - x for x, y in zip(low, high, strict=True))
            assert not flat or high[0] - low[0] == 1


def test_without_a_prompt_everything_is_the_object_and_an_absent_one_is_denied() -> None:
    target, channels, _ = simulator(kinds={"none": 1.0}).choose([LARGE, SMALL])
    assert torch.equal(target, LARGE | SMALL)
    assert not channels.any()
    for classes in ([LARGE, SMALL], [torch.zeros_like(LARGE)]):
        target, channels, name = simulator(absent=1).choose(classes)
        assert (name, target.any().item()) == ("absent", False)
        assert channels.any()
        assert not channels[[PREVIOUS, BOX, POINT, SCRIBBLE]].any()


def test_half_of_the_objects_are_components() -> None:
    both = LARGE | SMALL
    sizes = [int(simulator(x, component=0.5).choose([both])[0].sum()) for x in range(60)]
    assert 15 < sizes.count(int(both.sum())) < 45
    assert set(sizes) == {int(x.sum()) for x in (both, LARGE, SMALL)}


def test_corrections_go_where_the_prediction_is_wrong() -> None:
    target, channels = LARGE.short(), torch.zeros(CHANNELS, *LARGE.shape)
    target[:, :, 20:] = 2  # ignored
    channels[BOX] = LARGE
    draws = simulator(corrections_by={"point": 1.0})
    draws.correct(channels, target, torch.zeros_like(LARGE))
    assert LARGE[tuple((channels[POINT] == 1).nonzero()[0])]
    assert channels[BOX].max() == pytest.approx(DECAY)
    too_much = LARGE | SMALL
    too_much[:, :, 20:] = True
    draws.correct(channels, target, too_much)
    assert SMALL[tuple((channels[POINT + 1] == 1).nonzero()[0])]
    assert torch.equal(channels[PREVIOUS] > 0, too_much)
    before = channels.clone()
    draws.correct(channels, target, LARGE)
    assert torch.equal(channels[1:], before[1:]), "without an error there is no prompt"
    draws.click(channels, target, too_much & ~blobs((4, 6)))
    assert channels[POINT + 1].max() == 1, "the deepest error is corrected"


def test_corrections_lie_deep_in_the_deepest_error() -> None:
    thin = torch.zeros_like(LARGE)
    thin[16:18] = True  # many more voxels than deep in LARGE
    for seed in range(20):
        channels = torch.zeros(CHANNELS, *LARGE.shape)
        simulator(seed, corrections_by={"point": 1.0}).correct(channels, LARGE.short(), thin)
        clicked = (channels[POINT] == 1).nonzero()
        assert len(clicked) == 1
        assert depth(LARGE, flat=False)[tuple(clicked[0])] >= 3, "half of 5"


def test_zooming_out_shows_the_same_smaller() -> None:
    draws = simulator(zoomed=1, far=(1.0, 2.0))
    image, labels = draws.zoom_out(LARGE[None].float(), LARGE[None].short())
    assert image.shape == labels.shape == (1, *LARGE.shape)
    assert labels.dtype == torch.int16
    assert 0.08 < int(labels.sum()) / int(LARGE.sum()) < 0.2
    assert ((image > 0.5) == (labels > 0)).float().mean() > 0.98


def test_a_seed_decides_everything() -> None:
    first, second = (simulator(7, absent=0.3).choose([LARGE, SMALL]) for _ in range(2))
    assert torch.equal(first[1], second[1])
