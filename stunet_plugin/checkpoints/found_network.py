"""Which network a checkpoint holds, read off its keys and shapes alone.

Sizes, channels and outputs come from the weights, so a file's name and its metadata cannot disagree with them. The tensors
are checked against the network that they claim to be before anything is made of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.checkpoints.safe_loading import plain_dict
from stunet_plugin.checkpoints.stunet_keys import translate_state_dict
from stunet_plugin.errors import PluginError
from stunet_plugin.plan_architecture import STUNET_CLASS
from stunet_plugin.presets import STUNetPreset, find_preset

if TYPE_CHECKING:
    from torch import Tensor

DIMENSIONS = 3
"""All published weights are of networks in 3D with kernel size 3; so are those that are read here."""
KERNEL_SIZE = 3


class Origin(Enum):
    """Who wrote a checkpoint, and of which network."""

    V1 = "nnU-Net v1 checkpoint of the published STU-Net"
    V2_PORT = "checkpoint of the published STU-Net port to nnU-Net v2"
    OWN = "nnU-Net v2 checkpoint of this plugin's STU-Net"
    PCTNET = "PyMIC checkpoint of PCT-Net"
    FMUNET = "PyMIC checkpoint of FMUNet"


_STUNET_ORIGINS = (Origin.V1, Origin.V2_PORT, Origin.OWN)
# Where each kind keeps its weights, and names that only this network has.
_SIGNATURES: tuple[tuple[Origin, str, tuple[str, ...]], ...] = (
    (Origin.V1, "state_dict", ("conv_blocks_context.0.0.conv1.weight",)),
    (Origin.V2_PORT, "network_weights", ("conv_blocks_context.0.0.conv1.weight",)),
    (Origin.OWN, "network_weights", ("encoder.stages.0.0.conv1.weight", "encoder.stages.0.0.shortcut.weight")),
    (Origin.PCTNET, "model_state_dict", ("embeddings.0.proj.weight",)),
    (Origin.FMUNET, "model_state_dict", ("project.weight", "encoder.en_conv0.conv_list.0.0.weight")),
)
_WEIGHT_TYPES = ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")
_HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.weight")
_BLOCK = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.(\d+)\.conv1\.weight")


@dataclass(frozen=True)
class STUNetWeights:
    """The weights of an STU-Net under this plugin's names.

    Attributes:
        origin: who wrote them.
        tensors: name to tensor; those of a zip-format file are still mapped to it.
        features: channels per stage, full resolution first.
        blocks: residual blocks per encoder stage.
        decoder_blocks: per decoder stage, deepest first.
        input_channels, outputs: of the first convolution and of the segmentation heads.
    """

    origin: Origin
    tensors: dict[str, Tensor]
    features: tuple[int, ...]
    blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    input_channels: int
    outputs: int

    @property
    def preset(self) -> STUNetPreset | None:
        """The size that these widths and depths are, None if they are none."""
        preset = find_preset(self.features, self.blocks)
        return preset if preset and self.decoder_blocks == preset.blocks_per_stage[:-1] else None

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def architecture(self, strides: Iterable[Iterable[int]]) -> dict[str, Any]:
        """Return the ``architecture`` entry of a plans file for this network with the strides of a plan."""
        stages = len(self.features)
        return {
            "network_class_name": STUNET_CLASS,
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": list(self.features),
                "conv_op": f"torch.nn.modules.conv.Conv{DIMENSIONS}d",
                "kernel_sizes": [[KERNEL_SIZE] * DIMENSIONS for _ in range(stages)],
                "strides": [list(stage) for stage in strides],
                "n_blocks_per_stage": list(self.blocks),
                "n_blocks_per_stage_decoder": list(self.decoder_blocks),
            },
            "_kw_requires_import": ["conv_op"],
        }


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
    raise PluginError(f"{path} is a torch file, but holds no network that is known here: {_describe_unknown(checkpoint)}.")


def read_stunet(checkpoint: Mapping[str, Any], path: Path) -> STUNetWeights:
    """Read the STU-Net out of a checkpoint.

    Raises:
        PluginError: another network; missing, unknown or misshapen tensors.
    """
    origin, weights = find_origin(checkpoint, path)
    if origin not in _STUNET_ORIGINS:
        raise PluginError(
            f"{path} is a {origin.value} ({len(weights)} tensors). This command takes STU-Net: checkpoints of nnU-Net v1 (.model), "
            f"of the published v2 port and of this plugin (.pth)."
        )
    try:
        translated = weights if origin is Origin.OWN else translate_state_dict(weights)
        found = _measure(origin, {str(name): _plain_tensor(str(name), value) for name, value in translated.items()})
        _check_shapes(found)
    except PluginError as error:
        raise PluginError(f"{path} is refused as a {origin.value}: {error}") from error
    return found


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless every weight is a finite number; takes no memory beside the tensors."""
    import torch

    broken = [name for name, tensor in tensors.items() if not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))]
    if broken:
        raise PluginError(
            f"{path} is refused: {len(broken)} of {len(tensors)} tensors hold NaN or infinite values (for example {broken[0]}). "
            f"The file is damaged, or the training that wrote it had diverged: take another copy or an earlier checkpoint."
        )


def _plain_tensor(name: str, value: Any) -> Tensor:
    """Return the bare tensor, without what a file may have attached to it."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise PluginError(f"{name} is a {type(value).__name__}, not a tensor.")
    tensor = torch.Tensor.detach(value)
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or str(tensor.dtype) not in _WEIGHT_TYPES:
        raise PluginError(
            f"{name} is no plain tensor of floating-point numbers ({tensor.dtype}, {tensor.layout}, {tensor.device})."
        )
    # A tensor can repeat one value through strides of zero: a small file that would be written as a huge one.
    if tensor.numel() == 0 or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise PluginError(f"{name} claims {tensor.numel()} values, but the file holds another number of them.")
    return tensor


def _measure(origin: Origin, tensors: dict[str, Tensor]) -> STUNetWeights:
    """Read sizes off names and shapes."""
    blocks: dict[tuple[str, int], set[int]] = {}
    for part, stage, block in (match.groups() for match in map(_BLOCK.fullmatch, tensors) if match):
        blocks.setdefault((part, int(stage)), set()).add(int(block))
    stages = sum(part == "encoder" for part, _ in blocks)
    expected = [("encoder", stage) for stage in range(stages)] + [("decoder", stage) for stage in range(stages - 1)]
    if stages < 2 or sorted(blocks) != sorted(expected) or any(found != set(range(len(found))) for found in blocks.values()):
        raise PluginError(
            f"its stages are not those of an STU-Net ({stages} in the encoder, {len(blocks) - stages} in the decoder)."
        )
    heads = {int(match.group(1)) for match in map(_HEAD.fullmatch, tensors) if match}
    if heads != set(range(stages - 1)):
        raise PluginError(f"it has {len(heads)} segmentation heads; an STU-Net of {stages} stages has {stages - 1}.")
    firsts = [f"{part}.stages.{stage}.0.conv1.weight" for part, stage in expected]
    for name in (*firsts, f"decoder.seg_layers.{stages - 2}.weight"):
        if tensors[name].ndim != DIMENSIONS + 2:
            raise PluginError(f"{name} has the shape {tuple(tensors[name].shape)}; expected a convolution with {DIMENSIONS} axes.")
    return STUNetWeights(
        origin,
        tensors,
        features=tuple(int(tensors[name].shape[0]) for name in firsts[:stages]),
        blocks=tuple(len(blocks["encoder", stage]) for stage in range(stages)),
        decoder_blocks=tuple(len(blocks["decoder", stage]) for stage in range(stages - 1)),
        input_channels=int(tensors[firsts[0]].shape[1]),
        outputs=int(tensors[f"decoder.seg_layers.{stages - 2}.weight"].shape[0]),
    )


def _check_shapes(found: STUNetWeights) -> None:
    """Hold names and shapes against the network of these sizes, built without memory."""
    import torch

    from stunet_plugin.networks.stunet import STUNet

    no_strides = [[1] * DIMENSIONS for _ in found.features]
    arguments = found.architecture(no_strides)["arch_kwargs"] | {"conv_op": torch.nn.Conv3d}
    with torch.device("meta"):
        network = STUNet(found.input_channels, found.outputs, **arguments)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [name for name in expected if name not in found.tensors]
    extra = [name for name in found.tensors if name not in expected]
    wrong = [name for name in expected if name in found.tensors and tuple(found.tensors[name].shape) != expected[name]]
    if missing:
        raise PluginError(f"{len(missing)} of {len(expected)} tensors are missing (for example {missing[0]}).")
    if extra:
        raise PluginError(f"{len(extra)} tensors are no part of an STU-Net (for example {extra[0]}).")
    if wrong:
        name = wrong[0]
        raise PluginError(
            f"{len(wrong)} of {len(expected)} tensors have the wrong shape for widths {list(found.features)} (for example {name}: "
            f"{tuple(found.tensors[name].shape)}, expected {expected[name]})."
        )


def _describe_unknown(checkpoint: Mapping[str, Any]) -> str:
    for entry, writer in (("network_weights", "nnU-Net v2"), ("state_dict", "nnU-Net v1"), ("model_state_dict", "PyMIC")):
        weights = checkpoint.get(entry)
        if isinstance(weights, dict):
            names = [str(name) for name in list(plain_dict(weights))[:2]]
            trainer = checkpoint.get("trainer_name")
            by = f" of the trainer {trainer}" if isinstance(trainer, str) else ""
            return f"a {writer} checkpoint{by} with {len(weights)} tensors such as {', '.join(names) or 'none'}"
    return f"its entries are {', '.join(str(name) for name in list(checkpoint)[:8]) or 'none'}"
