"""UNETR: a vision transformer with a convolutional decoder, in 3D and 2D, for any patch.

Papers: Hatamizadeh et al., arXiv:2103.10504; the decoder for tokens of 8 voxels of Zhou et al.,
arXiv:2303.06522 (see ``vision_transformer``). Published code of the latter: TokenSparse-for-MedSeg
(Apache-2.0), read for facts, not copied. The same function as published; deviations:

* Tokens of another size on a coarse axis; images are padded inside, and logits cropped.
* Deep supervision: a head after each step of the decoder.

The transformer's last map stands for all its levels, as published for pruned tokens; without
pruning too, so that the two differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.networks import cpu_engine
from stunet_plugin.networks.base_unet import NEGATIVE_SLOPE, BaseUNet, check_integer
from stunet_plugin.networks.topology import Strides, as_strides, total_stride
from stunet_plugin.networks.vision_transformer import Pruning, VisionTransformer

STEPS = 4
"""Of the decoder; the first three make up a token, the last is below the tokens."""


def norm(x: Tensor) -> Tensor:
    """Instance norm without weights."""
    return functional.instance_norm(x)


def activate(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, NEGATIVE_SLOPE)


class ResidualUnit(nn.Module):
    """conv - norm - LeakyReLU - conv - norm, plus the input (conv - norm where widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, conv: Any) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else conv(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = norm(self.conv2(activate(norm(self.conv1(x)))))
        return activate(y + (x if self.shortcut is None else norm(self.shortcut(x))))


class UNETRDecoder(nn.Module):
    """The image and the map of tokens to logits. ``deep_supervision`` and ``seg_layers`` are as in
    ``stunet.STUNetDecoder``, deepest first."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        width: int,
        features: int,
        strides: Strides,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.below = strides[-1]
        conv: Any = nn.Conv2d if len(self.below) == 2 else nn.Conv3d
        up: Any = nn.ConvTranspose2d if len(self.below) == 2 else nn.ConvTranspose3d
        self.pool = functional.avg_pool2d if len(self.below) == 2 else functional.avg_pool3d

        def upsample(in_channels: int, out_channels: int, stride: Sequence[int]) -> nn.Module:
            return up(in_channels, out_channels, tuple(stride), tuple(stride), bias=False)

        second, third = strides[2:4]
        widths = [features * 2**level for level in range(STEPS)]
        self.skip_image = ResidualUnit(input_channels, widths[0], conv)
        self.skip_fine = nn.Sequential(
            upsample(width, widths[1], third),
            upsample(widths[1], widths[1], second),
            ResidualUnit(widths[1], widths[1], conv),
        )
        self.skip_middle = upsample(width, widths[2], third)
        self.skip_tokens = ResidualUnit(width, widths[3], conv)
        inputs, outputs = [width, *widths[:0:-1]], widths[::-1]
        self.ups = nn.ModuleList(map(upsample, inputs, outputs, strides[:0:-1]))
        self.units = nn.ModuleList(ResidualUnit(2 * size, size, conv) for size in outputs)
        self.seg_layers = nn.ModuleList(conv(size, num_classes, 1) for size in outputs)

    def forward(self, image: Tensor, tokens: Tensor) -> list[Tensor]:
        """Return the logits of all heads, full resolution first, or of that one alone."""
        skips = (
            self.skip_tokens(tokens),
            self.skip_middle(tokens),
            self.skip_fine(tokens),
            self.skip_image(image),
        )
        kernel = tuple(3 if step > 1 else 1 for step in self.below)
        x = self.pool(tokens, kernel, self.below, tuple(size // 2 for size in kernel))
        outputs: list[Tensor] = []
        steps = zip(self.ups, self.units, self.seg_layers, skips, strict=True)
        for step, (up, unit, head, skip) in enumerate(steps, 1):
            x = unit(torch.cat((up(x), skip), 1))
            if self.deep_supervision or step == STEPS:
                outputs.append(head(x))
        return outputs[::-1]


class UNETR(BaseUNet):
    """The network. A plans file can name it by its dotted path
    ``stunet_plugin.networks.unetr.UNETR``.

    Args:
        patch_size: that the position table is for; images of other sizes are taken too.
        strides: of five stages; the first three after the ones make up a token, the last halves the
            tokens.
        width, depth, heads: of the transformer.
        features: of the decoder at full resolution.
        drop_path: stochastic depth of the last block, rising from 0.
        pruning: what :class:`vision_transformer.Pruning` holds; None keeps every token.

    Input (batch, input_channels, *spatial) of any size. Output (batch, num_classes, *spatial), or a
    list of four, full resolution first. Arguments that do not fit together are a ValueError.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        patch_size: Sequence[int],
        strides: Sequence[Sequence[int]],
        width: int,
        depth: int,
        heads: int,
        features: int,
        drop_path: float = 0.0,
        pruning: Mapping[str, Any] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        convs = ("skip_image.conv1", "skip_image.shortcut")
        in_proj = ["encoder.patch_embedding", *(f"decoder.{name}" for name in convs)]
        super().__init__(input_channels, num_classes, in_proj)
        self.key_to_encoder, self.key_to_stem = "encoder", "encoder.patch_embedding"
        for name, value in (("width", width), ("depth", depth), ("heads", heads)):
            check_integer(name, value)
        check_integer("features", features)
        self.strides = as_strides(strides)
        axes = len(patch_size)
        flat = {step for stage in self.strides for step in stage} <= {1, 2}
        if len(self.strides) != STEPS + 1 or len(self.strides[0]) != axes or not flat:
            raise ValueError(
                f"strides must be {STEPS + 1} stages of 1 or 2 for each of the {axes} axes of the"
                f" patch, not {strides!r}."
            )
        if width % heads or width % (2 * axes) or width % 4:
            raise ValueError(
                f"width must be divisible by heads, by 4 and by {2 * axes}, not {width} ({heads}"
                " heads)."
            )
        token = total_stride(self.strides[:-1])
        grid = [size // step for size, step in zip(self._padded(patch_size), token, strict=True)]
        cut = None if pruning is None else _pruning(pruning, depth, width, heads, axes)
        vit = width, depth, heads, drop_path, cut
        self.encoder: Any = VisionTransformer(input_channels, token, grid, *vit)
        sizes = input_channels, num_classes, width, features, self.strides
        self.decoder = UNETRDecoder(*sizes, deep_supervision)

    def _padded(self, shape: Sequence[int]) -> list[int]:
        """Return the nearest multiples of the total stride that hold a shape, two at least: the
        pooling of tokens takes four per axis."""
        total = total_stride(self.strides)
        return [max(-(-size // step), 2) * step for size, step in zip(shape, total, strict=True)]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images to logits, or a list of them, one per decoder step, full resolution first."""
        if not self.training and x.device.type == "cpu":
            output = cpu_engine.predict(self, x)
            if output is not None:
                return output
        shape = x.shape[2:]
        ends = [new - old for new, old in zip(self._padded(shape), shape, strict=True)]
        if any(ends):
            x = functional.pad(x, [side for end in ends[::-1] for side in (0, end)])
        outputs = self.decoder(x, self.encoder(x))
        for level, output in enumerate(outputs):
            step = total_stride(self.strides[: level + 1])
            # As nnU-Net rounds the shapes of targets.
            kept = [max(round(size / by), 1) for size, by in zip(shape, step, strict=True)]
            for axis, size in enumerate(kept, 2):
                output = output.narrow(axis, 0, size)
            outputs[level] = output.contiguous()
        return outputs if self.decoder.deep_supervision else outputs[0]

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Nothing: the parts initialise themselves, as published; for ``network.apply``."""


def _pruning(given: Mapping[str, Any], depth: int, width: int, heads: int, axes: int) -> Pruning:
    known = Pruning.__dataclass_fields__
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"pruning has no {unknown[0]!r}; it has {', '.join(known)}.")
    values = dict(given)
    if "after" in values:
        values["after"] = tuple(values["after"])
    found = Pruning(**values)
    rising = list(found.after) == sorted({x for x in found.after if 1 <= x < depth})
    if not found.after or not rising:
        raise ValueError(
            f"pruning: after must be rising numbers of blocks from 1 to {depth - 1}, not"
            f" {given.get('after')!r}."
        )
    if not isinstance(found.ratio, (int, float)) or not 0 <= found.ratio < 1:
        raise ValueError(f"pruning: ratio must be 0 or more, and below 1, not {found.ratio!r}.")
    if not isinstance(found.random, bool):
        raise ValueError(f"pruning: random must be true or false, not {found.random!r}.")
    check_integer("pruning: assembly", found.assembly)
    inner, parts = found.assembly_width or width, found.assembly_heads or heads
    check_integer("pruning: assembly_width", inner)
    check_integer("pruning: assembly_heads", parts)
    if inner % parts or inner % (2 * axes):
        raise ValueError(
            f"pruning: assembly_width must be divisible by assembly_heads and by {2 * axes}, not"
            f" {inner} ({parts} heads)."
        )
    return found
