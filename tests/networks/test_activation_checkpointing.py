"""Activation checkpointing of STU-Net: the same gradients for less memory and one more forward
pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from stunet_plugin.networks.activation_checkpointing import BLOCK, OFF, SETTINGS, STAGE
from stunet_plugin.networks.memory import STUNetShape
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.trainers.activation_checkpointing import leanest

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))
FEATURES, BLOCKS = (4, 8, 16, 16), (2, 1, 3, 2)
PATCH = (8, 16, 32)


def build(setting: str, blocks: tuple[int, ...] = BLOCKS, strides: Any = STRIDES) -> STUNet:
    torch.manual_seed(0)
    network = STUNet(
        1, 3, 4, FEATURES, nn.Conv3d, 3, strides, blocks, blocks[-2::-1], deep_supervision=True
    )
    network.apply(network.initialize)
    network.checkpointing = setting
    return network


def gradients(network: Any, data: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad(set_to_none=True)
    sum(output.float().square().mean() for output in network(data)).backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("setting", [STAGE, BLOCK])
def test_gradients_are_the_same_to_the_bit_also_under_autocast(setting: str) -> None:
    data = torch.randn(2, 1, *PATCH)
    plain, checkpointed = build(OFF), build(setting)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            pairs = list(zip(gradients(plain, data), gradients(checkpointed, data), strict=True))
        # torch's bfloat16 gradients of the weights of maps as small as the deepest are not
        # reproducible on the CPU.
        assert all(torch.equal(*pair) for pair in pairs if pair[0].ndim == 1 or not mixed)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(plain(data), checkpointed(data), strict=True))


@pytest.mark.parametrize("setting", [STAGE, BLOCK])
def test_the_price_is_one_more_forward_pass(setting: str) -> None:
    """No more: the heads and what is behind the last activation that is needed are not computed
    again."""
    data = torch.randn(1, 1, *PATCH)
    counts = []
    for network in (build(OFF), build(setting)):
        with FlopCounterMode(display=False) as forward:
            network(data)
        with FlopCounterMode(display=False) as step:
            gradients(network, data)
        counts.append((forward.get_total_flops(), step.get_total_flops()))
    (forward_plain, plain), (forward_checkpointed, checkpointed) = counts
    assert forward_plain == forward_checkpointed
    assert 0.9 * forward_plain < checkpointed - plain <= forward_plain


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strides", [STRIDES, ((1, 1, 1), *[(2, 2, 2)] * 3)])
@pytest.mark.parametrize("blocks", [BLOCKS, (1, 1, 1, 1)])
def test_kept_activations_are_what_autograd_keeps(
    setting: str, strides: Any, blocks: tuple[int, ...]
) -> None:
    network = build(setting, blocks, strides)
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


@pytest.mark.slow
def test_no_graph_breaks_and_another_setting_is_compiled_again() -> None:
    network = STUNet(
        1, 3, 2, FEATURES[:2], nn.Conv3d, 3, STRIDES[:2], (1, 2), 2, deep_supervision=True
    )
    data = torch.randn(1, 1, 8, 16, 16)
    expected = gradients(network, data)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter)
    for number, setting in enumerate(SETTINGS):
        network.checkpointing = setting
        for found, given in zip(gradients(compiled, data), expected, strict=True):
            torch.testing.assert_close(found, given, rtol=1e-4, atol=1e-6)
        assert counter.frame_count == number + 1
    for setting in (STAGE, BLOCK):
        network.checkpointing = setting
        explanation = torch._dynamo.explain(network)(data)
        assert explanation.graph_break_count == 0, explanation.break_reasons


def test_estimates_order_the_settings_by_what_dominates() -> None:
    def estimates(size: str, outputs: int, processes: int = 1) -> dict[str, float]:
        shape = STUNetShape.of_preset(PRESETS[size], output_channels=outputs)
        return {
            setting: shape.training_memory(
                (128,) * 3, 2, checkpointing=setting, processes=processes
            )
            for setting in SETTINGS
        }

    # One stage computed again is more than one block; with a large loss what is kept at that time
    # decides.
    assert leanest(estimates("huge", 16)) == BLOCK
    assert leanest(estimates("huge", 105)) == STAGE
    assert estimates("base", 16)[STAGE] == estimates("base", 16)[BLOCK] < estimates("base", 16)[OFF]
    saved = estimates("huge", 16)[BLOCK] - estimates("huge", 16, processes=4)[BLOCK]
    assert saved == pytest.approx(
        12 * 0.75 * STUNetShape.of_preset(PRESETS["huge"], output_channels=16).parameters()
    )


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of off, stage, block, not 'blocks'"):
        build("blocks")
