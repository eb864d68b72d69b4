"""PCT-Net: a U of pre-activation convolutions whose three deep levels run window attention in
parallel (the pyramid).

Paper: MIS-FM, arXiv:2306.16925. Published code: github.com/openmedlab/MIS-FM (Apache-2.0), read for
facts, not copied. The same function as published; deviations:

* Only the stem and the head of the mode in use exist, so every parameter gets a gradient; the
  published network builds those of all three modes and uses one of each.
* Input of any size that the mode's reduction divides; published: the size it was built with.
* A LayerNorm in every PCT block that the published forward never uses is not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stunet_plugin.networks.activation_checkpointing import checkpointed
from stunet_plugin.networks.anisotropy import NUM_LEVELS, Triple
from stunet_plugin.networks.base_unet import Encoder, check_integer, per_stage
from stunet_plugin.networks.preactivation_unet import (
    DROPOUT,
    Decoder,
    PreActivation,
    PreActivationUNet,
    SameConv,
    Stem,
)
from stunet_plugin.networks.window_attention import WINDOW_SIZE, WindowTransformer

FEATURES = (24, 48, 128, 256, 512)
FIRST_PYRAMID_LEVEL = 2
NUM_HEADS = (4, 8, 16)  # of levels 2, 3 and 4
DEPTH = 2
MLP_RATIO = 4
DROP_PATH = 0.2


def unit(
    in_channels: int, out_channels: int, kernel_size: Triple, dropout: float = 0.0
) -> PreActivation:
    """BatchNorm - PReLU (one weight) - (dropout) - convolution."""
    conv = SameConv(in_channels, out_channels, kernel_size)
    return PreActivation([nn.BatchNorm3d(in_channels)], nn.PReLU(), conv, dropout)


def conv_block(channels: int, kernel_size: Triple, dropout: float) -> nn.Sequential:
    """Two units; dropout in the second."""
    first = unit(channels, channels, kernel_size)
    return nn.Sequential(first, unit(channels, channels, kernel_size, dropout))


class PCTBlock(nn.Module):
    """A convolution block and a window transformer on the same input, summed."""

    def __init__(
        self,
        channels: int,
        kernel_size: Triple,
        dropout: float,
        checkpointing: bool,
        **transformer: Any,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.conv = conv_block(channels, kernel_size, dropout)
        self.transformer = WindowTransformer(channels, dropout=dropout, **transformer)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpointed(self, self._sum, x)
        return self._sum(x)

    def _sum(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += self.transformer(x)
        return y


class PCTNet(PreActivationUNet):
    """The network. A plans file can name it by its dotted path
    ``stunet_plugin.networks.pctnet.PCTNet``.

    Windows follow from each input, and the relative position tables have the same shape whatever
    the patch (see ``window_attention.WindowAttention``).

    Args:
        mode: 0, 1 or 2, see :mod:`stunet_plugin.networks.anisotropy`; ``strides`` must be its.
        dropout_per_stage: before the second convolution of a block, and all of a transformer.
        window_size: voxels per axis; at most the smallest axis of a level.
        depth: transformer blocks per PCT block, every second one shifted.
        drop_path: probability that a sample skips a residual branch of a transformer in training.
        checkpoint_pyramid: activation checkpointing of the PCT blocks in training.

    Input (batch, input_channels, *spatial), each spatial size divisible by the mode's reduction.
    Output (batch, num_classes, *spatial), or a list of four, levels 0 to 3, full resolution first.
    Arguments that do not fit together are a ValueError.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        mode: int,
        strides: Sequence[Sequence[int]] | None = None,
        features_per_stage: Sequence[int] = FEATURES,
        dropout_per_stage: Sequence[float] = DROPOUT,
        window_size: int = WINDOW_SIZE,
        num_heads: Sequence[int] = NUM_HEADS,
        depth: int = DEPTH,
        mlp_ratio: int = MLP_RATIO,
        drop_path: float = DROP_PATH,
        deep_supervision: bool = False,
        checkpoint_pyramid: bool = False,
    ) -> None:
        sizes = features_per_stage, dropout_per_stage
        super().__init__(input_channels, num_classes, mode, strides, *sizes)
        features, kernels = self.features, self.mode.kernel_sizes
        pyramid = features[FIRST_PYRAMID_LEVEL:]
        heads = per_stage("num_heads", num_heads, len(pyramid))
        if any(channels % number for number, channels in zip(heads, pyramid, strict=True)):
            raise ValueError(
                f"num_heads must divide the channels {list(pyramid)}, not {num_heads!r}."
            )
        check_integer("window_size", window_size, 2)
        check_integer("depth", depth)

        def block(level: int) -> nn.Module:
            settings = features[level], kernels[level], self.dropout[level]
            if level < FIRST_PYRAMID_LEVEL:
                return conv_block(*settings)
            return PCTBlock(
                *settings,
                checkpoint_pyramid,
                num_heads=heads[level - FIRST_PYRAMID_LEVEL],
                depth=depth,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
            )

        def stage(level: int) -> nn.Sequential:
            if level == 0:
                return nn.Sequential(Stem(input_channels, features[0], kernels[0]), block(0))
            down = unit(features[level - 1], features[level], kernels[level])
            return nn.Sequential(nn.MaxPool3d(self.strides[level]), down, block(level))

        def up(level: int) -> PreActivation:
            below, stride = features[level + 1], self.mode.strides[level + 1]
            conv = nn.ConvTranspose3d(below, features[level], stride, stride)
            return PreActivation([nn.BatchNorm3d(below)], nn.PReLU(), conv)

        def merge(level: int) -> PreActivation:
            """A unit of skip and upsampled features; one PReLU serves both, as published."""
            width = features[level]
            conv = SameConv(2 * width, width, kernels[level])
            norms = nn.BatchNorm3d(width), nn.BatchNorm3d(width)
            return PreActivation(norms, nn.PReLU(), conv)

        def head(level: int) -> PreActivation:
            return unit(features[level], num_classes, (1, 1, 1))

        stages = map(stage, range(NUM_LEVELS))
        self.encoder = Encoder(stages, features, nn.Conv3d, kernels, self.strides)
        self.decoder = Decoder(nn.Identity(), up, merge, block, head, deep_supervision)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Torch's own initialisation, and the tables', as published; for ``network.apply``."""
        if reset := getattr(module, "reset_parameters", None):
            reset()
