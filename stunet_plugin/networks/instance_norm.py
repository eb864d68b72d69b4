"""Instance norm with learned weights: torch's function in less time on the CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class InstanceNorm(nn.Module):
    """Instance norm of any number of spatial axes, affine, without running statistics.

    In training on the CPU it is a group norm with one channel per group, the same function: torch
    has a kernel for it, while its instance norm goes through batch norm there (measured: half the
    time). Predictions keep to torch's own, so that they round as the published ones do.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channel, *spatial) to the same shape."""
        if self.training and x.device.type == "cpu":
            return functional.group_norm(x, len(self.weight), self.weight, self.bias, self.eps)
        return functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
