"""Device to compute on."""

from __future__ import annotations

from stunet_plugin.errors import PluginError


def choose_device(wanted: str) -> str:
    """Return ``cpu``, ``cuda`` or ``mps`` for what a user asked for: one of them, or ``auto``,
    which takes a CUDA GPU if there is one; raise PluginError if torch finds no such device."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "cpu"
    if not {"cuda": cuda, "mps": mps}.get(wanted, True):
        told = f"--device {wanted}: torch finds no such GPU here"
        raise PluginError(f"{told}. Use --device cpu, or see `stunet doctor`.")
    return wanted
