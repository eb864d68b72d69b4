"""Window attention on volumes: the transformer that PCT-Net runs beside its convolutions.

Paper: MIS-FM, arXiv:2306.16925, after Liu et al., Swin Transformer, arXiv:2103.14030. Published
    code:
github.com/openmedlab/MIS-FM (Apache-2.0), read for facts, not copied. Same function as published;
what differs:

* Fused attention (``scaled_dot_product_attention``) with bias and shift mask as an additive mask.
* Which token stands in which window, which windows need a mask, and which row of the bias table a
  pair of tokens reads
  depend on the shape alone: they are computed once per shape (:func:`window_layout`), not in every
      forward.
* Windows follow from the input, so a network takes volumes of any size.
* A bias table has one row per offset, see :class:`WindowAttention`.

Axes: tokens are (batch, *spatial, channel); windows (batch, window, token, channel).
"""

from __future__ import annotations

import functools
import itertools
from math import prod
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.networks import cpu_inference
from stunet_plugin.networks.activation_checkpointing import checkpointed
from stunet_plugin.networks.anisotropy import Triple

WINDOW_SIZE = 6
"""Voxels per axis of the published windows."""

TABLE_STD = 0.02
"""Standard deviation of the published initialisation of the bias tables (a normal distribution cut
at +-2)."""

MASKED = -100.0
"""Added to the attention between regions that the cyclic shift has put side by side."""


class WindowLayout(NamedTuple):
    """How the tokens of a padded volume stand in windows; windows with the same mask stand
    together.

    Attributes:
        order: (tokens,) where the tokens of all windows, in turn, come from in the flattened
            volume.
        inverse: (tokens,) where the tokens of the flattened volume come from in the windows.
        masks: (mask, token, token), 0 or ``MASKED``.
    """

    order: Tensor
    inverse: Tensor
    masks: Tensor


def window_in_use(shape: Triple, window_size: int, shift: int) -> tuple[int, int]:
    """Return window size and shift for a volume: where its smallest axis is not larger than the
    window, the window becomes that axis and nothing is shifted."""
    smallest = min(shape)
    return (smallest, 0) if smallest <= window_size else (window_size, shift)


def padded_shape(shape: Triple, window: int) -> Triple:
    """Return the shape in whole windows."""
    depth, height, width = [-(-size // window) * window for size in shape]
    return depth, height, width


def windows_per_mask(grid: list[int], shift: int) -> list[int]:
    """Return how many windows share each mask, in the order of :class:`WindowLayout`.

    With a shift, the last window of an axis holds what has come around from its start, so windows
        are of eight kinds: last
    along none of the axes, along the first, the second, ...
    """
    if shift == 0:
        return [prod(grid)]
    return [prod(counts) for counts in itertools.product(*[(count - 1, 1) for count in grid])]


def window_layout(shape: Triple, window: int, shift: int, device: torch.device) -> WindowLayout:
    """Return the layout of a padded volume, computed once per shape; in a compiled or exported
    graph, where tensors may not come from outside, by the graph itself."""
    build = build_layout if torch.compiler.is_compiling() else _cached_layout
    return build(shape, window, shift, device)


def build_layout(shape: Triple, window: int, shift: int, device: torch.device) -> WindowLayout:
    """Compute a layout with operations whose shapes depend on the arguments alone."""
    depth, height, width = [size // window for size in shape]
    tokens = torch.arange(prod(shape), device=device).reshape(shape)
    if shift:
        tokens = torch.roll(tokens, [-shift] * 3, (0, 1, 2))
    windows = tokens.reshape(depth, window, height, window, width, window)
    windows = windows.permute(0, 2, 4, 1, 3, 5)
    # Which tokens of the last window of an axis have come around, so that their neighbours in the
    # window are none in the volume.
    around = torch.arange(window, device=device) >= window - shift
    apart = around[:, None] != around[None, :]
    apart = torch.stack([apart, torch.zeros_like(apart)])
    order, masks = [], []
    for last in itertools.product((0, 1), repeat=3) if shift else ((0, 0, 0),):
        if shift:
            part = windows
            for axis, (is_last, count) in enumerate(zip(last, windows.shape[:3], strict=True)):
                start, length = (count - 1, 1) if is_last else (0, count - 1)
                part = part.narrow(axis, start, length)
        else:
            part = windows
        order.append(part.reshape(-1))
        one, two, three = [apart[1 - is_last] for is_last in last]
        mask = (
            one[:, None, None, :, None, None]
            | two[None, :, None, None, :, None]
            | three[None, None, :, None, None, :]
        )
        masks.append(mask.reshape(window**3, window**3) * MASKED)
    joined = torch.cat(order)
    inverse = torch.zeros_like(joined).scatter(0, joined, torch.arange(len(joined), device=device))
    return WindowLayout(joined, inverse, torch.stack(masks))


@functools.lru_cache(maxsize=64)
def _cached_layout(shape: Triple, window: int, shift: int, device: torch.device) -> WindowLayout:
    # Ordinary tensors even when first asked for in inference mode, or training could not use them.
    with torch.inference_mode(False):
        return build_layout(shape, window, shift, device)


def offset_rows(window: int, window_size: int, device: torch.device | None = None) -> Tensor:
    """Return which row of a table for windows of ``window_size`` each offset between two tokens
    reads.

    Rows are in the order of the offsets (axis 0, 1, 2), each from ``1 - window_size`` to
    ``window_size - 1``; a smaller window reads the rows of the offsets that it knows.

    Returns:
        (window^3, window^3): row of the offset of token i from token j.
    """
    rows = 2 * window_size - 1
    places = torch.arange(window, device=device)
    offsets = places[:, None] - places[None, :] + window_size - 1
    code = torch.zeros((window,) * 6, dtype=torch.long, device=device)
    for axis in range(3):
        code = code * rows + offsets.reshape(
            [window if other % 3 == axis else 1 for other in range(6)]
        )
    return code.reshape(window**3, window**3)


@functools.lru_cache(maxsize=64)
def _cached_offset_rows(window: int, window_size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return offset_rows(window, window_size, device)


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

    The table holds one row per offset that a full window knows, (2 * window_size - 1)^3 of them,
    whatever the window in use: a smaller window reads the rows of its offsets. So the state dict
        has the same shapes for every patch size, an offset in
    voxels means the same in windows of all sizes, and weights fit any plan.

    The published table depends on the window that the network was built for, and its index has a
    quirk that lets different offsets share a row. :mod:`stunet_plugin.weights.misfm_keys`
    translates such tables to this one, function for function.

    Args:
        channels: of the tokens.
        num_heads: divides the channels.
        window_size: of a full window, voxels per axis.
        shift: by how much the windows are moved along each axis.
        dropout: of attention weights and of the output.
    """

    def __init__(
        self, channels: int, num_heads: int, window_size: int, shift: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.dropout = dropout
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window_size - 1) ** 3, num_heads)
        )
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.relative_position_bias_table, std=TABLE_STD)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, depth, height, width, channel) to the same shape."""
        # Numbers, not symbols: torch.compile makes a graph per shape, with the layout as a
        # constant.
        shape = depth, height, width = index(x.shape[1]), index(x.shape[2]), index(x.shape[3])
        window, shift = window_in_use(shape, self.window_size, self.shift)
        padded = padded_shape(shape, window)
        # Padded voxels are zeros that take part in attention as in the published code; only regions
        # are masked.
        if padded != shape:
            x = functional.pad(
                x, (0, 0, 0, padded[2] - width, 0, padded[1] - height, 0, padded[0] - depth)
            )
        layout = window_layout(padded, window, shift, x.device)
        tokens = _Reorder.apply(x.flatten(1, 3), layout.order, layout.inverse)

        parts = tokens.unflatten(1, (-1, window**3)).split(
            windows_per_mask([size // window for size in padded], shift), 1
        )
        bias = self._bias(window)
        if cpu_inference.applies(self, x):
            for part, mask in zip(parts, bias + layout.masks[:, None], strict=True):
                cpu_inference.in_place(functools.partial(self._attend, mask=mask), part, axis=1)
        else:
            attend = self._attend
            if self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
                # torch's fused attention of the CPU has no dropout and no gradient of the mask, so
                # it would keep all weights.
                attend = functools.partial(checkpointed, self, self._attend)
            attended = [
                attend(part, bias + mask) for part, mask in zip(parts, layout.masks, strict=True)
            ]
            tokens = (attended[0] if len(attended) == 1 else torch.cat(attended, 1)).flatten(1, 2)

        x = _Reorder.apply(tokens, layout.inverse, layout.order).unflatten(1, padded)
        if padded != shape:
            x = x[:, :depth, :height, :width]
        return functional.dropout(self.proj(x), self.dropout, self.training)

    def _bias(self, window: int) -> Tensor:
        """Return the bias of all pairs of tokens, (head, token, token)."""
        rows_of = offset_rows if torch.compiler.is_compiling() else _cached_offset_rows
        table = self.relative_position_bias_table
        rows = rows_of(window, self.window_size, table.device)
        return table.index_select(0, rows.flatten()).t().reshape(self.num_heads, *rows.shape)

    def _attend(self, windows: Tensor, mask: Tensor) -> Tensor:
        """(batch, window, token, channel) and an additive mask (head, token, token) to the first
        shape."""
        q, k, v = (
            self.qkv(windows.flatten(0, 1))
            .unflatten(-1, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(q, k, v, mask[None].to(q.dtype), dropout)
        return attended.transpose(1, 2).reshape(windows.shape)


class DropPath(nn.Module):
    """In training, drop whole samples of a residual branch and scale up the others, so that the
    mean is kept."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(kept).div_(kept)


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
        y = self.drop_path(self.attention(self.norm1(x)))
        y += x
        if cpu_inference.applies(self, x):
            return cpu_inference.in_place(
                lambda slab: self.mlp(self.norm2(slab)), y, axis=1, add=True
            )
        return y + self.drop_path(self.mlp(self.norm2(y)))


class WindowTransformer(nn.Module):
    """Transformer blocks on a feature map, every second one with its windows shifted by half.

    Args:
        channels: of the feature map.
        dropout: of the input, attention weights, and outputs of linear layers.
        num_heads, window_size: see :class:`WindowAttention`.
        depth: blocks.
        mlp_ratio: hidden width of the MLP over the channels.
        drop_path: see :class:`DropPath`.
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
        shifts = [0 if block % 2 == 0 else window_size // 2 for block in range(depth)]
        self.blocks = nn.ModuleList(
            TransformerBlock(
                WindowAttention(channels, num_heads, window_size, shift, dropout),
                channels,
                mlp_ratio,
                dropout,
                drop_path,
            )
            for shift in shifts
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channel, *spatial) to the same shape."""
        x = self.dropout(x.movedim(1, -1).contiguous())
        for block in self.blocks:
            x = block(x)
        channels_first: Tensor = _ChannelsFirst.apply(x)
        return channels_first
