"""Output head of a network, its last layer, taken off and applied after the windows are averaged.

The last layer of U-Nets is a convolution of kernel size 1, which is linear: the mean of windows,
resampled, may as well be taken of its input. STU-Net small has 16 channels there for 105 outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook

CHUNK = 2**14
"""Voxels whose outputs are made together, which stay in the processor's cache."""


class OutputHead:
    """The last layer of a network, a linear one, with the weights of several folds.

    Attributes:
        channels: of its input, of one fold.
        matrix: (channels of all folds + 1, outputs), for features whose last channel is 1 where the
            network was run and 0 elsewhere.
    """

    def __init__(
        self, network: nn.Module, name: str, folds: Sequence[Mapping[str, Tensor]], regions: bool
    ) -> None:
        self._network, self._name = network, name
        layer: Any = network.get_submodule(name)
        self.channels: int = layer.in_channels
        device = layer.weight.device
        weights = [fold[f"{name}.weight"].to(device).float().flatten(1) for fold in folds]
        biases = [
            fold[f"{name}.bias"].to(device).float() for fold in folds if layer.bias is not None
        ]
        # Elsewhere is background: its output is 1 and others are -1, as without a head.
        elsewhere = torch.full((layer.out_channels,), -1.0, device=device)
        if not regions:
            elsewhere[0] = 1
        bias = torch.stack(biases).mean(0) if biases else torch.zeros_like(elsewhere)
        rows = torch.cat([*weights, (bias - elsewhere)[:, None] * len(folds)], 1) / len(folds)
        self.matrix, self._elsewhere = rows.T.contiguous(), elsewhere

    @classmethod
    def find(
        cls,
        network: nn.Module,
        folds: Sequence[Mapping[str, Tensor]],
        size: Sequence[int],
        channels: int,
        regions: bool,
    ) -> OutputHead | None:
        """Return the head of a network in evaluation mode; None if its last layer is another.

        ``size`` is a small one that the network takes, ``channels`` those of its input.
        """
        found: list[tuple[nn.Module, Tensor, Tensor]] = []

        def note(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(layer, _ConvNd):
                found.append((layer, inputs[0], output))

        parameter = next(network.parameters())
        # Not constant, whose normalised features would be zeros whatever the network does.
        x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
        x = x.to(parameter)
        with register_module_forward_hook(note):
            output = network(x)
        layer, features, last = found[-1] if found else (None, x, x)
        if layer is None or last is not output or not _is_pointwise(layer):
            return None
        names = [name for name, part in network.named_modules() if part is layer]
        if not names or any(f"{names[0]}.weight" not in fold for fold in folds):
            return None
        head = cls(network, names[0], folds, regions)
        with head.taken_off():
            same = torch.equal(network(x), features)
        return head if same else None

    @contextlib.contextmanager
    def taken_off(self) -> Iterator[None]:
        """Let the network return the input of its last layer."""
        parent, _, last = self._name.rpartition(".")
        owner = self._network.get_submodule(parent)
        layer = self._network.get_submodule(self._name)
        setattr(owner, last, nn.Identity())
        try:
            yield
        finally:
            setattr(owner, last, layer)

    def without(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a network's weights but for the head's."""
        return {x: y for x, y in weights.items() if not x.startswith(f"{self._name}.")}

    def labels(self, features: Tensor) -> Tensor:
        """Return the labels of the first fold's features (1, channel, *spatial)."""
        flat = features[0].flatten(1)
        folds = (len(self.matrix) - 1) // self.channels
        weight, bias = self.matrix[: self.channels] * folds, self.matrix[-1] + self._elsewhere
        parts = [torch.addmm(bias, part.T, weight).argmax(1) for part in flat.split(CHUNK, 1)]
        return torch.cat(parts)

    def logits(self, features: Tensor) -> Tensor:
        """Return (voxel, output) for features (channel, voxel)."""
        return torch.addmm(self._elsewhere, features.T, self.matrix)


def _is_pointwise(layer: Any) -> bool:
    return (
        set(layer.kernel_size) == {1}
        and set(layer.stride) == {1}
        and layer.groups == 1
        and not layer.transposed
        and not any(size for size in layer.padding if not isinstance(size, str))
    )
