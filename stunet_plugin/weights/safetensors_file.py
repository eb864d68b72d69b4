"""Safetensors files of shared models: the weights of one fold, and in the header what else a
checkpoint of nnU-Net v2 says, as JSON. No code, no optimizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError

ENTRY, SAME = "stunet", "same"
"""Keys of the header: the checkpoint without tensors, and tensors that are others once more."""
WEIGHTS = "network_weights"
KNOWN = ("trainer_name", "init_args", "inference_allowed_mirroring_axes")
MAX_HEADER_BYTES = 64 * 1024**2


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], checkpoint: Mapping[str, Any]
) -> None:
    """Write tensors, each once: nnU-Net's decoders list their encoder again. ``checkpoint``:
    entries of :data:`KNOWN`."""
    from safetensors.torch import save_file

    first: dict[tuple[Any, ...], str] = {}
    kept, same = {}, {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            same[name] = first[place]
        else:
            first[place] = name
            kept[name] = tensor.clone().contiguous()
    entries = {name: checkpoint.get(name) for name in KNOWN}
    save_file(kept, path, {ENTRY: json.dumps(entries), SAME: json.dumps(same)})
    path.chmod(0o644)  # it writes for its user alone


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read a file as a checkpoint of nnU-Net v2; raise PluginError if it is damaged, or no shared
    model."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise PluginError(f"{path} is refused: its header is larger than any model's.")
        with safe_open(path, "pt") as opened:
            header = opened.metadata() or {}
            if ENTRY not in header:
                raise PluginError(
                    f"{path} is a safetensors file, but not of `stunet share`: nothing in it says"
                    " what network it is. Import the checkpoint that it was made from."
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        entries, same = (json.loads(header.get(key, "{}")) for key in (ENTRY, SAME))
        if not isinstance(entries, dict) or not isinstance(same, dict):
            raise ValueError("entries must be tables")
        tensors |= {name: tensors[other] for name, other in same.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, PluginError):
            raise
        told = f"is damaged or cut off ({type(error).__name__}: {str(error)[:200]})"
        raise PluginError(f"{path} {told}. Download it again.") from error
    return {**{name: entries.get(name) for name in KNOWN}, WEIGHTS: tensors}
