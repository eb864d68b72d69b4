"""Pretrained weights of a training: reading them, why they do not fit, what was loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stunet_plugin.errors import PluginError

VOLUME_FUSION_ENTRY = "volume_fusion"
"""Entry of dataset.json, also in every checkpoint, that only a Volume Fusion training has."""


def read_checkpoint(file: str, what: str) -> dict[str, Any]:
    """Map a checkpoint of nnU-Net v2 into memory. nnU-Net's own loader unpickles the same file
    next, so a stricter one here would gain nothing."""
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        checkpoint: dict[str, Any] = torch.load(
            file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=False
        )
        if not all(isinstance(x, torch.Tensor) for x in checkpoint["network_weights"].values()):
            raise TypeError("network_weights holds something other than tensors")
    except Exception as error:
        raise PluginError(
            f"{what} {file} is not a checkpoint of nnU-Net v2, or is damaged"
            f" ({type(error).__name__}: {str(error)[:200]}). Published STU-Net weights become one"
            " with `stunet import`; `stunet inspect` says what a file is."
        ) from error
    return checkpoint


def describe_mismatches(
    network: torch.nn.Module, weights: dict[str, torch.Tensor], heads_too: bool
) -> str:
    """Describe how weights differ from the network (which may be on the meta device) in names and
    shapes, and what to do; empty if they fit. ``heads_too``: fine-tuning leaves the heads out."""
    own = {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if heads_too or ".seg_layers." not in name
    }
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if missing := [name for name in own if name not in given]:
        return (
            f"{len(missing)} of {len(own)} tensors are missing (for example {missing[0]}). Are"
            " these the weights of another network? `stunet inspect` says what a file is"
        )
    different = [name for name in own if given[name] != own[name]]
    surplus = [name for name in given if name not in own]
    if not different and surplus and heads_too:
        return f"it has tensors that this network lacks (for example {surplus[0]})"
    if not different:
        return ""
    name = different[0]
    mode = getattr(network, "mode", None)
    stem = [f"{layer}.weight" for layer in getattr(network, "keys_to_in_proj", ())]
    if any(len(given[name]) != len(own[name]) for name in different):
        advice = "2D weights do not fit a 3D configuration, nor the other way round"
    elif all(name in stem for name in different):
        advice = (
            f"The weights take {given[name][1]} input channel(s), this data has {own[name][1]}:"
            f" `stunet import --in-channels {own[name][1]}` makes weights that fit"
        )
    elif mode is None:
        advice = "Use the trainer of the same size (its _ft variant), or weights of this size"
    elif any(given[name][:2] != own[name][:2] for name in different):
        advice = (
            "The weights have other widths than the plan's network. `stunet inspect` prints theirs;"
            ' write them into the plans file, as "features_per_stage" in the arch_kwargs of the'
            " configuration's architecture"
        )
    else:
        advice = (
            f"This network is in anisotropy mode {mode.number}: import weights for it (`stunet"
            f" import --mode {mode.number}`; a FMUNet file holds one mode), or plan for theirs"
        )
    return (
        f"{len(different)} of {len(own)} tensors have another shape (for example {name}:"
        f" {given[name]}, here {own[name]}). {advice}"
    )


def describe_loaded(own: Mapping[str, torch.Tensor], checkpoint: dict[str, Any]) -> str:
    """Say in one line what a network has loaded from a checkpoint, where nnU-Net prints a page.
    ``own``: its weights before the first step; what equals the checkpoint's counts as loaded."""
    given = checkpoint["network_weights"]
    left = [
        name
        for name, value in own.items()
        if name not in given
        or given[name].shape != value.shape
        or not torch.equal(value.cpu(), given[name].to(value.dtype))
    ]
    others = [name for name in left if ".seg_layers." not in name]
    share = 1 - sum(own[name].numel() for name in left) / sum(x.numel() for x in own.values())
    # Heads are small: rounding must not make "100 %" of all but them.
    share = min(share, 0.999) if left else share
    besides = f" and {len(others)} other(s), such as {others[0]}" if others else ""
    return (
        f"Pretrained weights: {len(own) - len(left)} of {len(own)} tensors ({share:.1%} of the"
        f" weights) come from {checkpoint.get('trainer_name', 'an unknown trainer')}; {len(left)}"
        f" start at random: {len(left) - len(others)} of the segmentation heads{besides}."
    )


def pretrained_weights_on_command_line(arguments: Sequence[str]) -> str | None:
    """Return the file after ``-pretrained_weights``, or None. nnU-Net does not tell the trainer
    which one it is; only the command line does, short of patching nnU-Net."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument == "-pretrained_weights":
            return following
        if argument.startswith("-pretrained_weights="):
            return argument.partition("=")[2]
    return None
