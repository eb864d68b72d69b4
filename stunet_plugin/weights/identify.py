"""Identification of the network in a checkpoint, from its keys and shapes alone.

Sizes, channels and outputs come from the weights, so a file's name and its metadata cannot disagree
with them. The tensors are checked against the network that they claim to be. What is particular to
a network is in ``stunet.py`` and ``misfm.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.topology import Strides
from stunet_plugin.weights.safe_loading import plain_copy, plain_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

DIMENSIONS = 3
"""All weights that are read here are of networks in 3D."""

COUNTER = ".num_batches_tracked"
"""End of the names of the batches that a batch norm has seen; integers, unlike other tensors."""

HEADS = ".seg_layers."
"""Part of the names of the segmentation heads."""

_WEIGHT_TYPES = ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")


class Origin(Enum):
    """Who wrote a checkpoint, and of which network."""

    V1 = "nnU-Net v1 checkpoint of the published STU-Net"
    V2_PORT = "checkpoint of the published STU-Net port to nnU-Net v2"
    OWN = "nnU-Net v2 checkpoint of this plugin's STU-Net"
    PCTNET = "PyMIC checkpoint of PCT-Net"
    FMUNET = "PyMIC checkpoint of FMUNet"
    OWN_PCTNET = "nnU-Net v2 checkpoint of this plugin's PCT-Net"
    OWN_FMUNET = "nnU-Net v2 checkpoint of this plugin's FMUNet"


_V1, _V2, _PYMIC = "state_dict", "network_weights", "model_state_dict"
_WRITERS = {_V2: "nnU-Net v2", _V1: "nnU-Net v1", _PYMIC: "PyMIC"}
"""Entries that hold the weights, and who names them so."""

_PUBLISHED_STEM = "conv_blocks_context.0.0.conv1.weight"
_SIGNATURES: tuple[tuple[Origin, str, tuple[str, ...]], ...] = (
    (Origin.V1, _V1, (_PUBLISHED_STEM,)),
    (Origin.V2_PORT, _V2, (_PUBLISHED_STEM,)),
    (Origin.PCTNET, _PYMIC, ("embeddings.0.proj.weight",)),
    (Origin.FMUNET, _PYMIC, ("project.weight", "encoder.en_conv0.conv_list.0.0.weight")),
    (Origin.OWN, _V2, ("encoder.stages.0.0.conv1.weight", "encoder.stages.0.0.shortcut.weight")),
    (Origin.OWN_PCTNET, _V2, ("encoder.stages.2.2.transformer.blocks.0.attention.qkv.weight",)),
    (
        Origin.OWN_FMUNET,
        _V2,
        ("encoder.stages.0.1.units.0.conv.weight", "decoder.bottom.units.0.conv.weight"),
    ),
)
"""Where each origin keeps its weights, and names that only this network has."""


@dataclass(frozen=True)
class NetworkWeights(ABC):
    """Weights of a network under this plugin's names.

    Attributes:
        origin: who wrote them.
        checkpoint: all that the file holds, untrusted.
        tensors: name to tensor; those of a zip-format file are still mapped to it.
        input_channels, outputs: of the first convolution and of the segmentation heads; 0 outputs
            where the heads were left out, as an import of pretrained weights does.
        features: channels per stage, full resolution first.
    """

    origin: Origin
    checkpoint: Mapping[str, Any]
    tensors: dict[str, Tensor]
    input_channels: int
    outputs: int
    features: tuple[int, ...]

    def build(self) -> nn.Module:
        """Return the network of these sizes on the meta device, by nnU-Net's own function."""
        import torch
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        entry = self.architecture(((1,) * DIMENSIONS,) * self.stages)
        with torch.device("meta"):
            network: nn.Module = get_network_from_plans(
                entry["network_class_name"],
                entry["arch_kwargs"],
                entry["_kw_requires_import"],
                self.input_channels,
                self.outputs or 1,
                allow_init=False,
            )
        return network

    @property
    def parameters(self) -> int:
        """Number of parameters, without heads where they were left out."""
        return sum(
            parameter.numel()
            for name, parameter in self.build().named_parameters()
            if self.outputs or HEADS not in name
        )

    @property
    @abstractmethod
    def network_name(self) -> str:
        """Network with its article, for messages."""

    @property
    @abstractmethod
    def trainer(self) -> str:
        """Trainer that builds this network."""

    @property
    @abstractmethod
    def plans_like(self) -> str:
        """Name of the plans that `stunet plan-like` makes for it."""

    @property
    @abstractmethod
    def published_size(self) -> bool:
        """Whether the trainer builds these widths and depths from any plan."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Network, size, channels and outputs, for people."""

    @property
    @abstractmethod
    def input_weights(self) -> tuple[str, ...]:
        """Names of the tensors (width, channels, *kernel) that read the image channels."""

    @property
    @abstractmethod
    def default_stem(self) -> str:
        """How they are adapted to other image channels if the user does not say."""

    @property
    @abstractmethod
    def stages(self) -> int:
        """Resolution stages."""

    @property
    def poolings(self) -> Strides | None:
        """Strides after the first stage if the network dictates them; None if the plan does."""
        return None

    @abstractmethod
    def architecture(self, strides: Strides) -> dict[str, Any]:
        """Return the ``architecture`` entry of a plan with these strides."""

    @abstractmethod
    def check_plan(self, configuration: Mapping[str, Any]) -> None:
        """Raise a PluginError unless the trainer takes this configuration of a plan."""

    def training_argument(self, name: str, kind: type) -> Any:
        """Return what an nnU-Net v2 checkpoint keeps of its trainer's arguments (``plans``,
        ``dataset_json``, ``configuration``) as plain Python, None where it has none of this kind.
        """
        arguments = self.checkpoint.get("init_args")
        value = plain_dict(arguments).get(name) if isinstance(arguments, dict) else None
        return plain_copy(value, f"{name} in the checkpoint") if isinstance(value, kind) else None


def identify(checkpoint: Mapping[str, Any], path: Path) -> tuple[Origin, dict[str, Any]]:
    """Return who wrote a checkpoint and the dict that holds the weights.

    Prefixes that wrappers put in front of every name (``module.`` of data parallel training,
    ``_orig_mod.`` of torch.compile, the attribute of a Lightning module) are stripped and said.

    Raises:
        PluginError: none of the networks that are known.
    """
    lightning = "pytorch-lightning_version" in checkpoint
    for origin, entry, names in _SIGNATURES:
        weights = checkpoint.get(_V1 if lightning else entry)
        if not isinstance(weights, dict):
            continue
        weights, prefix = strip_prefix(plain_dict(weights), names)
        if all(name in weights for name in names):
            if prefix:
                wrapper = " (Lightning checkpoint)" if lightning else ""
                print(f"Prefix:       {prefix!r} stripped from all names{wrapper}")
            return origin, weights
    raise PluginError(
        f"{path} is a torch file, but holds no network that is known here:"
        f" {_describe_unknown(checkpoint)}."
    )


def strip_prefix(
    weights: Mapping[Any, Any], expected: tuple[str, ...]
) -> tuple[dict[Any, Any], str]:
    """Return weights without the prefix that all their names share before an expected name, and
    the prefix, empty if there is none.

    Args:
        weights: name to tensor.
        expected: names of which one is looked for.
    """
    for wanted in expected:
        for name in weights:
            if isinstance(name, str) and name.endswith(f".{wanted}"):
                prefix = name.removesuffix(wanted)
                if all(isinstance(one, str) and one.startswith(prefix) for one in weights):
                    stripped = {one.removeprefix(prefix): value for one, value in weights.items()}
                    return stripped, prefix
    return dict(weights), ""


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless every weight is a finite number; takes no memory beside the tensors."""
    import torch

    broken = [
        name
        for name, tensor in tensors.items()
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))
    ]
    if broken:
        raise PluginError(
            f"{path} is refused: {len(broken)} of {len(tensors)} tensors hold NaN or infinite"
            f" values (for example {broken[0]}). The file is damaged, or its training had diverged:"
            " take another copy or an earlier checkpoint."
        )


def plain_tensor(name: object, value: Any) -> Tensor:
    """Return the bare tensor, without what a file may have attached to it."""
    import torch

    if not isinstance(name, str):
        raise PluginError(f"{name!r} is no name of a tensor, which is text.")
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise PluginError(f"{name} is a {type(value).__name__}, not a tensor.")
    tensor = torch.Tensor.detach(value)
    allowed = ("torch.int64",) if name.endswith(COUNTER) else _WEIGHT_TYPES
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or str(tensor.dtype) not in allowed:
        raise PluginError(
            f"{name} is no plain tensor of floating-point numbers ({tensor.dtype}, {tensor.layout},"
            f" {tensor.device})."
        )
    # Strides of zero repeat one value: a small file would be written as a huge one.
    size = tensor.numel() * tensor.element_size()
    if size == 0 or size > tensor.untyped_storage().nbytes():
        raise PluginError(
            f"{name} claims {tensor.numel()} values, but the file holds another number of them."
        )
    return tensor


def check_tensors(weights: NetworkWeights) -> None:
    """Compare names and shapes with the network that the weights claim to be.

    Raises:
        PluginError: missing, unknown or misshapen tensors.
    """
    tensors, network = weights.tensors, weights.build()
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if weights.outputs or HEADS not in name
    }
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing:
        raise PluginError(
            f"{len(missing)} of {len(expected)} tensors are missing (for example {missing[0]})."
        )
    if extra:
        raise PluginError(
            f"{len(extra)} tensors are no part of {weights.network_name} (for example {extra[0]})."
        )
    wrong = [name for name, shape in expected.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise PluginError(
            f"{len(wrong)} of {len(expected)} tensors have the wrong shape for widths"
            f" {list(weights.features)} (for example {name}: {tuple(tensors[name].shape)}, expected"
            f" {expected[name]})."
        )


def check_convolutions(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Raise unless these tensors are weights of convolutions in 3D."""
    for name in names:
        if tensors[name].ndim != DIMENSIONS + 2:
            raise PluginError(
                f"{name} has the shape {tuple(tensors[name].shape)}; expected a convolution with"
                f" {DIMENSIONS} axes."
            )


def _describe_unknown(checkpoint: Mapping[str, Any]) -> str:
    for entry, writer in _WRITERS.items():
        weights = checkpoint.get(entry)
        if isinstance(weights, dict):
            if "pytorch-lightning_version" in checkpoint:
                writer = "Lightning"
            names = [str(name) for name in list(plain_dict(weights))[:2]]
            trainer = checkpoint.get("trainer_name")
            by = f" of the trainer {trainer}" if isinstance(trainer, str) else ""
            return (
                f"a {writer} checkpoint{by} with {len(weights)} tensors such as"
                f" {', '.join(names) or 'none'}"
            )
    return f"its entries are {', '.join(str(name) for name in list(checkpoint)[:8]) or 'none'}"
