"""Instance norm with learned weights, the same function as torch's for less time on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-5


class InstanceNorm(nn.Module):
    """Instance norm of any number of spatial axes, always affine, without running statistics.

    On the CPU by way of group norm, which with a channel per group is the same: torch has a kernel
        for it there, while its
    instance norm goes the long way through batch norm (measured: half the time).

    Args:
        channels: of the input, (batch, channel, *spatial).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.eps = EPSILON
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return functional.group_norm(x, self.channels, self.weight, self.bias, self.eps)
        return functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"
