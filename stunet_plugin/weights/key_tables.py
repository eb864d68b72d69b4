"""Translating the parameters of a published network by a table of its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from stunet_plugin.errors import PluginError


def numbered(published: str, ours: str, names: Mapping[int, str]) -> dict[str, str]:
    """Return a table entry for each module of a published sequence that has parameters: position to
    our name."""
    return {f"{published}.{position}": f"{ours}.{name}" for position, name in names.items()}


def translate(
    key: str, value: Tensor, modules: Mapping[str, str], network: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and tensors for a published parameter or buffer.

    Its module's name is looked up, its own is kept. The published networks concatenate (skip,
    upsampled) and normalise then; ours normalise the two and concatenate then, so such a norm comes
    apart into two halves.

    Args:
        key: published name, such as ``project.weight``.
        value: what it names.
        modules: our name of every published module.
        network: what the message calls the published network.

    Raises:
        PluginError: the published network has no such module.
    """
    module, _, name = key.rpartition(".")
    if module not in modules:
        raise unknown_key(key, modules, network)
    ours = modules[module]
    if not (ours.startswith("decoder.merges.") and ours.endswith(".norms.0")):
        yield f"{ours}.{name}", value
        return
    halves = value.chunk(2) if value.ndim else (value, value)
    for half, part in enumerate(halves):
        yield f"{ours.removesuffix('0')}{half}.{name}", part


def unknown_key(key: str, modules: Mapping[str, str], network: str) -> PluginError:
    """Return the error for a name that the published network does not have."""
    parts = sorted({published.partition(".")[0] for published in modules})
    return PluginError(
        f"{key!r} is not a parameter of the published {network} (its parts: {', '.join(parts)}). "
        f"Is this the checkpoint of another network?"
    )
