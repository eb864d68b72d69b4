"""U-Net base: what all networks share, the checks of arguments and inputs among it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from dynamic_network_architectures.architectures.abstract_arch import (
    AbstractDynamicNetworkArchitectures,
)
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook

from stunet_plugin.networks import cpu_engine
from stunet_plugin.networks.topology import Strides, check_patch_size

NEGATIVE_SLOPE = 1e-2  # of every LeakyReLU, and assumed by the He initialisation


class InstanceNorm(nn.Module):
    """Instance norm of any number of spatial axes, affine, without running statistics.

    In training on the CPU it is a group norm with one channel per group, the same function in half
    the time (measured). Predictions keep to torch's own, so that they round as published.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.device.type == "cpu":
            return functional.group_norm(x, len(self.weight), self.weight, self.bias, self.eps)
        return functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


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
        """Return the output of every stage, full resolution first."""
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
        # Refines the skips, see networks.shape_priors.
        self.shape_priors: nn.Module | None = None
        check_integer("input_channels", input_channels)
        check_integer("num_classes", num_classes)

    @property
    def title(self) -> str:
        """What messages call the network."""
        return f"This {type(self).__name__}"

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images to logits, or a list of them, one per decoder stage, full resolution first."""
        check_patch_size(x.shape[2:], self.strides, self.title)
        if not self.training and x.device.type == "cpu":
            output = cpu_engine.predict(self, x)
            if output is not None:
                return output
        skips = self.encoder(x)
        if self.shape_priors is not None:
            skips = self.shape_priors(skips)
        return self.decoder(skips)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation as published, for ``network.apply``."""
        InitWeights_He(NEGATIVE_SLOPE)(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return the elements that all convolutions and linear layers put out for one sample of
        ``input_size`` voxels, nnU-Net's measure of memory."""
        sizes: list[int] = []

        def note(layer: nn.Module, _: Any, output: Tensor) -> None:
            if isinstance(layer, (_ConvNd, nn.Linear)):
                sizes.append(output.numel())

        channels: Any = self.get_submodule(self.keys_to_in_proj[0]).in_channels
        x = torch.empty(1, channels, *input_size, device="meta")
        weights = {name: value.to("meta") for name, value in self.state_dict().items()}
        training = self.training
        try:
            with torch.no_grad(), register_module_forward_hook(note):
                functional_call(self.eval(), weights, x)
        finally:
            self.train(training)
        return sum(sizes)


def check_integer(name: str, number: int, least: int = 1) -> None:
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer >= {least}, not {number!r}.")


def per_stage(
    name: str, value: float | Sequence[float], count: int, integers: bool = True
) -> tuple[Any, ...]:
    """Return one positive integer, or probability below 1, per stage; one alone stands for all."""
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
