"""SAM-Med2D for the tests: the recorded tiny one, as published and as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.networks.presets import SAM_PRESETS

REASON = "needs transformers: pip install 'stunet-plugin[sam]'"
pytest.importorskip("transformers", reason=REASON)

from stunet_plugin.networks.sammed2d import ADAPTER, Adapter, Inputs, Masks, Prompts, SAMMed2D  # noqa: E402
from stunet_plugin.sam import curve, images, loss, prompts, slice_session  # noqa: E402
from stunet_plugin.weights.sam_keys import renamed  # noqa: E402

__all__ = [
    "ADAPTER", "TINY", "Adapter", "Inputs", "Masks", "Prompts", "SAMMed2D", "curve", "fixtures",
    "images", "loss", "prompts", "recorded", "recorded_network", "slice_session",
]  # fmt: skip
TINY = SAM_PRESETS["tiny"]


def fixtures(shared: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the published weights of a recorded network, and its recorded inputs and outputs."""
    file = shared / "fixtures" / "prompts" / name
    weights = torch.load(file.with_suffix(".pt"), weights_only=True)
    return weights, recorded(shared, name)


def recorded(shared: Path, name: str) -> dict[str, torch.Tensor]:
    arrays = np.load((shared / "fixtures" / "prompts" / name).with_suffix(".npz"))
    return {key: torch.from_numpy(arrays[key]) for key in arrays}


def recorded_network(shared: Path, name: str = "sammed2d_tiny_adapter") -> Any:
    network = SAMMed2D(TINY, adapters=not name.endswith("noadapter")).eval()
    network.load_state_dict(renamed(fixtures(shared, name)[0]))
    return network
