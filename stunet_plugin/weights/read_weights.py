"""The one way into a checkpoint for commands that take any network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.identify import Origin, find_origin
from stunet_plugin.weights.misfm import NETWORKS, MISFMWeights, read_misfm
from stunet_plugin.weights.stunet import STUNetWeights, read_stunet


def any_mode(checkpoint: Mapping[str, Any], path: Path) -> int | None:
    """Return a mode to read a checkpoint by where only sizes matter: that of PyMIC's PCT-Net has
    all, each of which tells them."""
    origin, _ = find_origin(checkpoint, path)
    return 0 if origin is Origin.PCTNET else None


def read_weights(
    checkpoint: Mapping[str, Any], path: Path, mode: int | None = None
) -> STUNetWeights | MISFMWeights:
    """Read the network out of a checkpoint, whichever it is.

    Args:
        checkpoint, path: as loaded, and its file.
        mode: the anisotropy mode, see :func:`stunet_plugin.weights.misfm.read_misfm`.

    Raises:
        PluginError: no network that is known; missing, unknown or misshapen tensors; a mode for a
            network that has none.
    """
    origin, _ = find_origin(checkpoint, path)
    if origin in NETWORKS:
        return read_misfm(checkpoint, path, mode)
    if mode is not None:
        raise PluginError(
            f"{path} is a {origin.value}, which has no anisotropy modes. Leave --mode out."
        )
    return read_stunet(checkpoint, path)
