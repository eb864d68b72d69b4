"""Near misses: which known word a user may have meant. Light: the command line and the presets read it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that is most like the given one; None if none is (similarity below ``cutoff``, 0 to 1)."""
    return next(iter(difflib.get_close_matches(given, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a sentence to put behind a message, with a blank in front; nothing if no known word is near."""
    found = nearest(given, known, cutoff)
    return f" Did you mean {found}?" if found else ""
