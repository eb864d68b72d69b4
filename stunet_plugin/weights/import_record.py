"""Record of an import: what was imported how, and whether it is there already."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin import __version__
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.weights.identify import NetworkWeights
from stunet_plugin.weights.locate import Source

if TYPE_CHECKING:
    from stunet_plugin.commands.import_ import Import

PROVENANCE = "provenance.json"
CHECKPOINT_SHA256 = "checkpoint_sha256"
_CIRCUMSTANCES = ("source", "file", "date", "versions", "files", CHECKPOINT_SHA256)
"""Entries in which two imports of the same content may differ."""


def make_record(
    options: Import, source: Source, weights: NetworkWeights, plan: str, labels: str
) -> dict[str, Any]:
    """Return the record of an import.

    Args:
        options, source, weights: what is imported.
        plan, labels: where they come from.
    """
    import numpy
    import torch

    adapted = options.in_channels not in (None, weights.input_channels)
    return {
        "source": options.source,
        "file": source.checkpoint.name,
        "sha256": sha256_of(source.checkpoint),
        "plans_pickle_sha256": sha256_of(source.plans_pickle) if source.plans_pickle else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "format": weights.origin.value,
        "network": weights.description,
        "plan": plan,
        "labels": labels,
        "input_channels": options.in_channels or weights.input_channels,
        "stem": (options.stem or weights.default_stem) if adapted else "as in the source",
        "versions": {
            "stunet-plugin": __version__,
            "nnunetv2": host_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def is_same_import(
    target: Path, record: Mapping[str, Any], contents: Mapping[str, Any], checkpoint: str
) -> bool:
    """Return whether a model folder is that of the same import, whole and unchanged.

    Args:
        target: the model folder.
        record: what would be recorded now.
        contents: path within the folder to the content of each JSON file that would be written.
        checkpoint: path of the checkpoint within the folder.
    """
    try:
        there = json.loads((target / PROVENANCE).read_text())
        wanted = {key: value for key, value in record.items() if key not in _CIRCUMSTANCES}
        return (
            all(there[key] == value for key, value in json.loads(json.dumps(wanted)).items())
            and all((target / name).is_file() for name in there["files"])
            and all(
                json.loads((target / name).read_text()) == json.loads(json.dumps(content))
                for name, content in contents.items()
            )
            and there[CHECKPOINT_SHA256] == sha256_of(target / checkpoint)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
