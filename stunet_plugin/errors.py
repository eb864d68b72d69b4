"""Errors that users are meant to read, and hints for near misses. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence


class PluginError(ValueError):
    """Wrong input from a user: what was given, what is allowed and what to do next.

    The command line prints it without a traceback and exits with 2; inside an ``nnUNetv2_*``
    command it is the last line of the traceback.
    """


def nearest(given: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word most like the given one, whatever its capitals; None if none is.

    Args:
        cutoff: least similarity, 0 to 1.
    """
    words = {word.lower(): word for word in known}
    found = difflib.get_close_matches(given.lower(), list(words), n=1, cutoff=cutoff)
    return words[found[0]] if found else None


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a hint to append to a message, with a blank in front; "" if no known word is near."""
    found = nearest(given, known, cutoff)
    return f" Did you mean {found}?" if found else ""


def last_line(error: BaseException) -> str:
    """Return the last line of an error: in ITK's long messages it says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def setting(name: str, value: str) -> str:
    """Return the line that sets a variable: for PowerShell on Windows, for bash elsewhere."""
    return f'$env:{name} = "{value}"' if os.name == "nt" else f"export {name}={value}"


def few(names: Sequence[str], most: int = 8) -> str:
    """Return the first names as text, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def few_lines(problems: Sequence[str], most: int = 5) -> str:
    """Return the first problems, one per line, and how many there are besides."""
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join([*problems[:most], *more])
