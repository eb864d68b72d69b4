"""U-Net base: what all networks share, the checks of arguments and inputs among it.

Axes of all tensors: (batch, channel, *spatial), spatial in nnU-Net's order after its transpose
(axis 0 is the coarse one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from dynamic_network_architectures.architectures.abstract_arch import (
    AbstractDynamicNetworkArchitectures,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from stunet_plugin.networks.topology import Strides, check_patch_size


class Encoder(nn.Module):
    """Stages, full resolution first; attributes are named as in dynamic_network_architectures."""

    def __init__(
        self,
        stages: Iterable[nn.Module],
        features_per_stage: tuple[int, ...],
        conv_op: type[nn.Module],
        kernel_sizes: Strides,
        strides: Strides,
    ) -> None:
        super().__init__()
        self.conv_op = conv_op
        self.output_channels = features_per_stage
        self.kernel_sizes = kernel_sizes
        self.strides = strides
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(batch, input_channels, *spatial) to the output of every stage, full resolution first:
        (batch, features of the stage, *spatial / its strides so far)."""
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class BaseUNet(AbstractDynamicNetworkArchitectures):
    """Base of the networks. A subclass builds ``encoder`` and ``decoder`` and sets ``strides``."""

    encoder: Encoder
    decoder: Any
    strides: Strides

    def __init__(self, input_channels: int, num_classes: int, in_proj: Sequence[str]) -> None:
        super().__init__()
        # Where nnssl and other loaders of pretrained weights find the encoder, its stem, and what
        # depends on the channels.
        self.key_to_encoder = "encoder.stages"
        self.key_to_stem = "encoder.stages.0"
        self.keys_to_in_proj = in_proj
        check_integer("input_channels", input_channels)
        check_integer("num_classes", num_classes)

    @property
    def title(self) -> str:
        """What messages call the network."""
        return f"This {type(self).__name__}"

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(batch, input_channels, *spatial) to (batch, num_classes, *spatial), or a list of them,
        one per decoder stage, full resolution first."""
        check_patch_size(x.shape[2:], self.strides, self.title)
        if not self.training and not torch.compiler.is_compiling():
            # Imported here, because it knows the blocks of all networks.
            from stunet_plugin.networks import cpu_inference

            if cpu_inference.applies(self, x):
                return cpu_inference.predict(self, x)
        return self.decoder(self.encoder(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return the number of elements that all convolutions and linear layers put out for one
        sample of ``input_size`` voxels, nnU-Net's measure of memory."""
        sizes: list[int] = []
        layers = [part for part in self.modules() if isinstance(part, (_ConvNd, nn.Linear))]
        hooks = [
            layer.register_forward_hook(lambda *call: sizes.append(call[2].numel()))
            for layer in layers
        ]
        channels: Any = self.get_submodule(self.keys_to_in_proj[0]).in_channels
        weights = {name: value.to("meta") for name, value in self.state_dict().items()}
        training = self.training
        try:
            with torch.no_grad():
                x = torch.empty(1, channels, *input_size, device="meta")
                functional_call(self.eval(), weights, x)
        finally:
            self.train(training)
            for hook in hooks:
                hook.remove()
        return sum(sizes)


def check_integer(name: str, number: int, least: int = 1) -> None:
    """Raise a ValueError unless a number is an integer and not smaller than the least."""
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer >= {least}, not {number!r}.")


def per_stage(
    name: str, value: float | Sequence[float], count: int, integers: bool = True
) -> tuple[Any, ...]:
    """Return one number per stage, where one alone stands for all.

    Raises:
        ValueError: not as many positive integers, or probabilities below 1, as there are stages.
    """
    single = isinstance(value, (int, float))
    numbers = (value,) * count if single else tuple(value) if isinstance(value, Sequence) else ()
    fits = all(
        isinstance(n, int) and n >= 1 if integers else isinstance(n, (int, float)) and 0 <= n < 1
        for n in numbers
    )
    if len(numbers) != count or not fits:
        kind = "positive integers" if integers else "numbers >= 0 and < 1"
        raise ValueError(f"{name} must be {count} {kind}, one per stage, not {value!r}.")
    return numbers
