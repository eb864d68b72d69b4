"""The published FMUNet written down plainly, as the yardstick of ``step.py``.

Paper: the follow-up of MIS-FM (arXiv:2306.16925) on Volume Fusion. Norm, activation, dropout and
    convolution one after the
other, each with an output of its own, as published. Parameter names are the published ones, which
``stunet_plugin.weights.fmunet_keys`` translates.

Axes of all tensors: (batch, channel, *spatial).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stunet_plugin.networks.anisotropy import NUM_LEVELS, Triple, get_mode
from stunet_plugin.networks.fmunet import DEPTH, NEGATIVE_SLOPE


def same_padding(kernel: Triple) -> Triple:
    return kernel[0] // 2, kernel[1] // 2, kernel[2] // 2


def norm_act(channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(NEGATIVE_SLOPE)]


class PlainResidualLevel(nn.Module):
    """norm - activation - dropout - convolution, plus the input, twice."""

    def __init__(self, channels: int, kernel: Triple, dropout: float) -> None:
        super().__init__()
        self.conv_list = nn.ModuleList(
            nn.Sequential(
                *norm_act(channels),
                nn.Dropout(dropout),
                nn.Conv3d(channels, channels, kernel, padding=same_padding(kernel)),
            )
            for _ in range(DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.conv_list:
            x = conv(x) + x
        return x


class PlainDown(nn.Module):
    """norm - activation - strided convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        conv = nn.Conv3d(in_channels, out_channels, kernel, stride, same_padding(kernel))
        self.down = nn.Sequential(*norm_act(in_channels), conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x)


class PlainUp(nn.Module):
    """Narrow and upsample the deeper features, concatenate (skip, upsampled), and merge to the
    skip's width."""

    def __init__(
        self, deep_channels: int, skip_channels: int, scale: Triple, kernel: Triple
    ) -> None:
        super().__init__()
        self.up = nn.Sequential(
            *norm_act(deep_channels),
            nn.Conv3d(deep_channels, skip_channels, 1),
            nn.Upsample(
                scale_factor=tuple(map(float, scale)), mode="trilinear", align_corners=True
            ),
        )
        merge = nn.Conv3d(2 * skip_channels, skip_channels, kernel, padding=same_padding(kernel))
        self.conv = nn.Sequential(*norm_act(2 * skip_channels), merge)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(deep)], dim=1))


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
        scales: list[Triple] = [
            (depth, height, width) for depth, height, width in get_mode(mode).strides[1:]
        ]
        levels = range(NUM_LEVELS)
        self.project = nn.Conv3d(
            input_channels, widths[0], kernels[0], padding=same_padding(kernels[0])
        )
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        for level in levels:
            self.encoder[f"en_conv{level}"] = PlainResidualLevel(
                widths[level], kernels[level], dropout_per_stage[level]
            )
            self.decoder[f"de_conv{level}"] = PlainResidualLevel(
                widths[level], kernels[level], dropout_per_stage[level]
            )
        for level in levels[:-1]:
            self.encoder[f"down{level}"] = PlainDown(
                widths[level], widths[level + 1], kernels[level], scales[level]
            )
            self.decoder[f"upcat{level}"] = PlainUp(
                widths[level + 1], widths[level], scales[level], kernels[level]
            )
        self.out_layers = nn.ModuleList(
            nn.Sequential(
                *norm_act(widths[level]),
                nn.Conv3d(
                    widths[level], num_classes, kernels[level], padding=same_padding(kernels[level])
                ),
            )
            for level in levels[:-1]
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.encoder["en_conv0"](self.project(x))
        encoded = [x]
        for level in range(1, NUM_LEVELS):
            x = self.encoder[f"en_conv{level}"](self.encoder[f"down{level - 1}"](x))
            encoded.append(x)
        x = self.decoder[f"de_conv{NUM_LEVELS - 1}"](x)
        decoded = []
        for level in reversed(range(NUM_LEVELS - 1)):
            x = self.decoder[f"de_conv{level}"](self.decoder[f"upcat{level}"](x, encoded[level]))
            decoded.insert(0, x)
        if not self.deep_supervision:
            return self.out_layers[0](decoded[0])
        return [head(features) for head, features in zip(self.out_layers, decoded, strict=True)]
