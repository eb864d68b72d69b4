"""Wanted outputs of a network, or the features before its head, on the CPU through the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stunet_plugin.inference.output_head import OutputHead
from stunet_plugin.networks import cpu_engine


def choose(logits: Tensor, outputs: Sequence[int], regions: bool) -> Tensor:
    """Return some outputs of (number, output, ...); without regions, the greatest of the others
    comes last."""
    chosen = logits[:, list(outputs)]
    if regions:
        return chosen
    others = [number for number in range(logits.shape[1]) if number not in outputs]
    return torch.cat([chosen, logits[:, others].amax(1, keepdim=True)], 1)


class WantedOutputs(nn.Module):
    """A network of which some outputs are taken, on the CPU through the engine."""

    def __init__(
        self,
        network: nn.Module,
        outputs: Sequence[int] | None,
        regions: bool,
        shared: bool,
        head: OutputHead | None,
    ) -> None:
        super().__init__()
        self.network, self.outputs, self.regions = network, outputs, regions
        self.shared, self.head = shared, head

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channel, *spatial) to (batch, output, *spatial); see :func:`choose`."""
        labels = self.head.labels if self.head else None
        output = cpu_engine.predict(self.network, x, self.shared, labels)
        if output is None:
            output = self.network(x)
        return output if self.outputs is None else choose(output, self.outputs, self.regions)
