"""nnU-Net's commands: where they are, and what they need of the environment."""

from __future__ import annotations

import functools
import getpass
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from stunet_plugin.errors import PluginError

NAMELESS = "user_without_a_name"


def name_user() -> None:
    """Give a user id without a name (docker --user) one, for torch's compiler caches and others."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = NAMELESS


def find_command(name: str) -> str:
    """Return the path of a command: beside this Python, else on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        where = f"neither beside {sys.executable} nor on the PATH"
        raise PluginError(f"The command {name} is {where}. Reinstall nnunetv2.")
    return found


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that its children are stopped too."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    _keep_default_in_forked_workers()
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@functools.cache
def _keep_default_in_forked_workers() -> None:
    """Let SIGTERM end forked workers at once: their pools wait for that.

    It is held back during the fork, where Python would lose it and the pool would wait for ever.
    """
    if not hasattr(os, "register_at_fork"):
        return
    terminate = {signal.SIGTERM}
    release = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, terminate)

    def release_with_default() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        release()

    hold = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, terminate)
    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release_with_default)
