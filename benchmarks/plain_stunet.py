"""The published STU-Net written down plainly, as the yardstick of ``step.py``.

Paper: Huang et al., arXiv:2304.06716, section 3. Step by step in the published order: the decoder
first upsamples the deeper features and then convolves them, which costs one more full-resolution
tensor of twice the width than the reverse order of ``stunet_plugin.networks.stunet``. It is no
straw man: activations are overwritten in place, and only the heads that are asked for are computed.
Parameter names are the published ones, which ``stunet_plugin.weights.stunet`` translates.

Axes of all tensors: (batch, channel, *spatial).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from stunet_plugin.networks.presets import STUNetPreset
from stunet_plugin.networks.topology import Strides

NO_STRIDE = (1, 1, 1)


class PlainBlock(nn.Module):
    """conv - norm - LeakyReLU - conv - norm, plus the shortcut (``conv3`` in a stage's first
    block), then LeakyReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, ...], project_shortcut: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
        self.norm1 = nn.InstanceNorm3d(out_channels, affine=True)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.InstanceNorm3d(out_channels, affine=True)
        self.act = nn.LeakyReLU(0.01, inplace=True)
        self.conv3 = nn.Conv3d(in_channels, out_channels, 1, stride) if project_shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x if self.conv3 is None else self.conv3(x)
        return self.act(y)


def plain_stage(
    in_channels: int, out_channels: int, blocks: int, stride: tuple[int, ...]
) -> nn.Sequential:
    """Blocks of one stage: the first strides and projects its shortcut."""
    rest = [PlainBlock(out_channels, out_channels, NO_STRIDE, False) for _ in range(blocks - 1)]
    return nn.Sequential(PlainBlock(in_channels, out_channels, stride, True), *rest)


def plain_upsampling(in_channels: int, out_channels: int, stride: tuple[int, ...]) -> nn.Sequential:
    """Nearest upsampling of the deeper features, then a 1x1x1 convolution to the skip's width."""
    upsample = nn.Upsample(scale_factor=tuple(map(float, stride)), mode="nearest")
    conv = nn.Conv3d(in_channels, out_channels, 1)
    return nn.Sequential(OrderedDict(upsample=upsample, conv=conv))


class PlainSTUNet(nn.Module):
    """The published network in 3D.

    Args:
        preset: the size.
        strides: six, full resolution first, the first all ones.
        input_channels, num_classes: of the images and of every head.
        deep_supervision: return the outputs of all five heads (a list, full resolution first) or
            the first of them alone.
    """

    def __init__(
        self,
        preset: STUNetPreset,
        strides: Strides,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        widths, depths = preset.features_per_stage, preset.blocks_per_stage
        inputs = (input_channels, *widths[:-1])
        self.conv_blocks_context = nn.ModuleList(map(plain_stage, inputs, widths, depths, strides))
        decoder = list(reversed(range(len(widths) - 1)))
        self.upsample_layers = nn.ModuleList(
            plain_upsampling(widths[i + 1], widths[i], strides[i + 1]) for i in decoder
        )
        self.conv_blocks_localization = nn.ModuleList(
            plain_stage(2 * widths[i], widths[i], depths[i], NO_STRIDE) for i in decoder
        )
        self.seg_outputs = nn.ModuleList(nn.Conv3d(widths[i], num_classes, 1) for i in decoder)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        skips = []
        for stage in self.conv_blocks_context:
            x = stage(x)
            skips.append(x)
        outputs = []
        for step, skip in enumerate(reversed(skips[:-1])):
            x = self.upsample_layers[step](x)
            x = torch.cat((x, skip), dim=1)
            x = self.conv_blocks_localization[step](x)
            if self.deep_supervision:
                outputs.append(self.seg_outputs[step](x))
        return outputs[::-1] if self.deep_supervision else self.seg_outputs[-1](x)
