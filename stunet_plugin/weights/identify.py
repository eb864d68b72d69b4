"""Identification of the network in a checkpoint, from its keys and shapes alone, as names of files
and metadata may be wrong. What is particular to a network is in ``stunet.py``, ``misfm.py`` and
``unet.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError, few
from stunet_plugin.networks.anisotropy import AnisotropyMode
from stunet_plugin.networks.from_plan import resolve, resolve_planned
from stunet_plugin.networks.presets import MISFMPreset, STUNetPreset
from stunet_plugin.networks.topology import Strides
from stunet_plugin.weights import nnssl
from stunet_plugin.weights.safe_loading import load_checkpoint, plain_copy, plain_dict
from stunet_plugin.weights.sam_keys import sam_weights
from stunet_plugin.weights.tensors import DIMENSIONS, check_shapes, strip_prefix

if TYPE_CHECKING:
    from torch import Tensor, nn

HEADS = ".seg_layers."
"""Part of the names of the segmentation heads."""


class Origin(Enum):
    """Who wrote a checkpoint, and of which network."""

    V1 = "nnU-Net v1 checkpoint of the published STU-Net"
    V2_PORT = "checkpoint of the published STU-Net port to nnU-Net v2"
    OWN = "nnU-Net v2 checkpoint of this plugin's STU-Net"
    PCTNET = "PyMIC checkpoint of PCT-Net"
    FMUNET = "PyMIC checkpoint of FMUNet"
    OWN_PCTNET = "nnU-Net v2 checkpoint of this plugin's PCT-Net"
    OWN_FMUNET = "nnU-Net v2 checkpoint of this plugin's FMUNet"
    PLAIN = "nnU-Net v2 checkpoint of a PlainConvUNet"
    RESIDUAL = "nnU-Net v2 checkpoint of a ResidualEncoderUNet"
    NNSSL = "nnssl checkpoint of one of nnU-Net's networks"

    @property
    def pymic(self) -> bool:
        """Whether it says nothing of the plan it was trained with, nor what its outputs mean."""
        return self in (Origin.PCTNET, Origin.FMUNET)


UNETS = (Origin.PLAIN, Origin.RESIDUAL, Origin.NNSSL)
"""Of nnU-Net's own networks."""
_V1, _V2, _PYMIC = "state_dict", "network_weights", "model_state_dict"
"""Entries that hold the weights in checkpoints of nnU-Net v1, v2 and of PyMIC."""
_SIGNATURES = (
    (Origin.V1, _V1, "conv_blocks_context.0.0.conv1.weight"),
    (Origin.V2_PORT, _V2, "conv_blocks_context.0.0.conv1.weight"),
    (Origin.PCTNET, _PYMIC, "embeddings.0.proj.weight"),
    (Origin.FMUNET, _PYMIC, "encoder.en_conv0.conv_list.0.0.weight"),
    (Origin.OWN, _V2, "encoder.stages.0.0.shortcut.weight"),
    (Origin.OWN_PCTNET, _V2, "encoder.stages.2.2.transformer.blocks.0.attention.qkv.weight"),
    (Origin.OWN_FMUNET, _V2, "decoder.bottom.units.0.conv.weight"),
    (Origin.PLAIN, _V2, "encoder.stages.0.0.convs.0.conv.weight"),
    (Origin.RESIDUAL, _V2, "encoder.stem.convs.0.conv.weight"),
)
"""Where each origin keeps its weights, and a name that only this network has."""


@dataclass(frozen=True)
class NetworkWeights:
    """Weights of a network under this plugin's names.

    Attributes:
        checkpoint: all that the file holds, untrusted.
        tensors: name to tensor; those of a zip-format file are still mapped to it.
        title: network, size, widths, for people.
        preset: the published network; None for an STU-Net of no published size.
        published_size: whether the trainer builds these widths and depths from any plan.
        mode: anisotropy mode of a PCT-Net or FMUNet.
        plans_like: name of the plans that `stunet plan-like` makes for it.
        features: widths of the stages, full resolution first.
        input_weights: names of the tensors (width, channels, *kernel) that read the image channels.
        default_stem: how these are adapted to other image channels if the user does not say.
        outputs: of the segmentation heads, 0 where these were left out.
        entry: the ``architecture`` entry of a plan, strides to be filled in unless there is a mode.
        encoder_only: whether the decoder is not there.
        upsampling: strides of the transposed convolutions, finest first, which tell the poolings.
    """

    origin: Origin
    checkpoint: Mapping[str, Any]
    tensors: dict[str, Tensor]
    title: str
    preset: STUNetPreset | MISFMPreset | None
    published_size: bool
    mode: AnisotropyMode | None
    trainer: str
    plans_like: str
    features: tuple[int, ...]
    input_weights: tuple[str, ...]
    default_stem: str
    outputs: int
    entry: dict[str, Any]
    encoder_only: bool = False
    upsampling: Strides = ()

    @property
    def kind(self) -> str:
        """The network's class."""
        return str(self.entry["network_class_name"]).rpartition(".")[2]

    @property
    def input_channels(self) -> int:
        return int(self.tensors[self.input_weights[0]].shape[1])

    @property
    def misfm(self) -> MISFMPreset | None:
        """The preset of a PCT-Net or FMUNet."""
        return self.preset if isinstance(self.preset, MISFMPreset) else None

    @property
    def poolings(self) -> Strides | None:
        """Strides after the first stage if the network dictates them; None if the plan does."""
        return self.mode.strides[1:] if self.mode else self.upsampling or None

    @property
    def description(self) -> str:
        """Network, size, channels and outputs, for people."""
        own = self.network.named_parameters()
        parameters = sum(x.numel() for name, x in own if self._expects(name))
        rest = f"{self.outputs} outputs" if self.outputs else "heads left out"
        return (
            f"{self.title}, {parameters:,} parameters, {self.input_channels} input channel(s),"
            f" {'encoder only' if self.encoder_only else rest}"
        )

    def _expects(self, name: str) -> bool:
        """Return whether a tensor of the network has to be there."""
        if self.encoder_only:
            return name.startswith("encoder.")
        return bool(self.outputs) or HEADS not in name

    @cached_property
    def network(self) -> nn.Module:
        """The network of these sizes on the meta device, by nnU-Net's own function."""
        import torch
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        # Of an encoder alone any will do, but with poolings its shortcuts have other names.
        poolings = self.upsampling or ((2,) * DIMENSIONS,) * (len(self.features) - 1)
        entry = self.architecture(((1,) * DIMENSIONS, *poolings))
        sizes = self.input_channels, self.outputs or 1
        with torch.device("meta"):
            # The entry's values are the class, its arguments and which of them to import.
            network: nn.Module = get_network_from_plans(*entry.values(), *sizes, allow_init=False)
        return network

    def architecture(self, strides: Strides) -> dict[str, Any]:
        """Return the ``architecture`` entry of a plan with these strides."""
        if self.mode:
            return self.entry
        kwargs = self.entry["arch_kwargs"] | {"strides": [list(stage) for stage in strides]}
        return self.entry | {"arch_kwargs": kwargs}

    def with_input_channels(self, channels: int, stem: str | None) -> NetworkWeights:
        """Return the weights for another number of image channels; N = M changes nothing.

        With M channels in the file and N wanted, each of the N gets m, the mean kernel over the M.
        ``repeat``: m itself, as the authors of STU-Net do. N copies of an image give N / M times
        the old response; the norm behind conv1 takes that out again, the shortcut has none.
        ``mean``: m * M / N, as nnU-Net's loader of nnssl weights does. N copies of an image give
        exactly the old response.
        ``zeros``: the old channels keep their kernels, new ones start at zero.
        """
        import torch

        old, adapted, stem = self.input_channels, dict(self.tensors), stem or self.default_stem
        if stem == "zeros" and channels < old:
            raise PluginError(
                f"--stem zeros is for more image channels than the {old} of the weights, not for"
                f" {channels}. Take --stem mean or repeat."
            )
        factor = old / channels if stem == "mean" else 1.0
        for name in self.input_weights if old != channels else ():
            kernel, rest = adapted[name], [1] * DIMENSIONS
            if stem == "zeros":
                new = kernel.new_zeros((kernel.shape[0], channels - old, *kernel.shape[2:]))
                adapted[name] = torch.cat((kernel, new), dim=1)
            else:
                mean = kernel.mean(dim=1, keepdim=True) * factor
                adapted[name] = mean.repeat(1, channels, *rest)
        return replace(self, tensors=adapted)

    def check_plan(self, configuration: Mapping[str, Any]) -> None:
        """Raise unless the weights' trainer builds a network for a configuration of a plan."""
        if self.origin in UNETS:
            resolve_planned(configuration, self.trainer)
        else:
            resolve(configuration, self.preset, self.trainer)

    def training_argument(self, name: str, kind: type) -> Any:
        """Return an argument of the trainer that an nnU-Net v2 checkpoint keeps, as plain Python;
        None where it has none of this kind."""
        value = training_arguments(self.checkpoint).get(name)
        return plain_copy(value, f"{name} in the checkpoint") if isinstance(value, kind) else None

    def check_shapes(self) -> None:
        """Raise unless names and shapes are those of the network that the weights claim to be."""
        own = self.network.state_dict().items()
        expected = {x: tuple(y.shape) for x, y in own if self._expects(x)}
        check_shapes(self.tensors, expected, self.kind, f"widths {list(self.features)}")


def read_weights(
    path: Path,
    mode: int | None = None,
    any_mode: bool = False,
    checkpoint: Mapping[str, Any] | None = None,
) -> NetworkWeights:
    """Read the network in a checkpoint; refuse unknown ones, and weights that do not fit theirs.
    ``mode``: for a file that holds all; ``any_mode``: read that by mode 0, where any will do;
    ``checkpoint``: the file's content, if it is loaded already."""
    from stunet_plugin.weights.misfm import PRESETS, read_misfm
    from stunet_plugin.weights.stunet import read_stunet
    from stunet_plugin.weights.unet import read_unet

    checkpoint = load_checkpoint(path) if checkpoint is None else checkpoint
    origin, weights = _identify(checkpoint, path)
    if any_mode and origin is Origin.PCTNET:
        mode = 0
    try:
        if origin in PRESETS:
            found = read_misfm(origin, checkpoint, weights, mode)
        elif mode is not None:
            raise PluginError("it has no anisotropy modes. Leave --mode out.")
        else:
            read = read_unet if origin in UNETS else read_stunet
            found = read(origin, checkpoint, weights)
        found.check_shapes()
    except (PluginError, ValueError) as error:
        raise PluginError(f"{path} is refused as a {origin.value}: {error}") from error
    return found


def _identify(checkpoint: Mapping[str, Any], path: Path) -> tuple[Origin, dict[str, Any]]:
    """Return who wrote a checkpoint, and the weights without a wrapper's prefix (of data parallel
    training, torch.compile or Lightning)."""
    lightning = "pytorch-lightning_version" in checkpoint
    plan = nnssl.adaptation_plan(checkpoint) if nnssl.is_foreign(checkpoint) else None
    for origin, entry, name in _SIGNATURES:
        weights = checkpoint.get(_V1 if lightning else entry)
        if not isinstance(weights, dict):
            continue
        weights = plain_dict(weights)
        if plan and entry == _V2:
            weights = nnssl.rename(weights, plan)
        weights, prefix = strip_prefix(weights, name)
        if name in weights:
            if plan and origin in UNETS:
                origin = Origin.NNSSL
            if prefix:
                wrapper = " (Lightning checkpoint)" if lightning else ""
                print(f"Prefix:       {prefix!r} stripped from all names{wrapper}")
            return origin, weights
    if sam_weights(checkpoint):
        raise PluginError(
            f"{path} holds a SAM, which segments what it is shown: `stunet import` makes a model of"
            " it for `stunet prompt`. Here a network of an nnU-Net plan is needed."
        )
    found = f"its entries are {few(list(map(str, checkpoint)))}"
    if isinstance(trainer := checkpoint.get("trainer_name"), str):
        found += f", its trainer {trainer}"
    held = next((x for x in map(checkpoint.get, (_V2, _V1, _PYMIC)) if isinstance(x, dict)), {})
    if held:
        found += f", its tensors {few(list(map(str, plain_dict(held))), 2)}"
    raise PluginError(f"{path} is a torch file, but holds no network that is known here: {found}.")


def training_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the trainer that an nnU-Net v2 checkpoint keeps, untrusted; empty
    where there are none."""
    arguments = checkpoint.get("init_args")
    return plain_dict(arguments) if isinstance(arguments, dict) else {}


def is_decoder(name: str) -> bool:
    """Return whether a tensor is of a decoder, without its heads, and without the encoder that the
    decoder of nnU-Net's networks holds."""
    return name.startswith("decoder.") and not name.startswith(
        ("decoder.encoder.", "decoder.seg_layers.")
    )
