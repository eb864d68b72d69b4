"""Weights of any network that is known here, read from a checkpoint file."""

from __future__ import annotations

from pathlib import Path

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.file_formats import FileFormat, recognise
from stunet_plugin.weights.identify import NetworkWeights, Origin, identify
from stunet_plugin.weights.misfm import NETWORKS, read_misfm
from stunet_plugin.weights.safe_loading import load_checkpoint
from stunet_plugin.weights.stunet import read_stunet


def read_weights(
    path: Path,
    file_format: FileFormat | None = None,
    mode: int | None = None,
    any_mode: bool = False,
) -> NetworkWeights:
    """Read the network out of a checkpoint.

    Args:
        path: of the file.
        file_format: of the file if the caller knows it.
        mode: anisotropy mode, see :func:`stunet_plugin.weights.misfm.read_misfm`.
        any_mode: read a file that holds all modes by mode 0, where only sizes matter.

    Raises:
        PluginError: no network that is known; missing, unknown or misshapen tensors; a mode for a
            network that has none.
    """
    checkpoint = load_checkpoint(path, file_format or recognise(path))
    origin, weights = identify(checkpoint, path)
    if any_mode and origin is Origin.PCTNET:
        mode = 0
    if origin in NETWORKS:
        return read_misfm(origin, checkpoint, weights, path, mode)
    if mode is not None:
        raise PluginError(
            f"{path} is a {origin.value}, which has no anisotropy modes. Leave --mode out."
        )
    return read_stunet(origin, checkpoint, weights, path)
