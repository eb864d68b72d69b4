"""Registry of trainers or planners: classes by name, with hints for names that are nearly right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from stunet_plugin.errors import PluginError, did_you_mean, nearest

NEAR = 0.8
"""Similarity of a name that is taken for a misspelt one of ours."""
HINT = "stunet-plugin: "


class Registry(dict[str, Any]):
    """Classes by name; the tables of families in the order in which names are listed."""

    def __init__(self, kind: str, *families: Mapping[str, Any]) -> None:
        super().__init__({name: one for family in families for name, one in family.items()})
        self.kind = kind
        # What stands in front of a size: stunettrainer, pctnetplanner.
        self._prefixes = tuple({_plain(name.partition("_")[0]) for name in self})

    def find(self, name: str) -> Any:
        """Return the class of this name; raise a PluginError with the nearest one."""
        if name not in self:
            raise PluginError(self._unknown(name))
        return self[name]

    def hint(self, name: str) -> str | None:
        """Return a line for an unknown name that looks like one of ours, None for any other."""
        if name in self or name.startswith("__"):
            return None
        near = nearest(name, self, NEAR)
        alike = near is not None and near[:3].lower() == name[:3].lower()
        ours = alike or _plain(name).startswith(self._prefixes)
        return f"{HINT}{self._unknown(name)}" if ours else None

    def module_getattr(self, module: str) -> Callable[[str], Any]:
        """Return the ``__getattr__`` of a module with these classes: it prints the hint.

        nnU-Net looks for a class by ``hasattr`` on each module, goes on to the next (users derive
        their own), and its last word on an unknown name does not say what is allowed.
        """

        def module_getattr(name: str) -> Any:
            if hint := self.hint(name):
                print(hint, file=sys.stderr)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")

        return module_getattr

    def _unknown(self, name: str) -> str:
        hint = did_you_mean(name, self)
        return f"Unknown {self.kind} {name!r}.{hint} All names: stunet list --trainers"


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
