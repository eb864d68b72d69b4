"""Pretrained weights of a training: reading them, why they do not fit, what was loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from stunet_plugin.errors import PluginError, few
from stunet_plugin.weights import nnssl
from stunet_plugin.weights.identify import is_decoder
from stunet_plugin.weights.tensors import strip_prefix

PRIORS = "shape_priors."
"""Names of the tensors of the network option SPM begin so."""
UNETS = ("PlainConvUNet", "ResidualEncoderUNet")
"""nnU-Net's own networks."""
_OWN_PLANS = "; `stunet plan-like` writes plans with the weights' own network"
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


class Pretrained(NamedTuple):
    """A checkpoint whose ``network_weights`` have the names of a network's tensors, the tensors as
    the file names them, and what was renamed, "" if nothing was."""

    checkpoint: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    renamed: str


def read_for(file: str, network: torch.nn.Module) -> Pretrained:
    """Read the file after ``-pretrained_weights`` for a network."""
    checkpoint = read_checkpoint(file, "-pretrained_weights")
    own, tensors = list(network.state_dict()), checkpoint["network_weights"]
    weights, prefix = strip_prefix(tensors, own[0])
    renamed = f"Prefix {prefix!r} stripped from all names" if prefix else ""
    plan = nnssl.adaptation_plan(checkpoint) if nnssl.is_foreign(checkpoint) else None
    if plan:
        weights, renamed = nnssl.rename(weights, plan), f"Names as its {nnssl.ENTRY} says"
    if is_encoder_only(weights, network):
        # The decoder of nnU-Net's networks holds the encoder under a second name.
        again = {x: x.removeprefix("decoder.") for x in own if x.startswith("decoder.encoder.")}
        weights |= {x: weights[first] for x, first in again.items() if first in weights}
        renamed = f"{renamed or 'An encoder alone'}; the decoder starts at random"
    if starting := _starting_priors(weights, network):
        weights = {x: value for x, value in weights.items() if x not in starting}
        what = f"{len(starting)} tensors of the shape priors start anew"
        renamed = f"{renamed}; {what}" if renamed else what
    return Pretrained({**checkpoint, "network_weights": weights}, tensors, renamed)


def _starting_priors(weights: Mapping[str, torch.Tensor], network: torch.nn.Module) -> set[str]:
    """Return the tensors of a network's shape priors that a file lacks, or has for other classes
    or another patch: an option may be added to what was trained without it."""
    return {
        name
        for name, value in network.state_dict().items()
        if name.startswith(PRIORS) and (name not in weights or weights[name].shape != value.shape)
    }


def show_as_own(network: torch.nn.Module, given: Pretrained) -> tuple[Any, ...]:
    """Let a network say that its tensors are those of a file, so that nnU-Net's loader finds them,
    and load them under its own names; heads and what the file lacks stay as they are.

    Returns:
        Handles of hooks, to be removed after loading.
    """
    names, ours = list(network.state_dict()), given.checkpoint["network_weights"]

    def show_theirs(_: Any, state: dict[str, Any], *__: Any) -> None:
        state.clear()
        state.update(given.tensors)

    def take_ours(_: Any, state: dict[str, Any], *__: Any) -> None:
        state.clear()
        own: dict[str, torch.Tensor] = {
            **dict(network.named_parameters(remove_duplicate=False)),
            **dict(network.named_buffers(remove_duplicate=False)),
        }
        for name in names:
            taken = name in ours and ".seg_layers." not in name
            state[name] = ours[name] if taken else own[name].detach()

    before_loading = network.register_load_state_dict_pre_hook(take_ours)
    # Before the hook that shards weights.
    hooks: Any = network._load_state_dict_pre_hooks
    hooks.move_to_end(before_loading.id, last=False)
    return before_loading, network.register_state_dict_post_hook(show_theirs)


def is_encoder_only(weights: Mapping[str, Any], network: torch.nn.Module) -> bool:
    """Return whether weights hold an encoder, and nothing of a decoder but perhaps heads."""
    encoder = f"{getattr(network, 'key_to_encoder', None)}."
    return any(x.startswith(encoder) for x in weights) and not any(map(is_decoder, weights))


def describe_mismatches(
    network: torch.nn.Module, weights: dict[str, torch.Tensor], heads_too: bool
) -> str:
    """Describe how weights differ from the network (which may be on the meta device) in names and
    shapes, in which stages, and what to do; empty if they fit. ``heads_too``: fine-tuning leaves
    the heads out, and takes an encoder without a decoder."""
    encoder_only = not heads_too and is_encoder_only(weights, network)
    own = {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if (heads_too or ".seg_layers." not in name) and not (encoder_only and is_decoder(name))
    }
    anew = set() if heads_too else set(_starting_priors(weights, network))
    own = {name: shape for name, shape in own.items() if name not in anew}
    given = {name: tuple(value.shape) for name, value in weights.items() if name not in anew}
    if missing := [name for name in own if name not in given]:
        return (
            f"{len(missing)} of {len(own)} tensors are missing (for example {missing[0]}), in"
            f" {few(_stages(missing))}. Are these the weights of another network? `stunet inspect`"
            f" says what a file is{_OWN_PLANS if type(network).__name__ in UNETS else ''}"
        )
    different = [name for name in own if given[name] != own[name]]
    surplus = [name for name in given if name not in own]
    if not different and surplus and heads_too:
        return f"it has tensors that this network lacks (for example {surplus[0]})"
    parts = ("encoder.", "decoder.", PRIORS)
    left = [x for x in surplus if x.startswith(parts) and ".seg_layers." not in x]
    if not different and left:
        return (
            f"it has {len(left)} tensors that this network lacks (for example {left[0]}), in"
            f" {few(_stages(left))}. `stunet inspect` says what a file is{_OWN_PLANS}"
        )
    if not different:
        return ""
    name = different[0]
    return (
        f"{len(different)} of {len(own)} tensors have another shape (for example {name}:"
        f" {given[name]}, here {own[name]}), in {few(_stages(different))}."
        f" {_advice(network, different, given, own)}"
    )


def _stages(names: Sequence[str]) -> list[str]:
    """Return the stages that tensors are in, such as encoder.stages.3, in their order."""
    names = [name for name in names if not name.startswith("decoder.encoder.")] or list(names)
    return list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))


def _advice(
    network: torch.nn.Module,
    different: Sequence[str],
    given: Mapping[str, tuple[int, ...]],
    own: Mapping[str, tuple[int, ...]],
) -> str:
    """Return what to do about tensors of another shape."""
    name, mode = different[0], getattr(network, "mode", None)
    stem = [f"{layer}.weight" for layer in getattr(network, "keys_to_in_proj", ())]
    stem += [f"decoder.{name}" for name in stem]
    if any(len(given[name]) != len(own[name]) for name in different):
        return "2D weights do not fit a 3D configuration, nor the other way round"
    if all(name in stem for name in different):
        return (
            f"The weights take {given[name][1]} input channel(s), this data has {own[name][1]}:"
            f" `stunet import --in-channels {own[name][1]}` makes weights that fit"
        )
    if type(network).__name__ in UNETS:
        same_width = all(given[name][:2] == own[name][:2] for name in different)
        what = "kernels or strides" if same_width else "widths"
        return f"The weights have other {what} than the plan's network{_OWN_PLANS}"
    if mode is None:
        return "Use the trainer of the same size (its _ft variant), or weights of this size"
    if any(given[name][:2] != own[name][:2] for name in different):
        return (
            "The weights have other widths than the plan's network. `stunet inspect` prints theirs;"
            ' write them into the plans file, as "features_per_stage" in the arch_kwargs of the'
            " configuration's architecture"
        )
    return (
        f"This network is in anisotropy mode {mode.number}: import weights for it (`stunet"
        f" import --mode {mode.number}`; a FMUNet file holds one mode), or plan for theirs"
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
        f" do not: {len(left) - len(others)} of the segmentation heads{besides}."
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
