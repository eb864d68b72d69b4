"""Translating the parameter names of a published network by a table of its modules."""

from __future__ import annotations

from collections.abc import Mapping

from stunet_plugin.errors import PluginError


def translate_key(key: str, modules: Mapping[str, str], network: str) -> str:
    """Return our name of a published parameter or buffer: its module's name is looked up, its own is kept.

    Args:
        key: published name, such as ``project.weight``.
        modules: our name of every published module.
        network: what the message calls the published network.

    Raises:
        PluginError: the published network has no such module.
    """
    module, _, name = key.rpartition(".")
    if module not in modules:
        parts = sorted({published.partition(".")[0] for published in modules})
        raise PluginError(
            f"{key!r} is not a parameter of the published {network} (its parts: {', '.join(parts)}). "
            f"Is this the checkpoint of another network?"
        )
    return f"{modules[module]}.{name}"


def numbered(published: str, ours: str, names: Mapping[int, str]) -> dict[str, str]:
    """Return a table entry for each module of a published sequence that has parameters: position to our name."""
    return {f"{published}.{position}": f"{ours}.{name}" for position, name in names.items()}
