"""Device to compute on."""

from __future__ import annotations

from stunet_plugin.errors import PluginError


def choose_device(wanted: str) -> str:
    """Return ``cpu``, ``cuda`` or ``mps`` for what a user asked for: one of them, or ``auto``,
    which takes a CUDA GPU if there is one.

    Raises:
        PluginError: torch finds no such device.
    """
    import torch

    cuda = torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "cpu"
    if (wanted == "cuda" and not cuda) or (
        wanted == "mps" and not torch.backends.mps.is_available()
    ):
        raise PluginError(
            f"--device {wanted}: torch finds no such GPU here. Use --device cpu, or see `stunet"
            " doctor`."
        )
    return wanted
