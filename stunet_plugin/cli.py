"""Command line ``stunet``. Imports nothing before ``main`` can answer Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Exit codes: 0 done, 1 something is wrong (``doctor``), a command of nnU-Net failed, a demo found
    nothing or the disk is full, 2 wrong input, 130 interrupted.
    """
    try:
        from stunet_plugin.commands.dispatch import dispatch

        return dispatch(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as error:
        # On a line of its own: a progress bar or a worker may have left something on the last.
        print(f"\nInterrupted. {error}".rstrip(), file=sys.stderr)
        return INTERRUPTED
