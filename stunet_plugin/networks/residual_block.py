"""Residual blocks and stages of STU-Net: what they compute, predict with on the CPU, and compute
again for less memory.

Paper: Huang et al., arXiv:2304.06716, section 3. Published code: github.com/uni-medical/STU-Net
    (Apache-2.0), read for
facts, not copied. Activations that no gradient needs are overwritten in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from stunet_plugin.networks import cpu_inference
from stunet_plugin.networks.activation_checkpointing import STAGE, checkpointed
from stunet_plugin.networks.instance_norm import InstanceNorm
from stunet_plugin.networks.winograd import FEWEST_VOXELS, convolve

ConvOp = Callable[..., _ConvNd]
"""``nn.Conv2d`` or ``nn.Conv3d``."""

NEGATIVE_SLOPE = 1e-2
"""Of every LeakyReLU, and assumed by the He initialisation."""


class ResidualBlock(nn.Module):
    """conv - norm - LeakyReLU - conv - norm, plus the shortcut, then LeakyReLU.

    Args:
        in_channels, out_channels: of the block.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        kernel_size: odd, one number per axis.
        stride: of the first convolution and of the shortcut.
        project_shortcut: the shortcut is a convolution of kernel size 1 with a bias and no norm
            (first block of a stage, even where nothing changes); otherwise it is the identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        conv_op: ConvOp,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        project_shortcut: bool,
    ) -> None:
        super().__init__()
        padding = tuple(size // 2 for size in kernel_size)
        self.conv1 = conv_op(in_channels, out_channels, kernel_size, stride, padding)
        self.norm1 = InstanceNorm(out_channels)
        self.conv2 = conv_op(out_channels, out_channels, kernel_size, 1, padding)
        self.norm2 = InstanceNorm(out_channels)
        self.shortcut = (
            conv_op(in_channels, out_channels, 1, stride) if project_shortcut else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        if predicts_on_cpu(self, x):
            return self._predict(x)
        # In place is safe: instance norm keeps its input, not its output, and LeakyReLU's gradient
        # needs its result alone.
        y = activate(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return activate(y)

    def _predict(self, x: Tensor) -> Tensor:
        """Return the same, on the CPU in less time."""
        depth, height, width = self.conv1.stride

        def shortcut(start: int, stop: int) -> Tensor:
            slab = x[:, :, start * depth : stop * depth : depth, ::height, ::width]
            return (
                slab
                if isinstance(self.shortcut, nn.Identity)
                else cpu_inference.convolve(self.shortcut, slab)
            )

        y = cpu_inference.norm_and_activation(
            [self.norm1], activate, [convolve(self.conv1, x)], overwrite=True
        )
        y = cpu_inference.norm_sum_activation(
            self.norm2, activate, convolve(self.conv2, y), shortcut
        )
        # Torch's convolutions of few voxels are faster with the channels first.
        return y if y[0, 0].numel() >= FEWEST_VOXELS else y.contiguous()


def predicts_on_cpu(module: nn.Module, x: Tensor) -> bool:
    """Return whether a feature map of a prediction is large enough for the ways of
    :mod:`cpu_inference`."""
    return x.ndim == 5 and x[0, 0].numel() >= FEWEST_VOXELS and cpu_inference.applies(module, x)


def activate(x: Tensor) -> Tensor:
    return functional.leaky_relu_(x, NEGATIVE_SLOPE)


def residual_stage(
    in_channels: int,
    out_channels: int,
    num_blocks: int,
    conv_op: ConvOp,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
) -> nn.Sequential:
    """Blocks of one stage: the first strides and projects its shortcut, the others keep their
    shape."""
    no_stride = (1,) * len(stride)
    return nn.Sequential(
        *(
            ResidualBlock(
                in_channels if block == 0 else out_channels,
                out_channels,
                conv_op,
                kernel_size,
                stride if block == 0 else no_stride,
                project_shortcut=block == 0,
            )
            for block in range(num_blocks)
        )
    )


def compute_stage_again(
    stage: Any, checkpointing: str, enter: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """Return ``stage(enter(*inputs))``, of which ``inputs`` alone are kept, or with BLOCK each
    block's output too.

    Args:
        stage: a :func:`residual_stage`.
    """
    first, *others = [stage] if checkpointing == STAGE else stage
    x = checkpointed(first, lambda *given: first(enter(*given)), *inputs, random=False)
    for block in others:
        x = checkpointed(block, block, x, random=False)
    return x
