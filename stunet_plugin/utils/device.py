"""Where to compute."""

from __future__ import annotations

from stunet_plugin.errors import PluginError


def choose_device(wanted: str) -> str:
    """Return ``cpu`` or ``cuda`` for what a user asked for: one of them, or ``auto``, which takes a
    GPU where there is one.

    Raises:
        PluginError: there is no GPU.
    """
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise PluginError(
            "--device cuda: torch finds no GPU here. Use --device cpu, or see `stunet doctor`."
        )
    return "cuda" if available and wanted != "cpu" else "cpu"
