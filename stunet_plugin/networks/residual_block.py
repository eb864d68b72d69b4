"""Residual blocks and stages of STU-Net.

Paper: Huang et al., arXiv:2304.06716, section 3. Published code: github.com/uni-medical/STU-Net
(Apache-2.0), read for facts, not copied. Deviation: activations that no gradient needs are
overwritten in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from stunet_plugin.networks.activation_checkpointing import STAGE, checkpointed
from stunet_plugin.networks.instance_norm import InstanceNorm

ConvOp = Callable[..., _ConvNd]
"""``nn.Conv2d`` or ``nn.Conv3d``."""

NEGATIVE_SLOPE = 1e-2
"""Of every LeakyReLU, and assumed by the He initialisation."""


def activate(x: Tensor) -> Tensor:
    """LeakyReLU that overwrites its input."""
    return functional.leaky_relu_(x, NEGATIVE_SLOPE)


class ResidualBlock(nn.Module):
    """conv - norm - LeakyReLU - conv - norm, plus the shortcut, then LeakyReLU.

    Args:
        in_channels, out_channels: of the block.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        kernel_size: odd, one number per axis.
        stride: of the first convolution and of the shortcut.
        project_shortcut: the shortcut is a convolution of kernel size 1 with a bias and no norm
            (first block of a stage, even where nothing changes), otherwise the identity.
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
        self.shortcut: nn.Module = nn.Identity()
        if project_shortcut:
            self.shortcut = conv_op(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, *spatial) to (batch, out_channels, *spatial / stride)."""
        # In place is safe: instance norm keeps its input, not its output, and LeakyReLU's gradient
        # needs its result alone.
        y = activate(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return activate(y)


def residual_stage(
    in_channels: int,
    out_channels: int,
    num_blocks: int,
    conv_op: ConvOp,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
) -> nn.Sequential:
    """Return the blocks of one stage: the first strides and projects its shortcut."""
    first = ResidualBlock(in_channels, out_channels, conv_op, kernel_size, stride, True)
    same = out_channels, out_channels, conv_op, kernel_size, (1,) * len(stride), False
    return nn.Sequential(first, *(ResidualBlock(*same) for _ in range(num_blocks - 1)))


def checkpoint_stage(
    stage: Any, setting: str, enter: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """Return ``stage(enter(*inputs))``, keeping ``inputs`` alone, or with BLOCK each block's output
    too.

    Args:
        stage: a :func:`residual_stage`.
        setting: STAGE or BLOCK.
    """
    first, *others = [stage] if setting == STAGE else stage
    x = checkpointed(first, lambda *given: first(enter(*given)), *inputs, random=False)
    for block in others:
        x = checkpointed(block, block, x, random=False)
    return x
