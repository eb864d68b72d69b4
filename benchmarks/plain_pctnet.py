"""Published PCT-Net written down plainly, as the yardstick of ``step.py``.

Paper: MIS-FM, arXiv:2306.16925. Step by step as published: stems and heads of all three anisotropy
modes are built and one of each is used; attention multiplies, adds bias and mask, takes the softmax
and multiplies again; the masks of the shifted windows are made in every forward; a window is as
large as the size the network was built for allows. Parameter names are the published ones.

Axes of feature maps: (batch, channel, *spatial); of tokens: (batch, token, channel).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from einops import rearrange
from plain_fmunet import PlainUp, conv, named
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.networks.anisotropy import MODES, Triple, get_mode
from stunet_plugin.networks.pctnet import DEPTH, DROP_PATH, MLP_RATIO, NUM_HEADS
from stunet_plugin.networks.window_attention import MASKED, TABLE_STD, WINDOW_SIZE

Ints, Floats, Triples, Shape = Sequence[int], Sequence[float], Sequence[Triple], tuple[int, ...]


def norm_act(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm3d(channels), nn.PReLU()]


def plain_unit(in_channels: int, out_channels: int, kernel: Triple) -> nn.Sequential:
    """norm - activation - convolution."""
    unit = nn.Sequential(*norm_act(in_channels), conv(in_channels, out_channels, kernel))
    return named(conv=unit)


def plain_down(in_channels: int, out_channels: int, kernel: Triple, pooling: Triple) -> nn.Module:
    """A unit behind a max-pooling."""
    unit = plain_unit(in_channels, out_channels, kernel)
    return named(pool=nn.MaxPool3d(pooling), conv=unit.conv)


def plain_conv_block(channels: int, kernel: Triple, dropout: float) -> nn.Sequential:
    """norm - activation - convolution - norm - activation - dropout - convolution."""
    first, second = (conv(channels, channels, kernel) for _ in range(2))
    before, between = norm_act(channels), [*norm_act(channels), nn.Dropout(dropout)]
    return named(conv_conv=nn.Sequential(*before, first, *between, second))


def plain_up(skip: int, deep: int, scale: Triple, kernel: Triple) -> PlainUp:
    """Narrows while it upsamples."""
    up = nn.Sequential(*norm_act(deep), nn.ConvTranspose3d(deep, skip, scale, scale))
    return PlainUp(up, nn.Sequential(*norm_act(2 * skip), conv(2 * skip, skip, kernel)))


def plain_mlp(channels: int, dropout: float) -> nn.Sequential:
    wide, drops = MLP_RATIO * channels, [nn.Dropout(dropout) for _ in range(2)]
    fc1, fc2 = nn.Linear(channels, wide), nn.Linear(wide, channels)
    return named(fc1=fc1, act=nn.GELU(), drop1=drops[0], fc2=fc2, drop2=drops[1])


def into_windows(x: Tensor, window: int) -> Tensor:
    """(batch, depth, height, width, channel) to (batch * windows, tokens of a window, channel)."""
    pattern = "b (d i) (h j) (w k) c -> (b d h w) (i j k) c"
    return rearrange(x, pattern, i=window, j=window, k=window)


def out_of_windows(windows: Tensor, window: int, shape: Shape) -> Tensor:
    """The reverse of :func:`into_windows` for a volume of a shape."""
    count = dict(zip("dhw", (size // window for size in shape), strict=True))
    pattern = "(b d h w) (i j k) c -> b (d i) (h j) (w k) c"
    return rearrange(windows, pattern, i=window, j=window, **count)


class PlainAttention(nn.Module):
    """Multi-head attention within windows; its index lets offsets share rows as the published one
    does."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=TABLE_STD)
        places = torch.stack(torch.meshgrid([torch.arange(window)] * 3, indexing="ij")).flatten(1)
        offsets = places[:, :, None] - places[:, None, :] + window - 1
        steps = torch.tensor([3 * window - 1, 2 * window - 1, 1])
        self.register_buffer("relative_position_index", (offsets * steps[:, None, None]).sum(0))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "n t (s h c) -> s n h t c", s=3, h=self.heads).contiguous()
        attention = (q * self.scale) @ k.transpose(-2, -1).contiguous()
        bias = self.relative_position_bias_table[self.relative_position_index]
        attention = attention + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            attention = attention.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1).unsqueeze(0)
            attention = attention.flatten(0, 1)
        attention = self.attn_drop(torch.softmax(attention, dim=-1))
        return self.proj_drop(self.proj(rearrange(attention @ v, "n h t c -> n t (h c)")))


class PlainTransformerBlock(nn.Module):
    """norm - (shifted) window attention, plus the input; norm - MLP, plus its input."""

    def __init__(self, channels: int, shape: Shape, heads: int, shift: int, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        small = min(shape) <= WINDOW_SIZE
        self.window, self.shift = (min(shape), 0) if small else (WINDOW_SIZE, shift)
        self.norm1 = nn.LayerNorm(channels)
        self.attn = PlainAttention(channels, heads, self.window, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = plain_mlp(channels, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        depth, height, width = self.shape
        y = self.norm1(x).view(batch, depth, height, width, channels)
        missing = [-size % self.window for size in self.shape]
        y = functional.pad(y, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        padded = tuple(y.shape[1:4])
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift,) * 3, dims=(1, 2, 3))
        windows = self.attn(into_windows(y, self.window), mask if self.shift else None)
        y = out_of_windows(windows, self.window, padded)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift,) * 3, dims=(1, 2, 3))
        y = y[:, :depth, :height, :width].contiguous().view(batch, tokens, channels)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def drop_path(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = 1 - DROP_PATH
        return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(kept).div_(kept)


class PlainTransformer(nn.Module):
    """Two blocks, the second with shifted windows; the mask is made in every forward."""

    def __init__(self, channels: int, shape: Shape, heads: int, dropout: float) -> None:
        super().__init__()
        self.shift = WINDOW_SIZE // 2
        shifts = [self.shift * (block % 2) for block in range(DEPTH)]
        self.blocks = nn.ModuleList(
            PlainTransformerBlock(channels, shape, heads, shift, dropout) for shift in shifts
        )

    def forward(self, x: Tensor, shape: Shape) -> Tensor:
        mask = self.mask(shape, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def mask(self, shape: Shape, device: torch.device) -> Tensor:
        padded = (size + -size % WINDOW_SIZE for size in shape)
        regions = torch.zeros((1, *padded, 1), device=device)
        parts = (slice(0, -WINDOW_SIZE), slice(-WINDOW_SIZE, -self.shift), slice(-self.shift, None))
        for number, part in enumerate(itertools.product(parts, repeat=3)):
            regions[(slice(None), *part)] = number
        windows = into_windows(regions, WINDOW_SIZE).squeeze(-1)
        difference = windows.unsqueeze(1) - windows.unsqueeze(2)
        return difference.masked_fill(difference != 0, MASKED).masked_fill(difference == 0, 0.0)


class PlainPCTBlock(nn.Module):
    """A convolution block and a transformer on the same input, summed. The norm is built and never
    used."""

    def __init__(self, channels: int, shape: Shape, heads: int, dropout: float) -> None:
        super().__init__()
        self.conv = plain_conv_block(channels, (3, 3, 3), dropout)
        self.trans = PlainTransformer(channels, shape, heads, dropout)
        self.norm_layer = nn.LayerNorm(channels)
        self.pos_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.conv(x)
        shape = tuple(x.shape[2:])
        tokens = self.pos_drop(x.flatten(2).transpose(1, 2).contiguous())
        attended = self.trans(tokens, shape).unflatten(1, shape)
        return convolved + attended.permute(0, 4, 1, 2, 3).contiguous()


class PlainStem(nn.Module):
    """Levels 0 and 1, and the way into level 2, for one mode."""

    def __init__(self, channels: int, widths: Ints, dropout: Floats, kernels: Triples) -> None:
        super().__init__()
        pooling = [(kernel[0] // 2 + 1, 2, 2) for kernel in kernels]
        self.proj = conv(channels, widths[0], kernels[0])
        self.conv0 = plain_conv_block(widths[0], kernels[0], dropout[0])
        self.conv1 = plain_conv_block(widths[1], kernels[1], dropout[1])
        self.down1 = plain_down(widths[0], widths[1], kernels[1], pooling[0])
        self.down2 = plain_down(widths[1], widths[2], (3, 3, 3), pooling[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level0 = self.conv0(self.proj(x))
        level1 = self.conv1(self.down1(level0))
        return level0, level1, self.down2(level1)


class PlainPyramid(nn.Module):
    """Levels 2 to 4 and back, and the heads of levels 2 and 3."""

    def __init__(self, widths: Ints, shape: Shape, dropout: Floats, num_classes: int) -> None:
        super().__init__()
        shapes = [tuple(size >> level for size in shape) for level in range(3)]
        kernel: Triple = (3, 3, 3)

        def block(level: int) -> PlainPCTBlock:
            return PlainPCTBlock(widths[level], shapes[level], NUM_HEADS[level], dropout[level])

        self.down3 = plain_down(widths[0], widths[1], kernel, (2, 2, 2))
        self.down4 = plain_down(widths[1], widths[2], kernel, (2, 2, 2))
        self.up3 = plain_up(widths[0], widths[1], (2, 2, 2), kernel)
        self.up4 = plain_up(widths[1], widths[2], (2, 2, 2), kernel)
        self.convtrans_e2, self.convtrans_d2 = block(0), block(0)
        self.convtrans_e3, self.convtrans_d3 = block(1), block(1)
        self.convtrans_e4 = block(2)
        self.out_conv2 = plain_unit(widths[0], num_classes, (1, 1, 1))
        self.out_conv3 = plain_unit(widths[1], num_classes, (1, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of levels 2 and 3."""
        level2 = self.convtrans_e2(x)
        level3 = self.convtrans_e3(self.down3(level2))
        level4 = self.convtrans_e4(self.down4(level3))
        up3 = self.convtrans_d3(self.up4(level3, level4))
        return self.convtrans_d2(self.up3(level2, up3)), up3


class PlainHead(nn.Module):
    """Levels 1 and 0 on the way back, and their heads, for one mode."""

    def __init__(self, widths: Ints, dropout: Floats, kernels: Triples, num_classes: int) -> None:
        super().__init__()
        scales = [(kernel[0] // 2 + 1, 2, 2) for kernel in kernels]
        self.up1 = plain_up(widths[0], widths[1], scales[0], kernels[0])
        self.up2 = plain_up(widths[1], widths[2], scales[1], kernels[1])
        self.conv0 = plain_conv_block(widths[0], kernels[0], dropout[0])
        self.conv1 = plain_conv_block(widths[1], kernels[1], dropout[1])
        self.out_conv0 = plain_unit(widths[0], num_classes, (1, 1, 1))
        self.out_conv1 = plain_unit(widths[1], num_classes, (1, 1, 1))

    def forward(self, level0: Tensor, level1: Tensor, level2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of levels 0 and 1."""
        up1 = self.conv1(self.up2(level1, level2))
        return self.conv0(self.up1(level0, up1)), up1


class PlainPCTNet(nn.Module):
    """The published network.

    Args:
        input_channels, num_classes: of the images and of every head.
        mode: the anisotropy mode that is used; all three are built.
        input_size: voxels per axis that the network takes.
        features_per_stage, dropout_per_stage: one per level.
        deep_supervision: return the outputs of all four heads (a list, full resolution first) or
            the first of them alone.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        mode: int,
        input_size: Ints,
        features_per_stage: Ints,
        dropout_per_stage: Floats,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.deep_supervision = deep_supervision
        widths, dropout = features_per_stage, dropout_per_stage
        kernels = [candidate.kernel_sizes[:2] for candidate in MODES]
        # The pyramid halves every axis twice more.
        steps = get_mode(mode).reduction
        shape = tuple(size * 4 // step for size, step in zip(input_size, steps, strict=True))
        self.embeddings = nn.ModuleList(
            PlainStem(input_channels, widths, dropout, pair) for pair in kernels
        )
        self.pyramid_ct = PlainPyramid(widths[2:], shape, dropout[2:], num_classes)
        self.pred_heads = nn.ModuleList(
            PlainHead(widths, dropout, pair, num_classes) for pair in kernels
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        level0, level1, level2 = self.embeddings[self.mode](x)
        up2, up3 = self.pyramid_ct(level2)
        pyramid, head = self.pyramid_ct, self.pred_heads[self.mode]
        up0, up1 = head(level0, level1, up2)
        if not self.deep_supervision:
            return head.out_conv0(up0)
        fine = [head.out_conv0(up0), head.out_conv1(up1)]
        return [*fine, pyramid.out_conv2(up2), pyramid.out_conv3(up3)]
