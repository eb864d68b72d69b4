"""Published FMUNet written down plainly, as the yardstick of ``step.py``.

Paper: the follow-up of MIS-FM (arXiv:2306.16925) on Volume Fusion. Norm, activation, dropout and
convolution one after the other, each with an output of its own. Parameter names are the published
ones. Axes of all tensors: (batch, channel, *spatial).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stunet_plugin.networks.anisotropy import NUM_LEVELS, Triple, get_mode
from stunet_plugin.networks.fmunet import DEPTH, NEGATIVE_SLOPE


def conv(
    in_channels: int, out_channels: int, kernel: Triple, stride: Triple | int = 1
) -> nn.Conv3d:
    """A convolution that keeps the size but for its stride."""
    padding = kernel[0] // 2, kernel[1] // 2, kernel[2] // 2
    return nn.Conv3d(in_channels, out_channels, kernel, stride, padding)


def named(**parts: nn.Module) -> nn.Sequential:
    """One part after the other, under the published names."""
    return nn.Sequential(OrderedDict(parts))


def norm_act(channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(NEGATIVE_SLOPE)]


class PlainResidualLevel(nn.Module):
    """norm - activation - dropout - convolution, plus the input, twice."""

    def __init__(self, channels: int, kernel: Triple, dropout: float) -> None:
        super().__init__()
        self.conv_list = nn.ModuleList(
            nn.Sequential(
                *norm_act(channels), nn.Dropout(dropout), conv(channels, channels, kernel)
            )
            for _ in range(DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.conv_list:
            x = layer(x) + x
        return x


class PlainUp(nn.Module):
    """Upsample the deeper features, concatenate (skip, upsampled), and merge."""

    def __init__(self, up: nn.Module, merge: nn.Module) -> None:
        super().__init__()
        self.up, self.conv = up, merge

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(deep)], dim=1))


def plain_up(skip: int, deep: int, scale: Triple, kernel: Triple) -> PlainUp:
    """Narrows before it upsamples."""
    factors = tuple(map(float, scale))
    upsample = nn.Upsample(scale_factor=factors, mode="trilinear", align_corners=True)
    up = nn.Sequential(*norm_act(deep), nn.Conv3d(deep, skip, 1), upsample)
    return PlainUp(up, nn.Sequential(*norm_act(2 * skip), conv(2 * skip, skip, kernel)))


class PlainFMUNet(nn.Module):
    """The published network.

    Args:
        input_channels, num_classes: of the images and of every head.
        mode: the anisotropy mode.
        features_per_stage, dropout_per_stage: one per level.
        deep_supervision: return the outputs of all four heads (a list, full resolution first) or
            the first of them alone.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        mode: int,
        features_per_stage: Sequence[int],
        dropout_per_stage: Sequence[float],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        widths, kernels = features_per_stage, get_mode(mode).kernel_sizes
        scales: list[Triple] = [(d, h, w) for d, h, w in get_mode(mode).strides[1:]]
        self.project = conv(input_channels, widths[0], kernels[0])
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        for level in range(NUM_LEVELS):
            sizes = widths[level], kernels[level], dropout_per_stage[level]
            self.encoder[f"en_conv{level}"] = PlainResidualLevel(*sizes)
            self.decoder[f"de_conv{level}"] = PlainResidualLevel(*sizes)
        for level, (scale, kernel) in enumerate(zip(scales, kernels, strict=False)):
            fine, coarse = widths[level], widths[level + 1]
            down = nn.Sequential(*norm_act(fine), conv(fine, coarse, kernel, scale))
            self.encoder[f"down{level}"] = named(down=down)
            self.decoder[f"upcat{level}"] = plain_up(fine, coarse, scale, kernel)
        self.out_layers = nn.ModuleList(
            nn.Sequential(*norm_act(width), conv(width, num_classes, kernel))
            for width, kernel in zip(widths[:-1], kernels, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        encoded = [self.encoder["en_conv0"](self.project(x))]
        for level in range(1, NUM_LEVELS):
            x = self.encoder[f"down{level - 1}"](encoded[-1])
            encoded.append(self.encoder[f"en_conv{level}"](x))
        x = self.decoder[f"de_conv{NUM_LEVELS - 1}"](encoded[-1])
        decoded: list[Tensor] = []
        for level in reversed(range(NUM_LEVELS - 1)):
            x = self.decoder[f"de_conv{level}"](self.decoder[f"upcat{level}"](encoded[level], x))
            decoded.insert(0, x)
        if not self.deep_supervision:
            return self.out_layers[0](decoded[0])
        return [head(features) for head, features in zip(self.out_layers, decoded, strict=True)]
