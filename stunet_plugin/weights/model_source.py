"""The checkpoint of a model that a user names: a file, or a model folder of nnU-Net v2."""

from __future__ import annotations

from pathlib import Path

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.weights.locate import Source, find_source

CHECKPOINTS = (CHECKPOINT, "checkpoint_best.pth", "checkpoint_latest.pth")
"""What nnU-Net v2 writes into a fold, the most wanted first."""


def find_model(given: str) -> Source:
    """Return the checkpoint file, or that of the first fold in a model folder.

    Raises:
        PluginError: no such file, or a folder without a checkpoint.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return find_source(given)
    for name in CHECKPOINTS:
        # The folder itself may be a fold.
        for found in (path / name, *sorted(path.glob(f"fold_*/{name}"))):
            if found.is_file():
                return Source(given, found, None)
    raise PluginError(
        f"{path} is no model folder: it has no fold_X/{CHECKPOINT}. Name the folder"
        " TRAINER__PLANS__CONFIGURATION in nnUNet_results, or a checkpoint file."
    )
