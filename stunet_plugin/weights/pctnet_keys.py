"""Parameter names of the published PCT-Net, translated to ours. Pure functions from a state dict to
a state dict.

Published names (PyMIC checkpoints; m anisotropy mode):
    ``embeddings.m.{proj,conv0,conv1,down1,down2}``,
``pyramid_ct.{down3,down4,convtrans_{e2,e3,e4,d3,d2},up3,up4,out_conv2,out_conv3}``,
``pred_heads.m.{up1,up2,conv0,conv1,out_conv0,out_conv1}``, and in each the positions of norms,
activations and convolutions. A file holds the stems and heads of all three modes around one
pyramid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import MODES, get_mode
from stunet_plugin.networks.pctnet import DEPTH
from stunet_plugin.networks.window_attention import WINDOW_SIZE
from stunet_plugin.weights.key_tables import numbered, translate, unknown_key

Value = TypeVar("Value")

NETWORK = "PCT-Net"

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


def _pct_block(published: str, ours: str) -> dict[str, str]:
    modules = numbered(f"{published}.conv.conv_conv", f"{ours}.conv", _CONV_BLOCK)
    for block in range(DEPTH):
        theirs, mine = f"{published}.trans.blocks.{block}", f"{ours}.transformer.blocks.{block}"
        modules |= {
            f"{theirs}.{name}": f"{mine}.{translated}"
            for name, translated in _TRANSFORMER_BLOCK.items()
        }
    return modules


def _modules(mode: int) -> dict[str, str]:
    """Our names of the modules that one mode uses; decoder steps are counted from the deepest."""
    stem, pyramid, head = f"embeddings.{mode}", "pyramid_ct", f"pred_heads.{mode}"
    modules = {f"{stem}.proj": "encoder.stages.0.0"}
    for published, ours in (
        (f"{stem}.conv0", "encoder.stages.0.1"),
        (f"{stem}.conv1", "encoder.stages.1.2"),
        (f"{head}.conv1", "decoder.blocks.2"),
        (f"{head}.conv0", "decoder.blocks.3"),
    ):
        modules |= numbered(f"{published}.conv_conv", ours, _CONV_BLOCK)
    for published, ours in (
        (f"{stem}.down1.conv", "encoder.stages.1.1"),
        (f"{stem}.down2.conv", "encoder.stages.2.1"),
        (f"{pyramid}.down3.conv", "encoder.stages.3.1"),
        (f"{pyramid}.down4.conv", "encoder.stages.4.1"),
        (f"{pyramid}.up4.up", "decoder.ups.0"),
        (f"{pyramid}.up4.conv", "decoder.merges.0"),
        (f"{pyramid}.up3.up", "decoder.ups.1"),
        (f"{pyramid}.up3.conv", "decoder.merges.1"),
        (f"{head}.up2.up", "decoder.ups.2"),
        (f"{head}.up2.conv", "decoder.merges.2"),
        (f"{head}.up1.up", "decoder.ups.3"),
        (f"{head}.up1.conv", "decoder.merges.3"),
        (f"{pyramid}.out_conv3.conv", "decoder.seg_layers.0"),
        (f"{pyramid}.out_conv2.conv", "decoder.seg_layers.1"),
        (f"{head}.out_conv1.conv", "decoder.seg_layers.2"),
        (f"{head}.out_conv0.conv", "decoder.seg_layers.3"),
    ):
        modules |= numbered(published, ours, _UNIT)
    for published, ours in (
        ("e2", "encoder.stages.2.2"),
        ("e3", "encoder.stages.3.2"),
        ("e4", "encoder.stages.4.2"),
        ("d3", "decoder.blocks.0"),
        ("d2", "decoder.blocks.1"),
    ):
        modules |= _pct_block(f"{pyramid}.convtrans_{published}", ours)
    return modules


_MODULES = tuple(_modules(mode.number) for mode in MODES)
_ALL_MODULES = {name: ours for modules in _MODULES for name, ours in modules.items()}

# A norm in every PCT block that the published forward never uses, and buffers that ours computes.
_UNUSED = re.compile(
    r"pyramid_ct\.convtrans_\w\d\.(norm_layer\.(weight|bias)|trans\.blocks\.\d\.attn\.relative_position_index)"
)


def used_in(published: Mapping[str, Value], mode: int) -> dict[str, Value]:
    """Return what one mode uses of a published state dict, under the published names.

    Raises:
        PluginError: no such mode, or a name is not one of the published PCT-Net's.
    """
    chosen = _MODULES[get_mode(mode).number]
    modules = {key: key.rpartition(".")[0] for key in published if not _UNUSED.fullmatch(key)}
    for key, module in modules.items():
        if module not in _ALL_MODULES:
            raise unknown_key(key, _ALL_MODULES, NETWORK)
    return {key: published[key] for key, module in modules.items() if module in chosen}


def translate_state_dict(published: Mapping[str, Tensor], mode: int) -> dict[str, Tensor]:
    """Return the tensors that one mode uses, under our names. Only the relative position tables
    change.

    Args:
        published: the state dict of a published PCT-Net.
        mode: 0, 1 or 2.

    Raises:
        PluginError: no such mode, or a name is not one of the published PCT-Net's.
    """
    modules = _MODULES[get_mode(mode).number]
    used = used_in(published, mode)
    translated = dict(
        pair for key, value in used.items() for pair in translate(key, value, modules, NETWORK)
    )
    return {
        key: (
            translate_table(value, WINDOW_SIZE)
            if key.endswith(".relative_position_bias_table")
            else value
        )
        for key, value in translated.items()
    }


def published_rows(window: int) -> Tensor:
    """Return which row of a published table each offset reads, (2w - 1)^3 of them in the order of
    our rows.

    The quirk that the published weights depend on: with offsets (s, h, v), each shifted to start at
        0, the published index
    is ``s * (3w - 1) + h * (2w - 1) + v``, where ``(2w - 1)^2`` would have kept the offsets apart.
    So offsets share rows, and most rows of a published table are never read. We keep the function
    by giving each offset the row that it read.
    """
    shifted = torch.arange(2 * window - 1)
    index = (
        shifted[:, None, None] * (3 * window - 1) + shifted[:, None] * (2 * window - 1) + shifted
    )
    return index.flatten()


def window_of_table(rows: int) -> int:
    """Return the window that a table with so many rows was built for.

    Raises:
        PluginError: no window has as many rows.
    """
    window = (round(rows ** (1 / 3)) + 1) // 2
    if rows < 1 or (2 * window - 1) ** 3 != rows:
        raise PluginError(
            f"A relative position table has (2 * window - 1)^3 rows; {rows} is none of 1, 27, 125,"
            " 343, 729, 1331."
        )
    return window


def resample_table(table: Tensor, window: int) -> Tensor:
    """Return the table for another window size: each offset keeps its row.

    An offset in voxels means the same in windows of all sizes, so a smaller table is the middle of
    a larger one, exactly. A larger one takes, for the offsets that the smaller did not know, the
    row of the nearest offset that it did.

    Args:
        table: (rows, heads), one row per offset in our order.
        window: that the result is for.

    Raises:
        PluginError: the number of rows belongs to no window.
    """
    known = window_of_table(table.shape[0])
    offsets = torch.arange(1 - window, window).clamp(1 - known, known - 1) + known - 1
    rows = 2 * known - 1
    index = (offsets[:, None, None] * rows + offsets[:, None]) * rows + offsets
    return table[index.flatten().to(table.device)]


def translate_table(table: Tensor, window: int) -> Tensor:
    """Return a published table as ours for full windows of ``window``.

    Raises:
        PluginError: the number of rows belongs to no window, or to a larger one.
    """
    known = window_of_table(table.shape[0])
    if known > window:
        raise PluginError(
            f"Its attention windows are {known} voxels long; this PCT-Net has windows of {window}"
            " at most."
        )
    by_offset = table[published_rows(known).to(table.device)]
    return resample_table(by_offset, window)
