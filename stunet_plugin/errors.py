"""Errors that users are meant to read, and hints for near misses. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PluginError(ValueError):
    """Wrong input from a user: the message says what was given, what is allowed and what to do
    next.

    The command line prints it without a traceback and exits with 2; inside a stock ``nnUNetv2_*``
    command it is the last line of the traceback.
    """


def nearest(given: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that is most like the given one; None if none is (similarity below
    ``cutoff``, 0 to 1)."""
    return next(iter(difflib.get_close_matches(given, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a sentence to put behind a message, with a blank in front; nothing if no known word is
    near."""
    found = nearest(given, known, cutoff)
    return f" Did you mean {found}?" if found else ""


def last_line(error: BaseException) -> str:
    """ITK's messages are long; the last line says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
