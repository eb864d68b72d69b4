"""Strides cut and padded, deep-supervision scales, patch checks."""

from __future__ import annotations

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import topology
from stunet_plugin.networks.topology import published_strides

ONE, TWO, FLAT = [1, 1, 1], [2, 2, 2], [1, 2, 2]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ([ONE, TWO, TWO, TWO], [ONE, TWO, TWO, TWO, ONE, ONE]),
        ([ONE, FLAT, TWO, TWO, TWO, TWO, FLAT, TWO], [ONE, FLAT, TWO, TWO, TWO, TWO]),
        ([ONE], [ONE] * 6),
        ([[1, 1]] + [[2, 2]] * 7, [[1, 1]] + [[2, 2]] * 5),
    ],
)
def test_poolings_are_cut_or_padded_to_five(plan: list, expected: list) -> None:
    assert published_strides(plan) == tuple(map(tuple, expected))


def test_scales_follow_the_network_not_the_plan() -> None:
    half, quarter = [1, 0.5, 0.5], [0.5, 0.25, 0.25]
    scales = topology.deep_supervision_scales(published_strides([ONE, FLAT, TWO]))
    assert scales == [ONE, half, quarter, quarter, quarter]


def test_patch_size_message_names_what_works() -> None:
    strides = published_strides([ONE, TWO, TWO, TWO, TWO, TWO])
    topology.check_patch_size((96, 64, 32), strides, "It")
    for patch, message in (
        ((100, 64, 8), r"\[32, 32, 32\].*\[100, 64, 8\].*\[96, 64, 32\] and \[128, 64, 32\]"),
        ((64, 64), "3 spatial axes"),
    ):
        with pytest.raises(PluginError, match=message):
            topology.check_patch_size(patch, strides, "It")


@pytest.mark.parametrize(
    "wrong", [[], None, "222", [2, 2], [[1, 1, 1], [2, 2]], [[1.5, 2, 2]], [[0, 1, 1]], [["1"] * 3]]
)
def test_strides_that_are_none_are_refused(wrong: object) -> None:
    with pytest.raises(PluginError, match="Expected"):
        published_strides(wrong)  # type: ignore[arg-type]


def test_poolings_that_a_patch_allows() -> None:
    for patch, total in (((128, 160, 256), (32, 32, 32)), ((40, 56, 64), (8, 8, 16))):
        strides = topology.strides_for_patch(patch)
        assert len(strides) == 6
        assert topology.total_stride(strides) == total
