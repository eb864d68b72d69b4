"""Parameter names of the published PCT-Net and FMUNet, translated to ours.

Pure functions from a state dict to a state dict. Published names (PyMIC checkpoints; m anisotropy
mode, l level, u unit) of PCT-Net: ``embeddings.m.{proj,conv0,conv1,down1,down2}``,
``pyramid_ct.{down3,down4,convtrans_{e2,e3,e4,d3,d2},up3,up4,out_conv2,out_conv3}``,
``pred_heads.m.{up1,up2,conv0,conv1,out_conv0,out_conv1}``; a file holds the stems and heads of all
three modes around one pyramid. Of FMUNet: ``project``, ``out_layers.L``,
``encoder.{en_convL.conv_list.U,downL.down}``,
``decoder.{upcatL.up,upcatL.conv,de_convL.conv_list.U}``. In each follow the positions of
norms, activations and convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import fmunet, pctnet
from stunet_plugin.networks.anisotropy import MODES, NUM_LEVELS, get_mode
from stunet_plugin.networks.window_attention import WINDOW_SIZE

Value = TypeVar("Value")


def numbered(published: str, ours: str, names: Mapping[int, str]) -> dict[str, str]:
    """Return a table entry for each module of a published sequence that has parameters: position to
    our name."""
    return {f"{published}.{position}": f"{ours}.{name}" for position, name in names.items()}


def translate(
    key: str, value: Tensor, modules: Mapping[str, str], network: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and tensors for a published parameter or buffer.

    Its module's name is looked up, its own is kept. The published networks concatenate (skip,
    upsampled) and normalise then; ours normalise the two and concatenate then, so such a norm comes
    apart into two halves.

    Args:
        key: published name, such as ``project.weight``.
        value: what it names.
        modules: our name of every published module.
        network: what the message calls the published network.

    Raises:
        PluginError: the published network has no such module.
    """
    module, _, name = key.rpartition(".")
    if module not in modules:
        raise unknown_key(key, modules, network)
    ours = modules[module]
    if not (ours.startswith("decoder.merges.") and ours.endswith(".norms.0")):
        yield f"{ours}.{name}", value
        return
    halves = value.chunk(2) if value.ndim else (value, value)
    for half, part in enumerate(halves):
        yield f"{ours.removesuffix('0')}{half}.{name}", part


def unknown_key(key: str, modules: Mapping[str, str], network: str) -> PluginError:
    """Return the error for a name that the published network does not have."""
    parts = sorted({published.partition(".")[0] for published in modules})
    return PluginError(
        f"{key!r} is not a parameter of the published {network} (its parts: {', '.join(parts)}). "
        f"Is this the checkpoint of another network?"
    )


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
    for block in range(pctnet.DEPTH):
        theirs, mine = f"{published}.trans.blocks.{block}", f"{ours}.transformer.blocks.{block}"
        modules |= {
            f"{theirs}.{name}": f"{mine}.{translated}"
            for name, translated in _TRANSFORMER_BLOCK.items()
        }
    return modules


def _pctnet_modules(mode: int) -> dict[str, str]:
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


_PCTNET_MODULES = tuple(_pctnet_modules(mode.number) for mode in MODES)
_ALL_MODULES = {name: ours for modules in _PCTNET_MODULES for name, ours in modules.items()}

# A norm in every PCT block that the published forward never uses, and buffers that ours computes.
_UNUSED = re.compile(
    r"pyramid_ct\.convtrans_\w\d\.(norm_layer\.(weight|bias)|trans\.blocks\.\d\.attn\.relative_position_index)"
)


def used_in(published: Mapping[str, Value], mode: int) -> dict[str, Value]:
    """Return what one mode uses of a published state dict, under the published names.

    Raises:
        PluginError: no such mode, or a name is not one of the published PCT-Net's.
    """
    chosen = _PCTNET_MODULES[get_mode(mode).number]
    modules = {key: key.rpartition(".")[0] for key in published if not _UNUSED.fullmatch(key)}
    for key, module in modules.items():
        if module not in _ALL_MODULES:
            raise unknown_key(key, _ALL_MODULES, "PCT-Net")
    return {key: published[key] for key, module in modules.items() if module in chosen}


def translate_pctnet(published: Mapping[str, Tensor], mode: int) -> dict[str, Tensor]:
    """Return the tensors that one mode uses, under our names. Only the relative position tables
    change.

    Args:
        published: the state dict of a published PCT-Net.
        mode: 0, 1 or 2.

    Raises:
        PluginError: no such mode, or a name is not one of the published PCT-Net's.
    """
    modules = _PCTNET_MODULES[get_mode(mode).number]
    used = used_in(published, mode)
    translated = dict(
        pair for key, value in used.items() for pair in translate(key, value, modules, "PCT-Net")
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


def _fmunet_modules() -> dict[str, str]:
    unit, residual = {0: "norms.0", 2: "conv"}, {0: "norms.0", 3: "conv"}
    modules = {"project": "encoder.stages.0.0"}
    for level in range(NUM_LEVELS):
        step = NUM_LEVELS - 2 - level
        block = f"decoder.blocks.{step}" if step >= 0 else "decoder.bottom"
        for depth in range(fmunet.DEPTH):
            modules |= numbered(
                f"encoder.en_conv{level}.conv_list.{depth}",
                f"encoder.stages.{level}.1.units.{depth}",
                residual,
            )
            modules |= numbered(
                f"decoder.de_conv{level}.conv_list.{depth}", f"{block}.units.{depth}", residual
            )
        if step >= 0:
            modules |= numbered(f"encoder.down{level}.down", f"encoder.stages.{level + 1}.0", unit)
            modules |= numbered(f"decoder.upcat{level}.up", f"decoder.ups.{step}.0", unit)
            modules |= numbered(f"decoder.upcat{level}.conv", f"decoder.merges.{step}", unit)
            modules |= numbered(f"out_layers.{level}", f"decoder.seg_layers.{step}", unit)
    return modules


_FMUNET_MODULES = _fmunet_modules()


def translate_fmunet(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under our names; nothing is copied.

    Raises:
        PluginError: a name is not one of the published FMUNet's.
    """
    return dict(
        pair
        for key, value in published.items()
        for pair in translate(key, value, _FMUNET_MODULES, "FMUNet")
    )
