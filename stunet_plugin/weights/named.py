"""Names of weights on a command line: ``[NAME=]PATH``, ``random``, ``random:TRAINER``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.file_formats import recognise
from stunet_plugin.weights.locate import HUB_PREFIX, find_model

RANDOM = "random"


@dataclass(frozen=True)
class Named:
    """Weights as the user gave them: a path (a folder, a file, or on the hub), or the trainer of a
    network with random ones; neither is for random weights for every network among the others."""

    name: str
    path: str = ""
    trainer: str = ""

    @classmethod
    def read(cls, text: str) -> Named:
        name, separator, path = text.partition("=")
        # A path may hold that sign itself.
        if not separator or Path(text).exists():
            name, path = "", text
        if path == RANDOM:
            return cls(name or RANDOM)
        if path.startswith(f"{RANDOM}:"):
            return cls(name or path, trainer=path.partition(":")[2])
        return cls(name or path.rstrip(f"/{os.sep}"), path)

    @cached_property
    def file(self) -> Path:
        """The checkpoint; raises PluginError for a folder without one."""
        return find_model(self.path).checkpoint


def check_named(weights: Sequence[Named]) -> None:
    """Raise a PluginError if a file is no checkpoint, or two weights have one name; files on the
    hub are looked at when they are here."""
    for one in weights:
        if one.path and not one.path.startswith(HUB_PREFIX):
            recognise(one.file)
    names = [one.name for one in weights]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PluginError(f"Two candidates are called {twice[0]}. Give them names: NAME=PATH")
