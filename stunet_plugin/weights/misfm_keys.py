"""Parameter names of the published PCT-Net and FMUNet (in PyMIC checkpoints), translated to ours.

A file of PCT-Net holds the stems (``embeddings.MODE``) and heads (``pred_heads.MODE``) of all three
anisotropy modes around one pyramid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import fmunet, pctnet
from stunet_plugin.networks.anisotropy import MODES, NUM_LEVELS, get_mode
from stunet_plugin.networks.window_attention import WINDOW_SIZE


def _translate(
    published: Mapping[str, Tensor], modules: Mapping[str, str], network: str
) -> dict[str, Tensor]:
    """Return our names and tensors; ``modules`` has our name of every published module.

    The published networks concatenate (skip, upsampled) and normalise then; ours normalise the two
    and concatenate then, so such a norm comes apart into two halves.
    """
    translated = {}
    for key, value in published.items():
        module, _, name = key.rpartition(".")
        _check_known(key, modules, network)
        ours = modules[module]
        if ours.startswith("decoder.merges.") and ours.endswith(".norms.0"):
            for half, part in enumerate(value.chunk(2) if value.ndim else (value, value)):
                translated[f"{ours.removesuffix('0')}{half}.{name}"] = part
        else:
            translated[f"{ours}.{name}"] = value
    return translated


def _check_known(key: str, modules: Mapping[str, str], network: str) -> None:
    if key.rpartition(".")[0] not in modules:
        parts = sorted({published.partition(".")[0] for published in modules})
        raise PluginError(
            f"{key!r} is not a parameter of the published {network} (its parts:"
            f" {', '.join(parts)}). Is this the checkpoint of another network?"
        )


def _numbered(pairs: Mapping[str, str], names: Mapping[int, str]) -> dict[str, str]:
    """Return our names of modules in published sequences. ``pairs``: name of a sequence to ours,
    ``names``: position in it to our name."""
    return {
        f"{published}.{position}": f"{ours}.{name}"
        for published, ours in pairs.items()
        for position, name in names.items()
    }


# --- PCT-Net

_UNIT = {0: "norms.0", 1: "act", 2: "conv"}
_CONV_BLOCK = {0: "0.norms.0", 1: "0.act", 2: "0.conv", 3: "1.norms.0", 4: "1.act", 6: "1.conv"}
_TRANSFORMER_BLOCK = {
    "norm1": "norm1",
    "attn": "attention",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


def _pctnet_modules(mode: int) -> dict[str, str]:
    """Our names of the modules that one mode uses; decoder steps are counted from the deepest."""
    stem, pyramid, head = f"embeddings.{mode}", "pyramid_ct", f"pred_heads.{mode}"
    units = {}
    for level in range(1, NUM_LEVELS):
        step, shared = NUM_LEVELS - 1 - level, level > 2
        down, up = (pyramid, pyramid) if shared else (stem, head)
        units[f"{down}.down{level}.conv"] = f"encoder.stages.{level}.1"
        units[f"{up}.up{level}.up"] = f"decoder.ups.{step}"
        units[f"{up}.up{level}.conv"] = f"decoder.merges.{step}"
        units[f"{up}.out_conv{level - 1}.conv"] = f"decoder.seg_layers.{step}"
    conv_blocks = {
        f"{stem}.conv0.conv_conv": "encoder.stages.0.1",
        f"{stem}.conv1.conv_conv": "encoder.stages.1.2",
        f"{head}.conv1.conv_conv": "decoder.blocks.2",
        f"{head}.conv0.conv_conv": "decoder.blocks.3",
    }
    pct_blocks = {
        f"{pyramid}.convtrans_e2": "encoder.stages.2.2",
        f"{pyramid}.convtrans_e3": "encoder.stages.3.2",
        f"{pyramid}.convtrans_e4": "encoder.stages.4.2",
        f"{pyramid}.convtrans_d3": "decoder.blocks.0",
        f"{pyramid}.convtrans_d2": "decoder.blocks.1",
    }
    conv_blocks |= {f"{x}.conv.conv_conv": f"{ours}.conv" for x, ours in pct_blocks.items()}
    transformers = {
        f"{published}.trans.blocks.{block}.{theirs}": f"{ours}.transformer.blocks.{block}.{mine}"
        for published, ours in pct_blocks.items()
        for block in range(pctnet.DEPTH)
        for theirs, mine in _TRANSFORMER_BLOCK.items()
    }
    return {
        f"{stem}.proj": "encoder.stages.0.0",
        **_numbered(units, _UNIT),
        **_numbered(conv_blocks, _CONV_BLOCK),
        **transformers,
    }


_PCTNET_MODULES = tuple(_pctnet_modules(mode.number) for mode in MODES)
_ALL_MODULES = {name: ours for modules in _PCTNET_MODULES for name, ours in modules.items()}

# A norm in every PCT block that the published forward never uses, and buffers that ours computes.
_UNUSED = re.compile(
    r"pyramid_ct\.convtrans_\w\d\.(norm_layer\.(weight|bias)"
    r"|trans\.blocks\.\d\.attn\.relative_position_index)"
)


def used_in(published: Mapping[str, Any], mode: int) -> dict[str, Any]:
    """Return what one mode uses of a published state dict, under the published names."""
    chosen = _PCTNET_MODULES[get_mode(mode).number]
    kept = [key for key in published if not _UNUSED.fullmatch(str(key))]
    for key in kept:
        _check_known(str(key), _ALL_MODULES, "PCT-Net")
    return {key: published[key] for key in kept if str(key).rpartition(".")[0] in chosen}


def translate_pctnet(published: Mapping[str, Tensor], mode: int) -> dict[str, Tensor]:
    """Return the tensors that one mode uses, under our names. Only the relative position tables
    change."""
    modules = _PCTNET_MODULES[get_mode(mode).number]
    translated = _translate(used_in(published, mode), modules, "PCT-Net")
    for key, value in translated.items():
        if key.endswith(".relative_position_bias_table"):
            translated[key] = translate_table(value, WINDOW_SIZE)
    return translated


def translate_table(table: Tensor, window: int) -> Tensor:
    """Return a published relative position table as ours for full windows of ``window``, one row
    per offset; both are (rows, heads).

    The quirk that the published weights depend on: with offsets (s, h, v) in a window of w, each
    shifted to start at 0, the published row is ``s * (3w - 1) + h * (2w - 1) + v``, where
    ``(2w - 1)^2`` would have kept the offsets apart. So offsets share rows, and most are never
    read. We keep the function by giving each offset the row that it read. An offset in voxels means
    the same in windows of all sizes; one that a smaller published window did not know takes the row
    of the nearest that it did.

    Raises:
        PluginError: the table is that of no window, or of a larger one.
    """
    rows = table.shape[0] if table.ndim else 0
    known = (round(rows ** (1 / 3)) + 1) // 2
    if rows < 1 or (2 * known - 1) ** 3 != rows:
        raise PluginError(
            f"A relative position table has (2w - 1)^3 rows; {rows} is none of 1, 27, 125, 343."
        )
    if known > window:
        raise PluginError(f"Its attention windows are {known} voxels long, more than {window}.")
    nearest = torch.arange(1 - window, window).clamp(1 - known, known - 1) + known - 1
    index = nearest[:, None, None] * (3 * known - 1) + nearest[:, None] * (2 * known - 1) + nearest
    return table[index.flatten().to(table.device)]


# --- FMUNet


def _fmunet_modules() -> dict[str, str]:
    units, residuals = {}, {}
    for level in range(NUM_LEVELS):
        step = NUM_LEVELS - 2 - level
        block = f"decoder.blocks.{step}" if step >= 0 else "decoder.bottom"
        for depth in range(fmunet.DEPTH):
            encoder, decoder = f"encoder.stages.{level}.1.units.{depth}", f"{block}.units.{depth}"
            residuals[f"encoder.en_conv{level}.conv_list.{depth}"] = encoder
            residuals[f"decoder.de_conv{level}.conv_list.{depth}"] = decoder
        if step >= 0:
            units[f"encoder.down{level}.down"] = f"encoder.stages.{level + 1}.0"
            units[f"decoder.upcat{level}.up"] = f"decoder.ups.{step}.0"
            units[f"decoder.upcat{level}.conv"] = f"decoder.merges.{step}"
            units[f"out_layers.{level}"] = f"decoder.seg_layers.{step}"
    return {
        "project": "encoder.stages.0.0",
        **_numbered(units, _UNIT),
        **_numbered(residuals, {0: "norms.0", 3: "conv"}),
    }


def translate_fmunet(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under our names; nothing is copied."""
    return _translate(published, _fmunet_modules(), "FMUNet")
