"""Activation checkpointing of STU-Net: the same gradients for one more forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stunet_plugin.networks.activation_checkpointing import BLOCK, OFF, SETTINGS, STAGE
from stunet_plugin.networks.memory import STUNetShape

from network_helpers import build, gradients

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))
FEATURES, BLOCKS = (4, 8, 16, 16), (2, 1, 3, 2)
PATCH = (8, 16, 32)


def network_with(setting: str, blocks: tuple[int, ...] = BLOCKS, strides: Any = STRIDES) -> Any:
    sizes = {"n_stages": 4, "features_per_stage": FEATURES, "strides": strides}
    depths = {"n_blocks_per_stage": blocks, "n_blocks_per_stage_decoder": blocks[-2::-1]}
    network = build("STUNet", **sizes, **depths)
    network.checkpointing = setting
    return network


@pytest.mark.parametrize("setting", [STAGE, BLOCK])
def test_gradients_are_the_same_to_the_bit_also_under_autocast(setting: str) -> None:
    data = torch.randn(2, 1, *PATCH)
    plain, checkpointed = network_with(OFF), network_with(setting)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            expected, found = gradients(plain, data), gradients(checkpointed, data)
        # torch's bfloat16 gradients of the weights of maps as small as the deepest are not
        # reproducible on the CPU.
        keys = [key for key, grad in expected.items() if grad.ndim == 1 or not mixed]
        assert all(torch.equal(found[key], expected[key]) for key in keys)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    with torch.no_grad():
        assert all(map(torch.equal, plain(data), checkpointed(data)))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("strides", "blocks"), [(STRIDES, BLOCKS), (((1, 1, 1), *[(2, 2, 2)] * 3), (1, 1, 1, 1))]
)
def test_kept_activations_are_what_autograd_keeps(
    setting: str, strides: Any, blocks: tuple[int, ...]
) -> None:
    network = network_with(setting, blocks, strides)
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights and tensor.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = network(torch.randn(2, 1, *PATCH))
    shape = STUNetShape(FEATURES, blocks, strides, 1, 3)
    statistics = sum(kept.values()) - 2 * shape.kept_activations(PATCH, setting)
    assert len(outputs) == 3
    # Mean and deviation of each norm and channel, where the norm's own are kept.
    norms = 2 * 2 * 2 * sum(width for _, _, width, _ in shape._blocks())
    assert statistics == (norms if setting == OFF else 0)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of off, stage, block, not 'blocks'"):
        network_with("blocks")
