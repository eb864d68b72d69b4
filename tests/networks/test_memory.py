"""Sizes, their arithmetic, and the table of `stunet list`: held against the network itself."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch.utils.flop_counter import FlopCounterMode

from stunet_plugin.commands.list import List, size_table
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.memory import PUBLISHED_STRIDES, STUNetShape
from stunet_plugin.networks.presets import PRESETS, STUNetPreset

STRIDES = (
    PUBLISHED_STRIDES,
    ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)),
    ((1, 1), (2, 2), (2, 2), (2, 2), (2, 2), (2, 2)),
)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("name", ["tiny", "large"])
def test_arithmetic_agrees_with_the_network(name: str, strides: tuple) -> None:
    values = stunet_architecture(PRESETS[name], strides).values()
    with torch.device("meta"):
        network = get_network_from_plans(*values, 4, 7, deep_supervision=True)
    shape = STUNetShape.of_preset(PRESETS[name], strides, 4, 7)
    patch = (64, 96, 128)[: len(strides[0])]
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 4, *patch, device="meta"))
    assert shape.parameters() == sum(parameter.numel() for parameter in network.parameters())
    assert 2 * shape.multiply_adds(patch) == counter.get_total_flops()


@pytest.mark.parametrize(
    "preset", [preset for preset in PRESETS.values() if preset.paper_tera_flops]
)
def test_flops_are_the_papers_less_what_convolving_first_saves(preset: STUNetPreset) -> None:
    ours = STUNetShape.of_preset(preset).multiply_adds((128, 128, 128)) / 1e12
    assert 0.97 * preset.paper_tera_flops <= ours <= preset.paper_tera_flops


def test_size_table_shows_every_size_and_refuses_what_does_not_fit() -> None:
    table = size_table(List(False, (128, 128, 128), 2, 1, 105))
    for preset in PRESETS.values():
        assert f"{preset.parameters:,}" in table
    assert "reduced by 8x8x8" in size_table(List(False, (40, 56, 40), 2, 1, 3))
    for patch, batch, message in (
        ((33, 35, 7), 2, r"\[33, 35, 7\] cannot be pooled: give even sizes of at least 8"),
        ((128, 128, 128), 0, "--batch-size must be at least 1, not 0"),
    ):
        with pytest.raises(PluginError, match=message):
            size_table(List(False, patch, batch, 1, 105))
