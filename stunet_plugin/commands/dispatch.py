"""Dispatch of ``stunet``: finds and runs one command, and turns errors into a sentence. Imports
nothing heavy."""

from __future__ import annotations

import argparse
import errno
import functools
import multiprocessing
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stunet_plugin import __version__
from stunet_plugin.commands import COMMANDS, GROUPS
from stunet_plugin.commands.command import Command
from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.nnunet.commands import name_user

WAIT_FOR_WORKERS = 5.0
"""Seconds, for each."""
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Of an output that a user may not or cannot write."""
FULL = ("No space left on device", "iostream error", "unexpected pos ")
"""Words for a full disk; the last two are torch's writer's."""
DESCRIPTION = "Large networks and large-scale pretraining for nnU-Net v2."
EPILOG = """\
Help for one command: stunet COMMAND --help
Example: stunet register && nnUNetv2_train 4 3d_fullres 0 -tr STUNetTrainer_base"""


def dispatch(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; a KeyboardInterrupt says how to resume."""
    name, *words = arguments or [""]
    commands = {command.command: command for command in COMMANDS}
    if name in commands:
        return run(commands[name].parse(words))
    parser = build_parser()
    if not name:
        parser.print_help()
        return 2
    if name.startswith("-"):
        parser.parse_args([name])
    hint = did_you_mean(name, commands)
    parser.error(f"there is no command {name!r}.{hint} All commands: stunet --help")


def run(command: Command) -> int:
    """Run a command with its options and return its exit code."""
    name = f"stunet {command.command}"
    name_user()
    try:
        with interruptible(command.interrupted):
            code = command.run()
        sys.stdout.flush()
        return code
    except PluginError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1 if disk_is_full(error) else 2
    except BrokenPipeError:
        # `stunet list | head`: the reader needs no more.
        sys.stderr.close()
        return 0
    except Exception as error:
        full = disk_is_full(error)
        if not full and not (isinstance(error, OSError) and error.errno in REFUSED):
            raise
        where = getattr(error, "filename", None) or "output"
        said = "no space left on the disk" if full else getattr(error, "strerror", "")
        advice = "Make room" if full else "Choose another place, or get access"
        print(f"{name}: {said} ({where}). {advice}, and run it again.", file=sys.stderr)
        # The rest of the buffer may not be writable either; Python would complain at exit.
        # Open for the rest of the process.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return 1 if full else 2


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether a full disk is behind an error: torch and ITK raise others instead of it."""
    while error is not None:
        told = any(words in str(error) for words in FULL)
        if told or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def interruptible(resume: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a run, its worker processes first so that none prints last; how to
    resume is added to the KeyboardInterrupt's message."""
    _keep_default_in_forked_workers()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join(WAIT_FOR_WORKERS)
        raise KeyboardInterrupt(" ".join(filter(None, (str(error), resume)))) from error
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
    hold = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, terminate)
    release = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, terminate)

    def release_with_default() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release_with_default)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``stunet`` itself, whose help lists the commands by group."""
    lines = [DESCRIPTION]
    for group, commands in GROUPS.items():
        lines.append(f"\n{group}:")
        for command in commands:
            text = f"{command.command:<22}{command.summary()}"
            lines += textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent=" " * 24)
    parser = argparse.ArgumentParser(
        prog="stunet",
        usage="stunet [-h] [--version] COMMAND ...",
        description="\n".join(lines),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stunet-plugin {__version__}")
    return parser
