"""Window attention on volumes: the transformer that PCT-Net runs beside its convolutions.

Paper: MIS-FM, arXiv:2306.16925, after Liu et al., Swin Transformer, arXiv:2103.14030. Published
code: github.com/openmedlab/MIS-FM (Apache-2.0), read for facts, not copied. The same function as
published; deviations:

* Fused attention (``scaled_dot_product_attention``), bias and shift mask as an additive mask.
* What depends on the shape alone (tokens of windows, masks, rows of the bias table) is computed
  once per shape, not in every forward.
* Windows follow from the input, so a network takes volumes of any size.
* A bias table has one row per offset, see :class:`WindowAttention`.

Axes: tokens are (batch, *spatial, channel); windows (batch, window, token, channel).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from math import prod
from operator import index
from typing import Any, NamedTuple

import torch
from dynamic_network_architectures.building_blocks.regularization import DropPath
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.networks.activation_checkpointing import checkpointed
from stunet_plugin.networks.anisotropy import Triple

WINDOW_SIZE = 6  # voxels per axis of the published windows
TABLE_STD = 0.02  # of the published bias tables: a normal distribution cut at +-2
MASKED = -100.0
"""Added to the attention between regions that the cyclic shift has put side by side."""


class WindowLayout(NamedTuple):
    """How the tokens of a volume are put in windows; windows with the same mask are together."""

    window: int  # voxels per axis
    padded: Triple  # shape of the volume in whole windows
    order: Tensor  # (tokens,) where the windows' come from in the flattened padded volume
    inverse: Tensor  # (tokens,) where the padded volume's come from in the windows
    masks: Tensor  # (mask, token, token), 0 or ``MASKED``
    counts: list[int]  # windows that share each mask

    def gather(self, x: Tensor) -> Tensor:
        """(batch, *spatial, channel) to windows; padded voxels are zeros that take part in
        attention, as published."""
        sizes = zip(self.padded, x.shape[1:4], strict=True)
        depth, height, width = (whole - size for whole, size in sizes)
        x = functional.pad(x, (0, 0, 0, width, 0, height, 0, depth))
        tokens: Tensor = _Reorder.apply(x.flatten(1, 3), self.order, self.inverse)
        return tokens.unflatten(1, (-1, self.window**3))

    def scatter(self, windows: Tensor, shape: torch.Size) -> Tensor:
        """Windows to (batch, *spatial, channel) of this shape, padding cut off."""
        x = _Reorder.apply(windows.flatten(1, 2), self.inverse, self.order)
        return x.unflatten(1, self.padded)[:, : shape[1], : shape[2], : shape[3]]


def window_layout(shape: Triple, window: int, shift: int, device: torch.device) -> WindowLayout:
    """Return the layout of a padded volume, computed once per shape; in a compiled or exported
    graph, where tensors may not come from outside, by the graph itself."""
    build = _layout_tensors if torch.compiler.is_compiling() else _cached_layout_tensors
    return WindowLayout(window, shape, *build(shape, window, shift, device))


def _layout_tensors(
    shape: Triple, window: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Compute order, inverse, masks and counts.

    With a shift, the last window of an axis holds what has come around from its start, so windows
    are of eight kinds: last along none of the axes, the third, the second, ...
    """
    depth, height, width = grid = [size // window for size in shape]
    tokens = torch.arange(prod(shape), device=device).reshape(shape)
    tokens = torch.roll(tokens, [-shift] * 3, (0, 1, 2))
    windows = tokens.reshape(depth, window, height, window, width, window)
    # (window along each axis, token along each axis)
    parts = [windows.permute(0, 2, 4, 1, 3, 5)]
    # Which tokens of the last window of an axis have come around, so that their neighbours in the
    # window are none in the volume.
    around = torch.arange(window, device=device) >= window - shift
    apart = around[:, None] != around[None, :]
    pairs = [torch.zeros([window] * 6, dtype=torch.bool, device=device)]
    if shift:
        for axis in range(3):
            shape_of_pair = [window if other % 3 == axis else 1 for other in range(6)]
            pairs = [p for pair in pairs for p in (pair, pair | apart.reshape(shape_of_pair))]
            parts = [p for part in parts for p in part.split((grid[axis] - 1, 1), axis)]
    order = torch.cat([part.reshape(-1) for part in parts])
    inverse = torch.zeros_like(order).scatter(0, order, torch.arange(len(order), device=device))
    masks = [pair.reshape(window**3, window**3) * MASKED for pair in pairs]
    kinds = [(count - 1, 1) if shift else (count,) for count in grid]
    counts = list(map(prod, itertools.product(*kinds)))
    return order, inverse, torch.stack(masks), counts


def offset_rows(window: int, window_size: int, device: torch.device | None = None) -> Tensor:
    """Return the row of a table for windows of ``window_size`` that the offset of token i from
    token j reads, (window^3, window^3).

    Rows are in the order of the offsets (axis 0, 1, 2), each from ``1 - window_size`` up; a smaller
    window reads the rows of the offsets that it knows.
    """
    places = torch.arange(window, device=device)
    offsets = places[:, None] - places[None, :] + window_size - 1
    code = torch.zeros([window] * 6, dtype=torch.long, device=device)
    for axis in range(3):
        pair = [window if other % 3 == axis else 1 for other in range(6)]
        code = code * (2 * window_size - 1) + offsets.reshape(pair)
    return code.reshape(window**3, window**3)


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    # Ordinary tensors even when first asked for in inference mode, or training could not use them.
    return functools.lru_cache(maxsize=64)(torch.inference_mode(False)(function))


_cached_layout_tensors, _cached_offset_rows = _once(_layout_tensors), _once(offset_rows)


class _Reorder(torch.autograd.Function):
    """Take the tokens (axis 1) in another order. The gradient goes back by the inverse order, where
    index_select's own would add up token by token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None


class _ChannelsFirst(torch.autograd.Function):
    """(batch, *spatial, channel) to (batch, channel, *spatial). The gradient goes back contiguous:
    torch's traced dropout takes it for that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.movedim(-1, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.movedim(1, -1).contiguous()


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias for the offset between two tokens.

    The table has one row per offset in a full window, (2 * window_size - 1)^3; a smaller window
    reads the rows of its offsets. So weights fit any plan, and an offset in voxels means the same
    in windows of all sizes. Published tables depend on the window, and some of their offsets share
    a row: :mod:`stunet_plugin.weights.misfm_keys` translates them, function for function.
    ``dropout`` is of attention weights and of the output.
    """

    def __init__(
        self, channels: int, num_heads: int, window_size: int, shift: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.dropout = dropout
        table = torch.empty((2 * window_size - 1) ** 3, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.relative_position_bias_table, std=TABLE_STD)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, depth, height, width, channel) to the same shape."""
        layout = self.layout(x)
        attend = self.attend
        if self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
            # torch's fused attention of the CPU has no dropout and no gradient of the mask, so it
            # would keep all weights.
            attend = functools.partial(checkpointed, self, self.attend)
        windows = layout.gather(x).split(layout.counts, 1)
        attended = map(attend, windows, self.masks(layout))
        x = layout.scatter(torch.cat(list(attended), 1), x.shape)
        return functional.dropout(self.proj(x), self.dropout, self.training)

    def layout(self, x: Tensor) -> WindowLayout:
        """Return the windows of a volume (batch, depth, height, width, channel)."""
        # Numbers, not symbols: torch.compile makes a graph per shape.
        shape = [index(size) for size in x.shape[1:4]]
        window, shift = self.window_size, self.shift
        if min(shape) <= window:
            # As published: the window becomes the smallest axis, and nothing is shifted.
            window, shift = min(shape), 0
        depth, height, width = [-(-size // window) * window for size in shape]
        return window_layout((depth, height, width), window, shift, x.device)

    def masks(self, layout: WindowLayout) -> list[Tensor]:
        """Return bias plus mask, (head, token, token), for the windows of each mask."""
        rows_of = offset_rows if torch.compiler.is_compiling() else _cached_offset_rows
        table = self.relative_position_bias_table
        rows = rows_of(layout.window, self.window_size, table.device)
        bias = table.index_select(0, rows.flatten()).t().reshape(self.num_heads, *rows.shape)
        return [bias + mask for mask in layout.masks]

    def attend(self, windows: Tensor, mask: Tensor) -> Tensor:
        """Windows, and what is added to the attention (head, token, token), to windows."""
        qkv = self.qkv(windows.flatten(0, 1)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(q, k, v, mask[None].to(q.dtype), dropout)
        return attended.transpose(1, 2).reshape(windows.shape)


class TransformerBlock(nn.Module):
    """LayerNorm - window attention, plus the input; LayerNorm - MLP, plus its input."""

    def __init__(
        self,
        attention: WindowAttention,
        channels: int,
        mlp_ratio: int,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = attention
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, mlp_ratio * channels),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_ratio * channels, channels),
            nn.Dropout(dropout),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *spatial, channel) to the same shape."""
        y = self.drop_path(self.attention(self.norm1(x)))
        y += x
        return y + self.drop_path(self.mlp(self.norm2(y)))


class WindowTransformer(nn.Module):
    """Transformer blocks on a feature map, every second one with its windows shifted by half.

    ``dropout`` is of the input, attention weights, and outputs of linear layers, ``drop_path`` the
    probability that a sample skips a residual branch in training.
    """

    def __init__(
        self,
        channels: int,
        dropout: float,
        num_heads: int,
        depth: int,
        window_size: int,
        mlp_ratio: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for block in range(depth):
            shift = window_size // 2 if block % 2 else 0
            attention = WindowAttention(channels, num_heads, window_size, shift, dropout)
            self.blocks.append(TransformerBlock(attention, channels, mlp_ratio, dropout, drop_path))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channel, *spatial) to the same shape."""
        x = self.dropout(x.movedim(1, -1).contiguous())
        for block in self.blocks:
            x = block(x)
        channels_first: Tensor = _ChannelsFirst.apply(x)
        return channels_first
