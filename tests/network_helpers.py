"""Small networks of every kind, and plain transcriptions of the published code."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stunet_plugin.networks.fmunet import FMUNet
from stunet_plugin.networks.from_plan import STUNET_CLASS
from stunet_plugin.networks.network_options import OPTIONS, build_with_options
from stunet_plugin.networks.pctnet import PCTNet
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.networks.unetr import UNETR

ISOTROPIC = [[1, 1, 1]] + [[2, 2, 2]] * 5
SMALL: dict[str, Any] = {"features_per_stage": (4, 8, 16, 32, 64)}
"""Widths of PCT-Net and FMUNet in the fixtures."""
NO_DROPOUT: dict[str, Any] = {"dropout_per_stage": (0.0,) * 5}

STUNET: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [4, 8, 16, 32, 32, 32],
    "conv_op": nn.Conv3d,
    "kernel_sizes": 3,
    "strides": ISOTROPIC,
    "n_blocks_per_stage": 1,
    "n_blocks_per_stage_decoder": 1,
}
THICK = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1]]
FLAT = {"conv_op": nn.Conv2d, "strides": [[1, 1]] + [[2, 2]] * 5}

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "STUNet": (partial(STUNet, **STUNET), (32, 32, 64)),
    "STUNet thick": (partial(STUNet, **STUNET | {"strides": THICK}), (8, 32, 32)),
    "STUNet 2D": (partial(STUNet, **STUNET | FLAT), (64, 96)),
}
for mode, patch in enumerate([(32, 32, 48), (8, 48, 32), (8, 32, 48)]):
    NETWORKS[f"PCTNet {mode}"] = partial(PCTNet, mode=mode, **SMALL), patch
    NETWORKS[f"FMUNet {mode}"] = partial(FMUNet, mode=mode, **SMALL), patch
"""Name to what builds it from its remaining arguments, and a patch that it takes."""


def with_options(
    settings: dict[str, Any], patch: Sequence[int], input_channels: int, num_classes: int,
    deep_supervision: bool, options: dict[str, Any], **changes: Any,
) -> nn.Module:  # fmt: skip
    """Build an STU-Net with network options, as a plan describes it."""
    kwargs = {**settings, **changes}
    network = {"network_class_name": STUNET_CLASS, "arch_kwargs": kwargs, "_kw_requires_import": []}
    strides = kwargs["strides"]
    return build_with_options(
        input_channels, num_classes, network, options, patch, strides, deep_supervision
    )


OPTION_NUMBERS: dict[str, Any] = {"grc": {}, "spm": {"dropout": 0.0, "hidden": 16}}
for option in OPTIONS:
    for name, settings in (("STUNet", STUNET), ("STUNet 2D", STUNET | FLAT)):
        patch = NETWORKS[name][1]
        make = partial(
            with_options, settings, patch, options={option: OPTION_NUMBERS.get(option, {})}
        )
        NETWORKS[f"{name} {option.upper()}"] = make, patch
UNETR_SETTINGS: dict[str, Any] = {
    "patch_size": (20, 40, 48),
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    "width": 24,
    "depth": 12,
    "heads": 2,
    "features": 2,
}
FLAT_UNETR = {"patch_size": (40, 48), "strides": [[1, 1], *[[2, 2]] * 4]}
for suffix, changes in (("", {}), (" STP", {"pruning": {"ratio": 0.5}})):
    for name, sizes in (("UNETR", {}), ("UNETR 2D", FLAT_UNETR)):
        settings = UNETR_SETTINGS | sizes
        NETWORKS[f"{name}{suffix}"] = partial(UNETR, **settings | changes), settings["patch_size"]
WITH_OPTIONS = tuple(f"STUNet {option.upper()}" for option in OPTIONS)
ONE_OF_EACH = ("STUNet", "PCTNet 1", "FMUNet 1", *WITH_OPTIONS, "UNETR STP")


def build(name: str, **changes: Any) -> Any:
    """Return a network of NETWORKS: one input channel, three outputs, deep supervision."""
    torch.manual_seed(0)
    settings = {"input_channels": 1, "num_classes": 3, "deep_supervision": True}
    network = NETWORKS[name][0](**{**settings, **changes})
    return network.apply(network.initialize)


def image(name: str, batch: int = 2, channels: int = 1) -> Tensor:
    """Return a random input for a network of NETWORKS."""
    torch.manual_seed(2)
    return torch.randn(batch, channels, *NETWORKS[name][1])


def randomise(network: nn.Module) -> nn.Module:
    """Give parameters and running statistics values of a size that matters to the output."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    return network


def plain_module(name: str) -> Any:
    """Return a module of benchmarks/ with a plain transcription of the published code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        return importlib.import_module(f"plain_{name}")


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return every parameter's gradient of a loss of all outputs, and every buffer after it."""
    network.zero_grad()
    torch.manual_seed(1)
    sum(output.square().mean() for output in network(x)).backward()  # type: ignore[union-attr]
    named = {name: parameter.grad for name, parameter in network.named_parameters()}
    # torch's bfloat16 gradients of a weight can be rubbish on the CPU where the map is tiny.
    mixed = torch.is_autocast_enabled("cpu")
    sure = [grad for grad in named.values() if grad is None or grad.ndim == 1 or not mixed]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in sure)
    return {**named, **dict(network.named_buffers())}  # type: ignore[dict-item]


def largest_difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any pair of outputs, relative to logits above 1."""
    assert len(outputs) == len(expected)
    return max(
        ((one - other).abs().max() / max(1, other.abs().max())).item()
        for one, other in zip(outputs, expected, strict=True)
    )
