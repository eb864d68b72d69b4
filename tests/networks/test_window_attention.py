"""Window attention: the published function at every size, tables that fit every window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stunet_plugin.networks import window_attention
from stunet_plugin.networks.window_attention import WindowTransformer, offset_rows
from stunet_plugin.weights.misfm_keys import translate_pctnet, translate_table

from network_helpers import plain_module, randomise

CHANNELS, HEADS = 8, 2
SHAPES = {
    "whole windows": (12, 18, 12),
    "padded": (7, 8, 13),
    "smallest axis as long as the window: not shifted": (6, 9, 8),
    "smaller window": (4, 8, 9),
    "window of one voxel": (1, 2, 3),
}


def transformer() -> WindowTransformer:
    torch.manual_seed(0)
    return WindowTransformer(CHANNELS, 0.2, HEADS, 2, window_size=6, mlp_ratio=4, drop_path=0.2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_published_function_and_its_gradients(shape: tuple[int, ...]) -> None:
    plain = plain_module("pctnet")
    network = randomise(plain.PlainTransformer(CHANNELS, shape, HEADS, 0.2).double().eval())
    prefix, own = "pyramid_ct.convtrans_e2.trans.", "encoder.stages.2.2.transformer."
    weights = {prefix + key: value for key, value in network.state_dict().items()}
    ours = transformer().double().eval()
    translated = translate_pctnet(weights, mode=0).items()
    ours.load_state_dict({key.removeprefix(own): value for key, value in translated})

    def published(x: Tensor) -> Tensor:
        return network(x.flatten(2).transpose(1, 2), shape).transpose(1, 2).unflatten(2, shape)

    x = torch.randn(2, CHANNELS, *shape, dtype=torch.float64, requires_grad=True)
    expected = published(x)
    # What inference mode has computed for a shape must serve training, too.
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(x)
    (expected_gradient,) = torch.autograd.grad(expected, x, direction)
    (gradient,) = torch.autograd.grad(ours(x), x, direction)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_published_tables_keep_their_function_whatever_window_they_were_built_for(
    window: int,
) -> None:
    attention = plain_module("pctnet").PlainAttention(CHANNELS, HEADS, window, 0.0)
    table = attention.relative_position_bias_table.detach()
    published = table[attention.relative_position_index]
    ours = translate_table(table, 6)
    assert ours.shape == (11**3, HEADS)
    assert torch.equal(ours[offset_rows(window, 6)], published)
    # Offsets that the window does not know take the nearest that it does.
    cube = ours.reshape(11, 11, 11, HEADS)
    assert torch.equal(cube[0, 5, 10], cube[6 - window, 5, 4 + window])


def test_layouts_are_made_once_per_shape_and_stay_out_of_the_state_dict() -> None:
    network, x = transformer().eval(), torch.randn(1, CHANNELS, 7, 12, 9)
    window_attention._cached_layout_tensors.cache_clear()
    with torch.inference_mode():
        network(x)
    made = window_attention._cached_layout_tensors.cache_info().misses
    assert made == 2  # with and without shift
    # What inference mode has made must serve training, too.
    network.train()
    network(x).sum().backward()
    assert window_attention._cached_layout_tensors.cache_info().misses == made
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph_for_shapes_that_change(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    network = transformer().eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=dynamic)
    for shape in ((1, 7, 8, 9), (2, 7, 8, 9), (2, 4, 6, 8)):
        x = torch.randn(shape[0], CHANNELS, *shape[1:])
        torch.testing.assert_close(compiled(x), network(x))
