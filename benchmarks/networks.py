"""Networks of the step benchmarks: by name, ours and the plain transcription of the published one.

A name is a size of STU-Net (``small``), or PCT-Net or FMUNet in a mode (``PCTNet-mode1``).
"""

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
from stunet_plugin.networks.presets import MISFM_PRESETS, PCTNET, PRESETS
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.networks.topology import Strides, as_strides
from stunet_plugin.weights import misfm_keys, stunet

INPUT_CHANNELS = 1
MODE_PATCHES = {0: (96, 96, 96), 1: (64, 128, 128), 2: (32, 128, 128)}
"""Anisotropy mode to the patch it is measured with; that of mode 1 is the published example."""
MISFM = {f"{network.name}-mode{n}": (network, n) for network in MISFM_PRESETS for n in range(3)}
NAMES = (*PRESETS, *MISFM)


@dataclass(frozen=True)
class Subject:
    """A network in two ways.

    Attributes:
        architecture: of ours, as plans hold it.
        plain: builds the other one from a number of outputs, deep supervision and a patch size.
        translate: turns plain's state dict into ours.
        optimizer: as the trainer of this network makes it.
    """

    architecture: dict[str, Any]
    plain: Callable[[int, bool, tuple[int, ...]], nn.Module]
    translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

    @property
    def strides(self) -> Strides:
        return as_strides(self.architecture["arch_kwargs"]["strides"])

    def ours(self, outputs: int, deep_supervision: bool) -> nn.Module:
        """Build ours as a trainer does."""
        keys = ("network_class_name", "arch_kwargs", "_kw_requires_import")
        described = (self.architecture[key] for key in keys)
        network: nn.Module = get_network_from_plans(
            *described, INPUT_CHANNELS, outputs, deep_supervision=deep_supervision
        )
        return network


def find_subject(name: str) -> Subject:
    """Return the network of a name in NAMES."""
    if name not in MISFM:
        return _stunet(name)
    network, number = MISFM[name]
    is_pctnet = network is PCTNET

    def plain(outputs: int, deep_supervision: bool, patch: tuple[int, ...]) -> nn.Module:
        common = INPUT_CHANNELS, outputs, number
        if is_pctnet:
            widths = patch, pctnet.FEATURES, pctnet.DROPOUT
            return PlainPCTNet(*common, *widths, deep_supervision)
        built = PlainFMUNet(*common, fmunet.FEATURES, fmunet.DROPOUT, deep_supervision)
        return built.apply(fmunet.FMUNet.initialize)

    translate_pctnet = partial(misfm_keys.translate_pctnet, mode=number)
    translate = translate_pctnet if is_pctnet else misfm_keys.translate_fmunet
    optimizer = partial(torch.optim.Adam, lr=1e-3, weight_decay=1e-5)
    return Subject(network.architecture(get_mode(number)), plain, translate, optimizer)


def _stunet(size: str) -> Subject:
    preset = PRESETS[size]

    def plain(outputs: int, deep_supervision: bool, _: tuple[int, ...]) -> nn.Module:
        network = PlainSTUNet(preset, PUBLISHED_STRIDES, INPUT_CHANNELS, outputs, deep_supervision)
        return network.apply(STUNet.initialize)

    sgd = partial(torch.optim.SGD, lr=1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
    architecture = stunet_architecture(preset, PUBLISHED_STRIDES)
    return Subject(architecture, plain, stunet.translate_state_dict, sgd)
