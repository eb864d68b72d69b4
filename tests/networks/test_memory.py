"""Sizes, their arithmetic, and the table of `stunet list`: held against the network itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch.utils.flop_counter import FlopCounterMode

from stunet_plugin.commands.list import List, size_table
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.memory import (
    ADAM_VALUES,
    PUBLISHED_STRIDES,
    REFERENCE_PATCH,
    SGD_VALUES,
    STUNetShape,
)
from stunet_plugin.networks.presets import PRESETS, STUNetPreset, find_preset, get_preset

STRIDES = (
    PUBLISHED_STRIDES,
    ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)),
    ((1, 1), (2, 2), (2, 2), (2, 2), (2, 2), (2, 2)),
)


def build_preset(
    preset: STUNetPreset, strides: tuple, channels: int, outputs: int, device: str = "meta"
) -> Any:
    """Return the network of a size."""
    values = stunet_architecture(preset, strides).values()
    with torch.device(device):
        return get_network_from_plans(*values, channels, outputs, deep_supervision=True)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("name", ["tiny", "large"])
def test_arithmetic_agrees_with_the_network(name: str, strides: tuple) -> None:
    network = build_preset(get_preset(name), strides, 4, 7)
    shape = STUNetShape.of_preset(get_preset(name), strides, 4, 7)
    patch = (64, 96, 128)[: len(strides[0])]
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 4, *patch, device="meta"))
    assert shape.parameters() == sum(parameter.numel() for parameter in network.parameters())
    assert 2 * shape.multiply_adds(patch) == counter.get_total_flops()


@pytest.mark.parametrize(
    "preset", [preset for preset in PRESETS.values() if preset.paper_tera_flops]
)
def test_flops_are_the_papers_less_what_convolving_first_saves(preset: STUNetPreset) -> None:
    ours = STUNetShape.of_preset(preset).multiply_adds(REFERENCE_PATCH) / 1e12
    assert 0.97 * preset.paper_tera_flops <= ours <= preset.paper_tera_flops


@pytest.mark.parametrize("strides", STRIDES[:2])
def test_kept_activations_are_what_autograd_keeps(strides: tuple) -> None:
    preset = get_preset("tiny")
    network = build_preset(preset, strides, 1, 3, "cpu")
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    batch, patch = 2, (32, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = network(torch.randn(batch, 1, *patch))
    expected = batch * STUNetShape.of_preset(preset, strides, 1, 3).kept_activations(patch)
    statistics = sum(kept.values()) - expected
    assert outputs[0].shape == (batch, 3, *patch)
    # Mean and deviation of each norm and channel come on top.
    assert 0 <= statistics < 0.01 * expected


def test_memory_grows_with_everything_it_depends_on() -> None:
    def total(
        name: str = "base", patch: tuple = (96, 96, 96), batch: int = 2, outputs: int = 10
    ) -> float:
        return (
            STUNetShape.of_preset(get_preset(name), output_channels=outputs)
            .training_memory(patch, batch)
            .total
        )

    assert total() < total(name="large") < total(name="huge")
    assert total() < total(patch=(128, 128, 128))
    assert total() < total(batch=4)
    assert total() < total(outputs=100)


def test_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(
        PluginError, match=r"'larg'.*tiny, small, base, large, huge.*Did you mean large\?"
    ):
        get_preset("larg")


def test_find_preset_knows_published_sizes_alone() -> None:
    assert find_preset((32, 64, 128, 256, 512, 512), (1,) * 6) is PRESETS["base"]
    assert find_preset((32, 64, 128, 256, 512, 512), (2,) * 6) is None


def test_size_table_shows_every_size_and_refuses_what_does_not_fit() -> None:
    table = size_table(List(False, (128, 128, 128), 2, 1, 105))
    for preset in PRESETS.values():
        assert f"{preset.parameters:,}" in table
    assert "reduced by 8x8x8" in size_table(List(False, (40, 56, 40), 2, 1, 3))
    with pytest.raises(
        PluginError, match=r"\[33, 35, 7\] cannot be pooled: give even sizes of at least 8"
    ):
        size_table(List(False, (33, 35, 7), 2, 1, 105))
    with pytest.raises(PluginError, match="--batch-size must be at least 1, not 0"):
        size_table(List(False, (128, 128, 128), 0, 1, 105))


def test_adam_keeps_one_value_more_per_parameter_than_sgd() -> None:
    shape = STUNetShape.of_preset(get_preset("huge"))
    sgd, adam = (
        shape.training_memory((128,) * 3, 1, optimizer_values=values).total
        for values in (SGD_VALUES, ADAM_VALUES)
    )
    assert adam - sgd == 4 * shape.parameters()
