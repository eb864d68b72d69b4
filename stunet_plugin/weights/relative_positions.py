"""Relative position tables of published PCT-Nets, translated to ours, and tables of one window size
to another.

A published network stores, per attention layer, (2w - 1)^3 rows for the window w that it was built
with: 6, or less where the patch left a smaller feature map. Ours always has one row per offset of a
    full window, so that weights fit every plan
(see :class:`stunet_plugin.networks.window_attention.WindowAttention`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stunet_plugin.errors import PluginError


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
