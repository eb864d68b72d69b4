"""Finding nnU-Net's commands, and ending what they and ours started. Light: the command line reads
it."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from stunet_plugin.errors import PluginError

WAIT_FOR_CHILDREN = 5.0
"""Seconds, for each."""


def find_command(name: str) -> str:
    """Return the path of a stock command: beside this Python, else on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise PluginError(
            f"The command {name} is not beside {sys.executable} and not on the PATH. Reinstall"
            " nnunetv2."
        )
    return found


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, so that its children are stopped too."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def interruptible(how_it_goes_on: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a run, and its worker processes before it, so that none of them
    has the last word.

    Args:
        how_it_goes_on: added to the message of the KeyboardInterrupt, which the command line prints
            last.

    Raises:
        KeyboardInterrupt: as it came, with that message.
    """
    with terminate_as_interrupt():
        try:
            yield
        except KeyboardInterrupt as error:
            for child in multiprocessing.active_children():
                # Not terminate: a forked one has this very handler and would go on as the parent
                # does.
                child.kill()
                child.join(WAIT_FOR_CHILDREN)
            raise KeyboardInterrupt(" ".join(filter(None, (str(error), how_it_goes_on)))) from error
