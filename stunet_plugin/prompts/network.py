"""Network with prompt channels: it takes images alone, too, and starts from a pretrained stem."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.errors import PluginError
from stunet_plugin.prompts.channels import CHANNELS
from stunet_plugin.weights.pretrained import Pretrained


def take_images_alone(network: nn.Module, image_channels: int) -> nn.Module:
    """Let a network of image and prompt channels take the image's alone: without any prompt. That
    is what nnU-Net's own prediction gives it."""
    kind: Any = type(network)
    network.__class__ = _without_prompts(kind, image_channels)
    return network


@cache
def _without_prompts(kind: Any, image_channels: int) -> type[nn.Module]:
    # A subclass, as a module around it would change the names of all weights, which other programs
    # load into the network itself; a hook would keep it from OpenVINO.
    def forward(self: nn.Module, x: Tensor) -> Any:
        if x.shape[1] == image_channels:
            x = functional.pad(x, [0, 0] * (x.ndim - 2) + [0, CHANNELS])
        return kind.forward(self, x)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def widen_stem(given: Pretrained, network: nn.Module, image_channels: int) -> Pretrained:
    """Return pretrained weights for a network with prompt channels, whose weights are zero: at the
    start it computes what the pretrained network does. Weights of a promptable model stay.

    Raises:
        PluginError: they are for another number of image channels.
    """
    keys: Any = getattr(network, "keys_to_in_proj", ())
    names = [f"{again}{key}.weight" for key in keys for again in ("", "decoder.")]
    weights, widened = dict(given.checkpoint["network_weights"]), False
    for name in names:
        if name not in weights or weights[name].shape[1] == image_channels + CHANNELS:
            continue
        if (channels := weights[name].shape[1]) != image_channels:
            raise PluginError(
                f"The pretrained weights take {channels} input channel(s), this data has"
                f" {image_channels} and {CHANNELS} for prompts: `stunet import --in-channels"
                f" {image_channels}` makes weights that fit."
            )
        shape = list(weights[name].shape)
        shape[1] = CHANNELS
        weights[name] = torch.cat((weights[name], weights[name].new_zeros(shape)), 1)
        widened = True
    if not widened:
        return given
    renamed = f"{given.renamed}; prompt channels" if given.renamed else "Prompt channels"
    checkpoint = {**given.checkpoint, "network_weights": weights}
    return given._replace(checkpoint=checkpoint, renamed=f"{renamed} start at zero")
