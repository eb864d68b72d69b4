"""Sizes, their arithmetic, and the table of `stunet list`: held against the network itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stunet_plugin.commands.list import List, size_table
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.memory import (
    ADAM_VALUES,
    PUBLISHED_STRIDES,
    REFERENCE_PATCH,
    SGD_VALUES,
    STUNetShape,
)
from stunet_plugin.networks.presets import PRESETS, STUNetPreset, find_preset, get_preset
from stunet_plugin.networks.stunet import STUNet

STRIDES = (
    PUBLISHED_STRIDES,
    ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)),
    ((1, 1), (2, 2), (2, 2), (2, 2), (2, 2), (2, 2)),
)


def build(
    preset: STUNetPreset,
    strides: tuple,
    channels: int = 1,
    outputs: int = 105,
    device: str = "meta",
) -> STUNet:
    with torch.device(device):
        return STUNet(
            channels,
            outputs,
            6,
            preset.features_per_stage,
            nn.Conv3d if len(strides[0]) == 3 else nn.Conv2d,
            3,
            strides,
            preset.blocks,
            preset.blocks,
            deep_supervision=True,
        )


@pytest.mark.parametrize("name", ["small", "base", "large", "huge"])
def test_published_parameter_counts_to_the_unit(name: str) -> None:
    published = {
        "small": 14_596_941,
        "base": 58_262_669,
        "large": 440_302_605,
        "huge": 1_457_326_221,
    }
    network = build(get_preset(name), PUBLISHED_STRIDES)
    assert (
        sum(parameter.numel() for parameter in network.parameters())
        == published[name]
        == get_preset(name).parameters
    )


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("name", ["tiny", "large"])
def test_arithmetic_agrees_with_the_network(name: str, strides: tuple) -> None:
    network = build(get_preset(name), strides, channels=4, outputs=7)
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
    network = build(preset, strides, outputs=3, device="cpu")
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
