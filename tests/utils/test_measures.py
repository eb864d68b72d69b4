"""Measures on shapes whose overlap and distances can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from skimage.measure import marching_cubes

from stunet_plugin.utils import measures
from stunet_plugin.utils.measures import ASSD, DSC, HD95, NSD, REFERENCE_VOLUME, score

THICK = (3.0, 1.0, 0.5)


def box(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(x, x + length) for x, length in zip(start, size, strict=True))] = True
    return mask


def ball(shape: tuple[int, ...], radius: float, spacing: tuple[float, ...]) -> Any:
    """A ball in the middle, radius in mm."""
    grids = np.meshgrid(*(np.arange(size) - (size - 1) / 2 for size in shape), indexing="ij")
    return sum((grid * step) ** 2 for grid, step in zip(grids, spacing, strict=True)) <= radius**2


@pytest.mark.parametrize(("axis", "spacing"), [(0, (1.0,) * 3), (0, THICK), (1, THICK), (2, THICK)])
def test_a_shifted_box(axis: int, spacing: tuple[float, ...]) -> None:
    """By one voxel: two of its faces are one voxel off."""
    start = tuple(3 + (other == axis) for other in range(3))
    both = box((14, 14, 14), (3, 3, 3), (6, 6, 6)), box((14, 14, 14), start, (6, 6, 6))
    found = score(*both, spacing, tolerance=spacing[axis] * 0.9)
    assert found[DSC] == pytest.approx(5 / 6)
    assert found[HD95] == pytest.approx(spacing[axis])
    assert found[REFERENCE_VOLUME] == pytest.approx(216 * math.prod(spacing) / 1000)
    assert found[NSD] < 1
    assert score(*both, spacing, spacing[axis] * 1.01)[NSD] == pytest.approx(1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_two_balls_with_one_centre(spacing: tuple[float, ...]) -> None:
    """All distances are the difference of the radii, up to the size of a voxel; areas are those of
    a sphere in mm2, with the weight that thick slices give to their elements."""
    shape = tuple(round(36 / step) for step in spacing)
    both = ball(shape, 10, spacing), ball(shape, 14, spacing)
    found = score(*both, spacing, tolerance=5.5)
    assert found[DSC] == pytest.approx(2 * 10**3 / (10**3 + 14**3), rel=0.03)
    assert found[REFERENCE_VOLUME] == pytest.approx(4 / 3 * math.pi * 10**3 / 1000, rel=0.03)
    assert found[ASSD] == pytest.approx(4, abs=0.7)
    assert found[HD95] == pytest.approx(4, abs=max(spacing))
    assert found[NSD] == pytest.approx(1)
    assert score(*both, spacing, tolerance=1)[NSD] == pytest.approx(0)
    areas = [areas.sum() for _, areas in measures.surface_distances(*both, spacing)]
    assert areas == pytest.approx([4 * math.pi * 10**2, 4 * math.pi * 14**2], rel=0.2)


def deepmind(one: np.ndarray, other: np.ndarray, spacing: Any, tolerance: float) -> Any:
    """The formulas of DeepMind's surface-distance, voxel by voxel: NSD, HD95, ASSD."""

    def area(cell: Any) -> float:
        # Of a triangulated surface between eight voxels; what is inside does not matter.
        how = {"spacing": spacing, "method": "lorensen", "allow_degenerate": False}
        sizes = []
        for inside in (cell, ~cell):
            corners, faces, *_ = marching_cubes(inside.astype(float), 0.5, **how)
            sides = np.diff(corners[faces], axis=1)
            sizes.append(np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1).sum() / 2)
        return min(sizes)

    def surface(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cells = sliding_window_view(np.pad(mask, 1), (2, 2, 2))
        places = np.argwhere(cells.any((3, 4, 5)) & ~cells.all((3, 4, 5)))
        return places * spacing, np.array([area(cells[tuple(place)]) for place in places])

    (mine, areas), (theirs, other_areas) = surface(one), surface(other)
    between = cdist(mine, theirs)
    found = [(between.min(1), areas), (between.min(0), other_areas)]
    whole = areas.sum() + other_areas.sum()
    farthest = []
    for distances, weights in found:
        order = np.argsort(distances)
        reached = np.cumsum(weights[order]) / weights.sum()
        farthest.append(distances[order][np.searchsorted(reached, 0.95)])
    near = sum(weights[distances <= tolerance].sum() for distances, weights in found) / whole
    mean = sum((distances * weights).sum() for distances, weights in found) / whole
    return {NSD: near, HD95: max(farthest), ASSD: mean}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), THICK])
def test_surface_measures_are_deepminds(spacing: tuple[float, ...]) -> None:
    rng = np.random.default_rng(5)
    smooth = gaussian_filter(rng.normal(size=(10, 14, 12)), 1.5)
    one, other = smooth > 0.02, smooth + 0.05 * rng.normal(size=smooth.shape) > 0.02
    expected = deepmind(one, other, spacing, tolerance=0.7)
    assert 0.05 < expected[NSD] < 0.98
    found = score(one, other, spacing, tolerance=0.7)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_identical_masks() -> None:
    one = box((8, 8, 8), (0, 0, 0), (8, 5, 3))
    same = score(one, one, (1, 1, 1), tolerance=0)
    assert (same[DSC], same[NSD], same[HD95], same[ASSD]) == (1, 1, 0, 0)


def test_two_dimensions() -> None:
    both = box((12, 12), (2, 2), (4, 4)), box((12, 12), (2, 5), (4, 4))
    found = score(*both, (1.0, 2.0), tolerance=1)
    assert (found[HD95], found[DSC]) == (pytest.approx(6), pytest.approx(1 / 4))


@pytest.mark.parametrize(("one", "other", "expected"), [(0, 0, 1.0), (0, 1, 0.0), (1, 0, 0.0)])
def test_empty_masks(one: int, other: int, expected: float) -> None:
    found = score(np.full((4, 4), bool(one)), np.full((4, 4), bool(other)), (1, 1), 2)
    assert (found[DSC], found[NSD]) == (expected, expected)
    assert math.isnan(found[HD95])
    assert math.isnan(found[ASSD])
