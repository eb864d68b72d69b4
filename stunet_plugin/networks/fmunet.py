"""FMUNet: a pre-activation residual U-Net in one of three anisotropy modes.

Paper: the follow-up of MIS-FM (arXiv:2306.16925) on Volume Fusion. Published code:
github.com/openmedlab/MIS-FM and github.com/HiLab-git/PyMIC (Apache-2.0), read for facts, not
copied. The same function as published, which builds the network of one mode, too; no deviation but
how memory is saved (``preactivation_unet``).

Axes of all tensors: (batch, channel, *spatial), spatial in nnU-Net's order after its transpose
(axis 0 is the coarse one).
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import Triple
from stunet_plugin.networks.instance_norm import InstanceNorm
from stunet_plugin.networks.preactivation_unet import (
    Decoder,
    Encoder,
    PreActivation,
    PreActivationUNet,
    Stem,
    padding,
    per_level,
)

FEATURES = (32, 64, 128, 256, 512)
DROPOUT = (0.0, 0.0, 0.2, 0.2, 0.2)
DEPTH = 2
"""Residual convolutions per level."""

NEGATIVE_SLOPE = 1e-2
"""Of every LeakyReLU, and assumed by the He initialisation."""


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
        nn.Conv3d(inputs * in_channels, out_channels, kernel_size, stride, padding(kernel_size)),
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
        """(batch, channels, *spatial) to the same shape."""
        for residual in self.units:
            y = residual(x)
            y += x
            x = y
        return x


class FMUNet(PreActivationUNet):
    """The network. A plans file can name it by its dotted path
    ``stunet_plugin.networks.fmunet.FMUNet``.

    Args:
        input_channels: image channels (and one-hot channels of a previous stage).
        num_classes: outputs of each head.
        mode: 0, 1 or 2, see :mod:`stunet_plugin.networks.anisotropy`.
        strides: as nnU-Net reads them off a plan; they must be the mode's.
        features_per_stage: channels of each level, full resolution first.
        dropout_per_stage: before the residual convolutions of each level.
        deep_supervision: see :class:`Decoder`.

    Input (batch, input_channels, *spatial), each spatial size divisible by the mode's reduction,
    with more than one voxel left at the deepest level (instance normalisation). Output (batch,
    num_classes, *spatial), or a list of four, levels 0 to 3, full resolution first.

    Raises:
        ValueError: arguments that do not fit together, with what is allowed.
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
        super().__init__(input_channels, num_classes, mode, strides)
        features = per_level("features_per_stage", features_per_stage, integers=True)
        dropout = per_level("dropout_per_stage", dropout_per_stage)
        kernels = self.mode.kernel_sizes
        levels = range(len(features))

        def residual_level(level: int) -> ResidualLevel:
            return ResidualLevel(features[level], kernels[level], dropout[level])

        def down(level: int) -> nn.Module:
            """Into a level; its convolution has the kernel of the level above."""
            if level == 0:
                return Stem(input_channels, features[0], kernels[0])
            return unit(
                features[level - 1], features[level], kernels[level - 1], self.strides[level]
            )

        def up(level: int) -> nn.Sequential:
            """From the level below."""
            scale = tuple(float(step) for step in self.strides[level + 1])
            return nn.Sequential(
                unit(features[level + 1], features[level], (1, 1, 1)),
                nn.Upsample(scale_factor=scale, mode="trilinear", align_corners=True),
            )

        self.encoder = Encoder(
            (nn.Sequential(down(level), residual_level(level)) for level in levels),
            features,
            self.mode,
        )
        steps = levels[-2::-1]
        self.decoder = Decoder(
            bottom=residual_level(levels[-1]),
            ups=map(up, steps),
            merges=(
                unit(features[level], features[level], kernels[level], inputs=2) for level in steps
            ),
            blocks=map(residual_level, steps),
            heads=(unit(features[level], num_classes, kernels[level]) for level in steps),
            deep_supervision=deep_supervision,
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(batch, input_channels, *spatial) to (batch, num_classes, *spatial), or a list of four,
        levels 0 to 3, full resolution first."""
        if tuple(x.shape[2:]) == self.mode.reduction:
            raise PluginError(
                f"{self._name}: the patch {list(x.shape[2:])} leaves a single voxel at the deepest"
                " level, where instance norm has nothing to normalise. Double at least one axis."
            )
        return super().forward(x)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation of the published code: negative slope 1e-2, biases zero. For
        ``network.apply``."""
        InitWeights_He(NEGATIVE_SLOPE)(module)
