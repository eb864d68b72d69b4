"""FMUNet: a pre-activation residual U-Net in one of three anisotropy modes.

Paper: the follow-up of MIS-FM (arXiv:2306.16925) on Volume Fusion. Published code:
github.com/openmedlab/MIS-FM and github.com/HiLab-git/PyMIC (Apache-2.0), read for facts, not
copied. The same function as published, which builds the network of one mode, too; no deviation but
how memory is saved (``preactivation_unet``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stunet_plugin.networks.anisotropy import NUM_LEVELS, Triple
from stunet_plugin.networks.base_unet import NEGATIVE_SLOPE, Encoder, InstanceNorm
from stunet_plugin.networks.preactivation_unet import (
    DROPOUT,
    Decoder,
    PreActivation,
    PreActivationUNet,
    SameConv,
    Stem,
)

FEATURES = (32, 64, 128, 256, 512)
DEPTH = 2  # residual convolutions per level


def unit(
    in_channels: int,
    out_channels: int,
    kernel_size: Triple,
    stride: Triple = (1, 1, 1),
    dropout: float = 0.0,
    inputs: int = 1,
) -> PreActivation:
    """InstanceNorm - LeakyReLU - (dropout) - convolution, of inputs with ``in_channels`` each."""
    return PreActivation(
        [InstanceNorm(in_channels) for _ in range(inputs)],
        # In place is safe: the norm keeps its input, not its output.
        nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        SameConv(inputs * in_channels, out_channels, kernel_size, stride),
        dropout,
    )


class ResidualLevel(nn.Module):
    """Pre-activation convolutions of one level, each added to its input."""

    def __init__(self, channels: int, kernel_size: Triple, dropout: float) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            unit(channels, channels, kernel_size, dropout=dropout) for _ in range(DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        for residual in self.units:
            y = residual(x)
            y += x
            x = y
        return x


class FMUNet(PreActivationUNet):
    """The network. A plans file can name it by its dotted path
    ``stunet_plugin.networks.fmunet.FMUNet``.

    ``mode`` is 0, 1 or 2, see :mod:`stunet_plugin.networks.anisotropy`; ``strides`` must be its.
    ``dropout_per_stage`` is before the residual convolutions of each level.

    Input (batch, input_channels, *spatial), each spatial size divisible by the mode's reduction,
    with more than one voxel left at the deepest level (instance normalisation). Output (batch,
    num_classes, *spatial), or a list of four, levels 0 to 3, full resolution first. Arguments that
    do not fit together are a ValueError.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        mode: int,
        strides: Sequence[Sequence[int]] | None = None,
        features_per_stage: Sequence[int] = FEATURES,
        dropout_per_stage: Sequence[float] = DROPOUT,
        deep_supervision: bool = False,
    ) -> None:
        sizes = features_per_stage, dropout_per_stage
        super().__init__(input_channels, num_classes, mode, strides, *sizes)
        features, kernels = self.features, self.mode.kernel_sizes

        def block(level: int) -> nn.Module:
            return ResidualLevel(features[level], kernels[level], self.dropout[level])

        def stage(level: int) -> nn.Sequential:
            if level == 0:
                return nn.Sequential(Stem(input_channels, features[0], kernels[0]), block(0))
            # Down into a level with the kernel of the level above.
            widths = features[level - 1], features[level]
            down = unit(*widths, kernels[level - 1], self.mode.strides[level])
            return nn.Sequential(down, block(level))

        def up(level: int) -> nn.Sequential:
            scale = tuple(float(step) for step in self.strides[level + 1])
            return nn.Sequential(
                unit(features[level + 1], features[level], (1, 1, 1)),
                nn.Upsample(scale_factor=scale, mode="trilinear", align_corners=True),
            )

        def merge(level: int) -> PreActivation:
            return unit(features[level], features[level], kernels[level], inputs=2)

        def head(level: int) -> PreActivation:
            return unit(features[level], num_classes, kernels[level])

        stages = map(stage, range(NUM_LEVELS))
        self.encoder = Encoder(stages, features, nn.Conv3d, kernels, self.strides)
        bottom = block(NUM_LEVELS - 1)
        self.decoder = Decoder(bottom, up, merge, block, head, deep_supervision)
