"""Which network a checkpoint holds, read off its keys and shapes alone.

Sizes, channels and outputs come from the weights, so a file's name and its metadata cannot disagree
with them. The tensors are checked against the network that they claim to be before anything is made
of them. What is particular to a network stands in ``found_stunet.py`` and ``found_misfm.py``.
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
from stunet_plugin.weights.safe_loading import plain_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

DIMENSIONS = 3
"""All published weights are of networks in 3D; so are those that are read here."""


class Origin(Enum):
    """Who wrote a checkpoint, and of which network."""

    V1 = "nnU-Net v1 checkpoint of the published STU-Net"
    V2_PORT = "checkpoint of the published STU-Net port to nnU-Net v2"
    OWN = "nnU-Net v2 checkpoint of this plugin's STU-Net"
    PCTNET = "PyMIC checkpoint of PCT-Net"
    FMUNET = "PyMIC checkpoint of FMUNet"
    OWN_PCTNET = "nnU-Net v2 checkpoint of this plugin's PCT-Net"
    OWN_FMUNET = "nnU-Net v2 checkpoint of this plugin's FMUNet"


# Where each kind keeps its weights, and names that only this network has.
_SIGNATURES: tuple[tuple[Origin, str, tuple[str, ...]], ...] = (
    (Origin.V1, "state_dict", ("conv_blocks_context.0.0.conv1.weight",)),
    (Origin.V2_PORT, "network_weights", ("conv_blocks_context.0.0.conv1.weight",)),
    (
        Origin.OWN,
        "network_weights",
        ("encoder.stages.0.0.conv1.weight", "encoder.stages.0.0.shortcut.weight"),
    ),
    (Origin.PCTNET, "model_state_dict", ("embeddings.0.proj.weight",)),
    (
        Origin.FMUNET,
        "model_state_dict",
        ("project.weight", "encoder.en_conv0.conv_list.0.0.weight"),
    ),
    (
        Origin.OWN_PCTNET,
        "network_weights",
        ("encoder.stages.2.2.transformer.blocks.0.attention.qkv.weight",),
    ),
    (
        Origin.OWN_FMUNET,
        "network_weights",
        ("encoder.stages.0.1.units.0.conv.weight", "decoder.bottom.units.0.conv.weight"),
    ),
)
_WEIGHT_TYPES = ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")
COUNTER = ".num_batches_tracked"
"""How the names of the batches that a batch norm has seen end; whole numbers, unlike all other
tensors."""


@dataclass(frozen=True)
class FoundWeights(ABC):
    """The weights of a network under this plugin's names.

    Attributes:
        origin: who wrote them.
        tensors: name to tensor; those of a zip-format file are still mapped to it.
        input_channels, outputs: of the first convolution and of the segmentation heads.
    """

    origin: Origin
    tensors: dict[str, Tensor]
    input_channels: int
    outputs: int

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    @abstractmethod
    def trainer(self) -> str:
        """The trainer that builds this network."""

    @property
    @abstractmethod
    def plans_like(self) -> str:
        """Name of plans that `stunet plan-like` makes for it."""

    @property
    @abstractmethod
    def published_size(self) -> bool:
        """The trainer builds these widths and depths from any plan."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Network, size, channels and outputs, for people."""

    @property
    @abstractmethod
    def stem_weights(self) -> tuple[str, ...]:
        """The tensors whose shape depends on the image channels: (width, channels, *kernel)."""

    @property
    @abstractmethod
    def default_stem(self) -> str:
        """How the stem is fitted to other image channels if the user does not say."""

    @property
    @abstractmethod
    def stages(self) -> int:
        """Resolution stages."""

    @property
    def poolings(self) -> Strides | None:
        """The strides after the first stage where the network dictates them; None where the plan
        does."""
        return None

    @abstractmethod
    def architecture(self, strides: Strides) -> dict[str, Any]:
        """Return the ``architecture`` entry of a plans file for this network with the strides of a
        plan."""

    @abstractmethod
    def check_plan(self, configuration: Mapping[str, Any]) -> None:
        """Raise a PluginError unless the trainer takes this configuration of a plan."""


def find_origin(checkpoint: Mapping[str, Any], path: Path) -> tuple[Origin, dict[str, Any]]:
    """Return who wrote a checkpoint and the dict that holds the weights.

    Raises:
        PluginError: none of the networks that are known.
    """
    for origin, entry, names in _SIGNATURES:
        weights = checkpoint.get(entry)
        if isinstance(weights, dict):
            weights = plain_dict(weights)
            if all(name in weights for name in names):
                return origin, weights
    raise PluginError(
        f"{path} is a torch file, but holds no network that is known here:"
        f" {_describe_unknown(checkpoint)}."
    )


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
            f" values (for example {broken[0]}). The file is damaged, or the training that wrote it"
            " had diverged: take another copy or an earlier checkpoint."
        )


def plain_tensor(name: str, value: Any) -> Tensor:
    """Return the bare tensor, without what a file may have attached to it."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise PluginError(f"{name} is a {type(value).__name__}, not a tensor.")
    tensor = torch.Tensor.detach(value)
    allowed = ("torch.int64",) if name.endswith(COUNTER) else _WEIGHT_TYPES
    if (
        tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or str(tensor.dtype) not in allowed
    ):
        raise PluginError(
            f"{name} is no plain tensor of floating-point numbers ({tensor.dtype}, {tensor.layout},"
            f" {tensor.device})."
        )
    # A tensor can repeat one value through strides of zero: a small file that would be written as a
    # huge one.
    if (
        tensor.numel() == 0
        or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):
        raise PluginError(
            f"{name} claims {tensor.numel()} values, but the file holds another number of them."
        )
    return tensor


def check_tensors(tensors: Mapping[str, Tensor], network: nn.Module, who: str, size: str) -> None:
    """Hold names and shapes against a network, which may be on the meta device.

    Args:
        tensors: under its names.
        network: of the sizes that were read off them.
        who: with its article, for messages.
        size: those sizes, for messages.

    Raises:
        PluginError: missing, unknown or misshapen tensors.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    wrong = [
        name
        for name in expected
        if name in tensors and tuple(tensors[name].shape) != expected[name]
    ]
    if missing:
        raise PluginError(
            f"{len(missing)} of {len(expected)} tensors are missing (for example {missing[0]})."
        )
    if extra:
        raise PluginError(f"{len(extra)} tensors are no part of {who} (for example {extra[0]}).")
    if wrong:
        name = wrong[0]
        raise PluginError(
            f"{len(wrong)} of {len(expected)} tensors have the wrong shape for {size} (for example"
            f" {name}: {tuple(tensors[name].shape)}, expected {expected[name]})."
        )


def _describe_unknown(checkpoint: Mapping[str, Any]) -> str:
    for entry, writer in (
        ("network_weights", "nnU-Net v2"),
        ("state_dict", "nnU-Net v1"),
        ("model_state_dict", "PyMIC"),
    ):
        weights = checkpoint.get(entry)
        if isinstance(weights, dict):
            names = [str(name) for name in list(plain_dict(weights))[:2]]
            trainer = checkpoint.get("trainer_name")
            by = f" of the trainer {trainer}" if isinstance(trainer, str) else ""
            return (
                f"a {writer} checkpoint{by} with {len(weights)} tensors such as"
                f" {', '.join(names) or 'none'}"
            )
    return f"its entries are {', '.join(str(name) for name in list(checkpoint)[:8]) or 'none'}"
