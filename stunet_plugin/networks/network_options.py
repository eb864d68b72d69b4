"""Network options: what is added to the network of a plan, each an entry of the plan with its
numbers.

A plan with options names :func:`build_with_options` as its network, and under ``arch_kwargs`` the
network itself, the options, and what nnU-Net reads there (strides). So a stock ``nnUNetTrainer``
trains it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.networks import host_unets
from stunet_plugin.networks.global_receptive_conv import GRC
from stunet_plugin.networks.shape_priors import SPM
from stunet_plugin.networks.topology import Strides, as_strides
from stunet_plugin.utils.validation import Fields

OPTIONS: dict[str, Any] = {option.name: option for option in (GRC, SPM)}
"""By their names in plans, in the order in which they are added to a network."""


def build_with_options(
    input_channels: int,
    num_classes: int,
    network: Mapping[str, Any],
    options: Mapping[str, Any],
    patch_size: Sequence[int],
    strides: Sequence[Sequence[int]],
    deep_supervision: bool = False,
) -> nn.Module:
    """Build the network of an ``architecture`` entry and add options to it, as
    :func:`complete_options` returns them; nnU-Net initialises it afterwards."""
    built = _plain(Fields(network, "The plan"), input_channels, num_classes, deep_supervision)
    stages = as_strides(strides)
    for option in _completed(built, options, patch_size, stages, "The plan"):
        option.add_to(built, stages, patch_size, num_classes)
    return built


def complete_options(
    network: Mapping[str, Any], options: Mapping[str, Any], patch: Sequence[int], who: str
) -> tuple[dict[str, Any], list[str]]:
    """Return options of an ``architecture`` entry with all their numbers, which follow from its
    network and the patch where they are not given, and a line for each; ``who``: the trainer."""
    strides = as_strides(network["arch_kwargs"]["strides"])
    with torch.device("meta"):
        # Numbers of channels that image and labels will have change nothing here.
        built = _plain(Fields(network, f"The plan of {who}"), 1, 2, True)
    completed = _completed(built, options, patch, strides, f"The plan of {who}")
    # As JSON has them.
    numbers = {option.name: _lists(asdict(option)) for option in completed}
    return numbers, [option.describe() for option in completed]


def _plain(network: Fields, channels: int, outputs: int, deep_supervision: bool) -> nn.Module:
    names = ("network_class_name", "arch_kwargs", "_kw_requires_import")
    path, *described = (network.get(name) for name in names)
    path = host_unets.PATHS.get(path, path)
    built: nn.Module = get_network_from_plans(
        path, *described, channels, outputs, allow_init=False, deep_supervision=deep_supervision
    )
    return built


def _completed(
    network: Any, options: Mapping[str, Any], patch: Sequence[int], strides: Strides, where: str
) -> list[Any]:
    if unknown := [name for name in options if name not in OPTIONS]:
        raise PluginError(
            f"{where} has the network option {unknown[0]!r}, which is not known here."
            f"{did_you_mean(unknown[0], OPTIONS)} Options: {', '.join(OPTIONS)}."
        )
    if not isinstance(getattr(getattr(network, "encoder", None), "stages", None), nn.Module):
        raise PluginError(
            f"{where} has network options, which are for U-Nets with encoder.stages (STU-Net,"
            f" nnU-Net's own, PCT-Net, FMUNet), not for {type(network).__name__}."
        )
    return [
        option.complete(network, strides, patch, Fields(options[name], f"{where}, {name}"))
        for name, option in OPTIONS.items()
        if name in options
    ]


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(one) for key, one in value.items()}
    return [_lists(one) for one in value] if isinstance(value, tuple) else value
