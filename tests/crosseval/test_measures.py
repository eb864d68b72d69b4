"""Measures on shapes whose overlap and distances can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stunet_plugin.crosseval.measures import (
    ASSD,
    DSC,
    HD95,
    NSD,
    PREDICTION_VOLUME,
    REFERENCE_VOLUME,
    Surfaces,
    between_first_and_last,
    score,
    tolerance_of,
)


def box(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))] = (
        True
    )
    return mask


def ball(shape: tuple[int, ...], radius: float, spacing: tuple[float, ...]) -> np.ndarray:
    """A ball in the middle, radius in mm."""
    grids = np.meshgrid(*(np.arange(size) - (size - 1) / 2 for size in shape), indexing="ij")
    return sum((grid * step) ** 2 for grid, step in zip(grids, spacing, strict=True)) <= radius**2


THICK = (3.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("axis", "spacing"), [(0, (1.0, 1.0, 1.0)), (0, THICK), (1, THICK), (2, THICK)]
)
def test_a_shifted_box(axis: int, spacing: tuple[float, ...]) -> None:
    """A box shifted by one voxel: two of its faces are one voxel off, the other four only where
    they stick out."""
    shift = tuple(int(other == axis) for other in range(3))
    reference, prediction = (
        box((14, 14, 14), (3, 3, 3), (6, 6, 6)),
        box((14, 14, 14), tuple(3 + by for by in shift), (6, 6, 6)),
    )
    found = score(reference, prediction, spacing, tolerance=spacing[axis] * 0.9)
    assert found[DSC] == pytest.approx(5 / 6)
    assert found[HD95] == pytest.approx(spacing[axis])
    assert (
        found[REFERENCE_VOLUME]
        == found[PREDICTION_VOLUME]
        == pytest.approx(216 * math.prod(spacing) / 1000)
    )
    # Of the two faces across the axis, one lies outside of the other box, one inside of it and near
    # its sides at the rim.
    sides = [6 * step for step in spacing]
    face = math.prod(side for other, side in enumerate(sides) if other != axis)
    whole = 2 * sum(
        math.prod(side for other, side in enumerate(sides) if other != left_out)
        for left_out in range(3)
    )
    assert 0.8 * face / whole < 1 - found[NSD] < 1.2 * 2 * face / whole
    assert score(reference, prediction, spacing, tolerance=spacing[axis] * 1.01)[
        NSD
    ] == pytest.approx(1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_two_balls_with_one_centre(spacing: tuple[float, ...]) -> None:
    """All distances between the surfaces are the difference of the radii, up to the size of a
    voxel."""
    shape = tuple(round(36 / step) for step in spacing)
    small, large = ball(shape, 10, spacing), ball(shape, 14, spacing)
    found = score(small, large, spacing, tolerance=5.5)
    assert found[DSC] == pytest.approx(2 * 10**3 / (10**3 + 14**3), rel=0.03)
    assert found[REFERENCE_VOLUME] == pytest.approx(4 / 3 * math.pi * 10**3 / 1000, rel=0.03)
    assert found[ASSD] == pytest.approx(4, abs=0.7)
    assert found[HD95] == pytest.approx(4, abs=max(spacing))
    assert found[NSD] == pytest.approx(1)
    assert score(small, large, spacing, tolerance=1)[NSD] == pytest.approx(0)


def test_areas_are_those_of_the_shape() -> None:
    """A smooth surface's area, in mm2, and the weight that thick slices give to their elements."""
    for spacing in ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0)):
        shape = tuple(round(32 / step) for step in spacing)
        one = ball(shape, 12, spacing)
        areas = Surfaces.between(one, one, spacing).reference_areas.sum()
        assert areas == pytest.approx(4 * math.pi * 12**2, rel=0.15)


def test_identical_masks_and_the_order_of_the_two() -> None:
    one, other = box((8, 8, 8), (0, 0, 0), (8, 5, 3)), box((8, 8, 8), (2, 0, 0), (6, 8, 2))
    same = score(one, one, (1, 1, 1), tolerance=0)
    assert (same[DSC], same[NSD], same[HD95], same[ASSD]) == (1, 1, 0, 0)
    forth, back = score(one, other, (1, 2, 3), 1), score(other, one, (1, 2, 3), 1)
    assert [forth[name] for name in (DSC, NSD, HD95, ASSD)] == pytest.approx(
        [back[name] for name in (DSC, NSD, HD95, ASSD)]
    )


def test_two_dimensions() -> None:
    found = score(
        box((12, 12), (2, 2), (4, 4)), box((12, 12), (2, 5), (4, 4)), (1.0, 2.0), tolerance=1
    )
    assert found[HD95] == pytest.approx(6)
    assert found[DSC] == pytest.approx(1 / 4)


def test_empty_masks() -> None:
    empty, full = np.zeros((4, 4, 4), dtype=bool), np.ones((4, 4, 4), dtype=bool)
    for reference, prediction, expected in (
        (empty, empty, 1.0),
        (empty, full, 0.0),
        (full, empty, 0.0),
    ):
        found = score(reference, prediction, (1, 1, 1), 2)
        assert (found[DSC], found[NSD]) == (expected, expected)
        assert math.isnan(found[HD95])
        assert math.isnan(found[ASSD])


def test_tolerances_go_by_the_name_of_the_organ() -> None:
    assert [
        tolerance_of(name, {})
        for name in ("liver", "kidney_left", "kidney", "adrenal_gland_right", "bone")
    ] == [5, 3, 3, 2, 2]
    assert tolerance_of("duodenum", {"duodenum": 4}) == 4
    assert tolerance_of("kidney_left", {"kidney": 1}, default=9) == 1
    assert tolerance_of("bone", {}, default=9) == 9


def test_slices_between_the_first_and_the_last_of_the_reference() -> None:
    reference = box((5, 6, 7), (1, 2, 3), (2, 2, 2))
    assert between_first_and_last(reference, 2) == (slice(None), slice(None), slice(3, 5))
    assert between_first_and_last(np.zeros((2, 3), dtype=bool), 1) == (slice(None), slice(None))
