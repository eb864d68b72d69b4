"""STU-Net weights: read from checkpoints of any origin, published names translated.

Published names (nnU-Net v1 checkpoints and the published v2 port alike; i encoder stage, u decoder
step from the deepest, j block): ``conv_blocks_context.i.j.{conv1,norm1,conv2,norm2,conv3}`` with
conv3 the shortcut, ``upsample_layers.u.conv``, ``conv_blocks_localization.u.j.{...}``,
``seg_outputs.u`` (the last is full resolution).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import STUNET_CLASS, resolve
from stunet_plugin.networks.presets import STUNetPreset, find_preset
from stunet_plugin.networks.topology import Strides
from stunet_plugin.weights.identify import (
    DIMENSIONS,
    NetworkWeights,
    Origin,
    check_convolutions,
    check_tensors,
    plain_tensor,
)
from stunet_plugin.weights.input_channels import REPEAT

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

_RULES = (
    (
        re.compile(r"conv_blocks_context\.(\d+)\.(\d+)\.(conv1|norm1|conv2|norm2|conv3)\.(\w+)"),
        r"encoder.stages.\1.\2.\3.\4",
    ),
    (re.compile(r"upsample_layers\.(\d+)\.conv\.(\w+)"), r"decoder.upsample_convs.\1.\2"),
    (
        re.compile(
            r"conv_blocks_localization\.(\d+)\.(\d+)\.(conv1|norm1|conv2|norm2|conv3)\.(\w+)"
        ),
        r"decoder.stages.\1.\2.\3.\4",
    ),
    (re.compile(r"seg_outputs\.(\d+)\.(\w+)"), r"decoder.seg_layers.\1.\2"),
)


KERNEL_SIZE = 3

_HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.weight")
_BLOCK = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.(\d+)\.conv1\.weight")


@dataclass(frozen=True)
class STUNetWeights(NetworkWeights):
    """The weights of an STU-Net under this plugin's names.

    Attributes:
        blocks: residual blocks per encoder stage.
        decoder_blocks: per decoder stage, deepest first.
    """

    blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]

    @property
    def preset(self) -> STUNetPreset | None:
        """The size that these widths and depths are, None if they are none."""
        preset = find_preset(self.features, self.blocks)
        return preset if preset and self.decoder_blocks == preset.blocks_per_stage[:-1] else None

    @property
    def published_size(self) -> bool:
        return self.preset is not None

    @property
    def network_name(self) -> str:
        return "an STU-Net"

    @property
    def trainer(self) -> str:
        """The size's trainer, or the one that follows the plan."""
        return f"STUNetTrainer_{self.preset.name}" if self.preset else "STUNetTrainer"

    @property
    def plans_like(self) -> str:
        return f"STUNetPlans_like_{self.preset.name if self.preset else 'model'}"

    @property
    def description(self) -> str:
        size = f"STU-Net {self.preset.name}" if self.preset else "an STU-Net of no published size"
        return (
            f"{size} (widths {list(self.features)}, blocks {list(self.blocks)}),"
            f" {self.parameters:,} parameters, {self.input_channels} input channel(s),"
            f" {self.outputs} outputs"
        )

    @property
    def input_weights(self) -> tuple[str, ...]:
        return ("encoder.stages.0.0.conv1.weight", "encoder.stages.0.0.shortcut.weight")

    @property
    def default_stem(self) -> str:
        return REPEAT  # as the authors do

    @property
    def stages(self) -> int:
        return len(self.features)

    def architecture(self, strides: Strides) -> dict[str, Any]:
        return {
            "network_class_name": STUNET_CLASS,
            "arch_kwargs": {
                "n_stages": self.stages,
                "features_per_stage": list(self.features),
                "conv_op": f"torch.nn.modules.conv.Conv{DIMENSIONS}d",
                "kernel_sizes": [[KERNEL_SIZE] * DIMENSIONS for _ in range(self.stages)],
                "strides": [list(stage) for stage in strides],
                "n_blocks_per_stage": list(self.blocks),
                "n_blocks_per_stage_decoder": list(self.decoder_blocks),
            },
            "_kw_requires_import": ["conv_op"],
        }

    def check_plan(self, configuration: Mapping[str, Any]) -> None:
        resolve(configuration, self.preset, self.trainer)


def read_stunet(
    origin: Origin, checkpoint: Mapping[str, Any], weights: dict[str, Any], path: Path
) -> STUNetWeights:
    """Read an STU-Net.

    Args:
        origin, weights: as identified in the checkpoint.
        checkpoint, path: as loaded, and its file.

    Raises:
        PluginError: missing, unknown or misshapen tensors.
    """
    try:
        translated = weights if origin is Origin.OWN else translate_state_dict(weights)
        tensors = {name: plain_tensor(name, value) for name, value in translated.items()}
        found = _measure(origin, checkpoint, tensors)
        check_tensors(found)
    except PluginError as error:
        raise PluginError(f"{path} is refused as a {origin.value}: {error}") from error
    return found


def _measure(
    origin: Origin, checkpoint: Mapping[str, Any], tensors: dict[str, Tensor]
) -> STUNetWeights:
    """Read sizes off names and shapes."""
    blocks: dict[tuple[str, int], set[int]] = {}
    for part, stage, block in (match.groups() for match in map(_BLOCK.fullmatch, tensors) if match):
        blocks.setdefault((part, int(stage)), set()).add(int(block))
    stages = sum(part == "encoder" for part, _ in blocks)
    expected = [("encoder", stage) for stage in range(stages)] + [
        ("decoder", stage) for stage in range(stages - 1)
    ]
    if (
        stages < 2
        or sorted(blocks) != sorted(expected)
        or any(found != set(range(len(found))) for found in blocks.values())
    ):
        raise PluginError(
            f"its stages are not those of an STU-Net ({stages} in the encoder,"
            f" {len(blocks) - stages} in the decoder)."
        )
    heads = {int(match.group(1)) for match in map(_HEAD.fullmatch, tensors) if match}
    if heads != set(range(stages - 1)):
        raise PluginError(
            f"it has {len(heads)} segmentation heads; an STU-Net of {stages} stages has"
            f" {stages - 1}."
        )
    firsts = [f"{part}.stages.{stage}.0.conv1.weight" for part, stage in expected]
    last_head = f"decoder.seg_layers.{stages - 2}.weight"
    check_convolutions(tensors, (*firsts, last_head))
    return STUNetWeights(
        origin,
        checkpoint,
        tensors,
        input_channels=int(tensors[firsts[0]].shape[1]),
        outputs=int(tensors[last_head].shape[0]),
        features=tuple(int(tensors[name].shape[0]) for name in firsts[:stages]),
        blocks=tuple(len(blocks["encoder", stage]) for stage in range(stages)),
        decoder_blocks=tuple(len(blocks["decoder", stage]) for stage in range(stages - 1)),
    )


def translate_key(key: str) -> str:
    """Return our name of a published parameter.

    Raises:
        PluginError: the name is not one of the published STU-Net's.
    """
    for pattern, replacement in _RULES:
        if isinstance(key, str) and pattern.fullmatch(key):
            return pattern.sub(replacement, key).replace(".conv3.", ".shortcut.")
    raise PluginError(
        f"{key!r} is not a parameter of the published STU-Net (expected conv_blocks_context,"
        " upsample_layers, conv_blocks_localization or seg_outputs). Is this the checkpoint of"
        " another network?"
    )


def translate_state_dict(published: Mapping[str, Value]) -> dict[str, Value]:
    """Return the same tensors under our names; nothing is copied.

    Raises:
        PluginError: a name is unknown, or two names lead to the same parameter.
    """
    translated = {translate_key(key): value for key, value in published.items()}
    if len(translated) != len(published):
        raise PluginError("The checkpoint names the same parameter twice.")
    return translated
