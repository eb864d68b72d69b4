"""STU-Net weights: read from checkpoints of any origin, published names (those of nnU-Net v1 and of
the published v2 port) translated."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import architecture_entry
from stunet_plugin.networks.presets import find_preset
from stunet_plugin.weights import identify
from stunet_plugin.weights.tensors import DIMENSIONS, check_convolutions, plain_tensors

_BLOCK = r"\.(\d+)\.(\d+)\.(conv1|norm1|conv2|norm2|conv3)\.(\w+)"
_RULES = {
    rf"conv_blocks_context{_BLOCK}": r"encoder.stages.\1.\2.\3.\4",
    r"upsample_layers\.(\d+)\.conv\.(\w+)": r"decoder.upsample_convs.\1.\2",
    rf"conv_blocks_localization{_BLOCK}": r"decoder.stages.\1.\2.\3.\4",
    r"seg_outputs\.(\d+)\.(\w+)": r"decoder.seg_layers.\1.\2",
}


def read_stunet(
    origin: identify.Origin, checkpoint: Mapping[str, Any], weights: dict[str, Any]
) -> identify.NetworkWeights:
    """Read sizes off names and shapes of weights that were identified in a checkpoint."""
    translated = weights if origin is identify.Origin.OWN else translate_state_dict(weights)
    tensors = plain_tensors(translated)
    blocks, decoder_blocks = _depths("encoder", tensors), _depths("decoder", tensors)
    stages, steps = len(blocks), len(decoder_blocks)
    heads = sum(x.startswith("decoder.seg_layers.") and x.endswith(".weight") for x in tensors)
    if stages < 2 or steps != stages - 1 or heads != steps:
        raise PluginError(
            f"its {stages} encoder stages, {steps} decoder stages and {heads} segmentation heads"
            " are not those of an STU-Net, which has one fewer of the latter two."
        )
    firsts = tuple(f"encoder.stages.{i}.0.conv1.weight" for i in range(stages))
    last_head = f"decoder.seg_layers.{stages - 2}.weight"
    check_convolutions(tensors, (*firsts, last_head))
    features = tuple(int(tensors[name].shape[0]) for name in firsts)
    preset = find_preset(features, blocks) if decoder_blocks == blocks[:-1] else None
    name = f"STU-Net {preset.name}" if preset else "an STU-Net of no published size"
    return identify.NetworkWeights(
        origin=origin,
        checkpoint=checkpoint,
        tensors=tensors,
        title=f"{name} (widths {list(features)}, blocks {list(blocks)})",
        preset=preset,
        published_size=preset is not None,
        mode=None,
        trainer=f"STUNetTrainer_{preset.name}" if preset else "STUNetTrainer",
        plans_like=f"STUNetPlans_like_{preset.name if preset else 'model'}",
        features=features,
        input_weights=(firsts[0], "encoder.stages.0.0.shortcut.weight"),
        default_stem="repeat",  # as the authors do
        outputs=int(tensors[last_head].shape[0]),
        entry=architecture_entry(features, blocks, decoder_blocks, ((1,) * DIMENSIONS,) * stages),
    )


def _depths(part: str, names: Collection[str]) -> tuple[int, ...]:
    """Return the number of blocks of each stage; gaps show when all names are compared."""
    counts: list[int] = []
    while f"{part}.stages.{len(counts)}.0.conv1.weight" in names:
        stage = f"{part}.stages.{len(counts)}."
        counts.append(sum(x.startswith(stage) and x.endswith(".conv1.weight") for x in names))
    return tuple(counts)


def translate_state_dict(published: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same tensors under our names; nothing is copied."""
    translated = {}
    for key, value in published.items():
        found = ((re.fullmatch(pattern, str(key)), ours) for pattern, ours in _RULES.items())
        name = next((match.expand(ours) for match, ours in found if match), None)
        if name is None:
            raise PluginError(
                f"{key!r} is no parameter of the published STU-Net (conv_blocks_context,"
                " upsample_layers, conv_blocks_localization, seg_outputs). Is this another network?"
            )
        translated[name.replace(".conv3.", ".shortcut.")] = value
    return translated
