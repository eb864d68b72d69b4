"""What the step benchmarks compare: per name, our network and the plain transcription of the
published way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from plain_fmunet import PlainFMUNet
from plain_pctnet import PlainPCTNet
from plain_stunet import PlainSTUNet
from torch import Tensor, nn

from stunet_plugin.networks import fmunet, pctnet
from stunet_plugin.networks.anisotropy import get_mode
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.memory import PUBLISHED_STRIDES
from stunet_plugin.networks.misfm_from_plan import NETWORKS, PCTNET
from stunet_plugin.networks.presets import PRESETS, get_preset
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.networks.topology import Strides
from stunet_plugin.weights import fmunet_keys, pctnet_keys, stunet_keys

INPUT_CHANNELS = 1


@dataclass(frozen=True)
class Subject:
    """A network in two ways.

    Attributes:
        strides: of both.
        ours, plain: build them for a number of outputs and deep supervision (on or off); plain also
            for a patch size.
        translate: turns plain's state dict into ours.
        optimizer: as the trainer of this network makes it.
    """

    strides: Strides
    ours: Callable[[int, bool], nn.Module]
    plain: Callable[[int, bool, tuple[int, ...]], nn.Module]
    translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def find_subject(name: str) -> Subject:
    """Return a subject: the name of a size of STU-Net, or one of :func:`misfm_name`."""
    if name in PRESETS:
        return _stunet(name)
    network, _, mode = name.partition("-mode")
    return _misfm(network, int(mode))


def misfm_name(network: str, mode: int) -> str:
    """Name PCT-Net or FMUNet in one anisotropy mode."""
    return f"{network}-mode{mode}"


def _stunet(size: str) -> Subject:
    preset = get_preset(size)

    def plain(classes: int, deep_supervision: bool, _: tuple[int, ...]) -> nn.Module:
        return PlainSTUNet(
            preset, PUBLISHED_STRIDES, INPUT_CHANNELS, classes, deep_supervision
        ).apply(STUNet.initialize)

    return Subject(
        PUBLISHED_STRIDES,
        partial(_from_plan, stunet_architecture(preset, PUBLISHED_STRIDES)),
        plain,
        stunet_keys.translate_state_dict,
        partial(torch.optim.SGD, lr=1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True),
    )


def _misfm(name: str, number: int) -> Subject:
    network = next(network for network in NETWORKS if network.name == name)
    mode = get_mode(number)

    def plain(classes: int, deep_supervision: bool, patch: tuple[int, ...]) -> nn.Module:
        if network is PCTNET:
            sizes = patch, pctnet.FEATURES, pctnet.DROPOUT
            return PlainPCTNet(INPUT_CHANNELS, classes, number, *sizes, deep_supervision)
        built = PlainFMUNet(
            INPUT_CHANNELS, classes, number, fmunet.FEATURES, fmunet.DROPOUT, deep_supervision
        )
        return built.apply(fmunet.FMUNet.initialize)

    return Subject(
        mode.strides,
        partial(_from_plan, network.architecture(mode)),
        plain,
        partial(pctnet_keys.translate_state_dict, mode=number)
        if network is PCTNET
        else fmunet_keys.translate_state_dict,
        partial(torch.optim.Adam, lr=1e-3, weight_decay=1e-5),
    )


def _from_plan(architecture: dict[str, Any], classes: int, deep_supervision: bool) -> nn.Module:
    """Build our network in the way a trainer does."""
    network: nn.Module = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        INPUT_CHANNELS,
        classes,
        deep_supervision=deep_supervision,
    )
    return network
