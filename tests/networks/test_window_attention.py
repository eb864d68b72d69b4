"""Window attention: the published function at every size, tables that fit every window, layouts
made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import window_attention
from stunet_plugin.networks.window_attention import WindowTransformer, offset_rows, windows_per_mask
from stunet_plugin.weights.misfm_keys import (
    published_rows,
    resample_table,
    translate_pctnet,
    translate_table,
    window_of_table,
)

from network_helpers import plain_module, randomise

CHANNELS, HEADS = 8, 2
SHAPES = {
    "whole windows": (12, 18, 12),
    "padded": (7, 8, 13),
    "smallest axis as long as the window: not shifted": (6, 9, 8),
    "smaller window": (4, 8, 9),
    "window of one voxel": (1, 2, 3),
}


@pytest.fixture
def plain(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: ModuleType = plain_module("pctnet", repository, monkeypatch)
    return module


def transformer(**changes: float) -> WindowTransformer:
    torch.manual_seed(0)
    arguments = {
        "dropout": 0.2,
        "num_heads": HEADS,
        "depth": 2,
        "window_size": 6,
        "mlp_ratio": 4,
        "drop_path": 0.2,
        **changes,
    }
    return WindowTransformer(CHANNELS, **arguments)


@pytest.fixture
def pair(
    plain: ModuleType,
) -> Callable[[tuple[int, ...]], tuple[Callable[[Tensor], Tensor], WindowTransformer]]:
    """A published transformer for a shape, and ours with the same weights; both in float64 and eval
    mode."""

    def make(shape: tuple[int, ...]) -> tuple[Callable[[Tensor], Tensor], WindowTransformer]:
        published = randomise(plain.PlainTransformer(CHANNELS, shape, HEADS, 0.2).double().eval())
        prefix, own = "pyramid_ct.convtrans_e2.trans.", "encoder.stages.2.2.transformer."
        weights = translate_pctnet(
            {prefix + key: value for key, value in published.state_dict().items()}, mode=0
        )
        ours = transformer().double().eval()
        ours.load_state_dict({key.removeprefix(own): value for key, value in weights.items()})

        def run(x: Tensor) -> Tensor:
            return (
                published(x.flatten(2).transpose(1, 2), shape).transpose(1, 2).unflatten(2, shape)
            )

        return run, ours

    return make


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_published_function_and_its_gradients(pair: Callable, shape: tuple[int, ...]) -> None:
    published, ours = pair(shape)
    x = torch.randn(2, CHANNELS, *shape, dtype=torch.float64, requires_grad=True)
    expected = published(x)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(x)
    (expected_gradient,) = torch.autograd.grad(expected, x, direction)
    (gradient,) = torch.autograd.grad(ours(x), x, direction)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-11)


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


def test_windows_with_the_same_mask_are_together() -> None:
    assert windows_per_mask([2, 3, 4], shift=0) == [24]
    counts = windows_per_mask([2, 3, 4], shift=3)
    # Last along none of the axes, the third, the second, both, the first, ...
    assert counts == [6, 2, 3, 1, 6, 2, 3, 1]
    layout = window_attention.window_layout((12, 18, 24), 6, 3, torch.device("cpu"))
    assert layout.masks.shape == (8, 216, 216)
    assert layout.masks[0].count_nonzero() == 0
    assert (layout.masks[7] == 0).float().mean() == 1 / 8  # eight regions of 27 tokens
    assert torch.equal(layout.order[layout.inverse], torch.arange(12 * 18 * 24))


def test_a_smaller_window_reads_the_rows_of_its_offsets() -> None:
    rows = offset_rows(3, 6).reshape((3,) * 6)
    for one, other in (((0, 0, 0), (0, 0, 0)), ((2, 0, 1), (0, 1, 1)), ((0, 2, 0), (2, 0, 2))):
        offsets = [a - b + 5 for a, b in zip(one, other, strict=True)]
        assert rows[one + other] == (offsets[0] * 11 + offsets[1]) * 11 + offsets[2]
    # Larger windows hold the same offsets, so the same rows.
    assert set(offset_rows(3, 6).unique().tolist()) < set(offset_rows(4, 6).unique().tolist())


@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_published_tables_keep_their_function_whatever_window_they_were_built_for(
    plain: ModuleType, window: int
) -> None:
    attention = plain.PlainAttention(CHANNELS, HEADS, window, 0.0)
    table = attention.relative_position_bias_table.detach()
    published = table[attention.relative_position_index]
    ours = translate_table(table, 6)
    assert ours.shape == (11**3, HEADS)
    assert torch.equal(ours[offset_rows(window, 6)], published)
    # The quirk: offsets share rows, so most of a table is never read.
    assert published_rows(window).max() == (2 * window - 2) * (5 * window - 1)


def test_tables_of_another_window_are_resampled() -> None:
    table = torch.randn(11**3, HEADS)
    assert torch.equal(resample_table(table, 6), table)
    smaller = resample_table(table, 4)
    assert torch.equal(
        smaller.reshape(7, 7, 7, HEADS), table.reshape(11, 11, 11, HEADS)[2:9, 2:9, 2:9]
    )
    assert torch.equal(resample_table(resample_table(smaller, 6), 4), smaller)
    # Offsets that the smaller window does not know take the nearest that it does.
    larger = resample_table(smaller, 6).reshape(11, 11, 11, HEADS)
    assert torch.equal(larger[0, 5, 10], smaller.reshape(7, 7, 7, HEADS)[0, 3, 6])


def test_a_table_of_no_window_is_refused() -> None:
    assert [window_of_table((2 * window - 1) ** 3) for window in (1, 2, 6, 7)] == [1, 2, 6, 7]
    with pytest.raises(PluginError, match=r"1330 is none of"):
        resample_table(torch.zeros(1330, 4), 6)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph_for_shapes_that_change(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    network = transformer().eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=dynamic)
    for shape in ((1, 7, 8, 9), (2, 7, 8, 9), (2, 4, 6, 8)):
        x = torch.randn(shape[0], CHANNELS, *shape[1:])
        torch.testing.assert_close(compiled(x), network(x))
