"""nnU-Net's commands: where they are, what they need of the environment, how they run and end."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT, UNFINISHED_CHECKPOINTS

NAMELESS = "user_without_a_name"
SECONDS_TO_END = 10.0
"""For a command that Ctrl-C has reached."""


class CommandFailedError(Exception):
    """A command ended with an error, which it has told itself."""


def name_user() -> None:
    """Give a user id without a name (docker --user) one, for torch's compiler caches and others."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = NAMELESS


def find_command(name: str) -> str:
    """Return the path of a command: beside this Python, else on the PATH."""
    # `which` knows the endings of programs (.exe); on Windows scripts are in a folder of their own.
    beside = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    found = shutil.which(name, path=beside) or shutil.which(name)
    if found is None:
        where = f"neither beside {sys.executable} nor on the PATH"
        raise PluginError(f"The command {name} is {where}. Reinstall nnunetv2.")
    return found


def end_command(process: subprocess.Popen[Any], wait: float = 10.0) -> None:
    """End a command with the workers that it started, at the latest after so many seconds. It must
    have been started with ``start_new_session=True``, which Windows ignores."""
    if sys.platform == "win32":
        tree = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(tree, capture_output=True, check=False)
        process.wait()
        return
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def run_command(
    command: Sequence[str], environment: Mapping[str, str], log: Path | None = None
) -> None:
    """Run a command, its output among ours or at the end of a log; Ctrl-C reaches it as well.

    Raises:
        CommandFailedError: it ended with an error.
    """
    variables = dict(environment)
    if command[0] != "nnUNetv2_train" and variables.get("nnUNet_n_proc_DA") == "0":
        # Good for a training; nnU-Net's planners stop at it.
        variables["nnUNet_n_proc_DA"] = "1"
    with contextlib.ExitStack() as stack:
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(log.open("a", encoding="utf-8"))
        process = subprocess.Popen(
            [find_command(command[0]), *command[1:]],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            code = process.wait()
        except BaseException:
            try:
                process.wait(timeout=SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
            raise
    if code != 0:
        where = f"in {log}" if log else "above"
        raise CommandFailedError(
            f"{command[0]} ended with exit code {code}; what it says is {where}."
        )


def what_is_left(fold: Path, weights: Path | None = None) -> list[str]:
    """Return the options of ``nnUNetv2_train`` that do what is left of a training that is not
    complete (:func:`is_complete`): only validate, resume, or begin."""
    if (fold / CHECKPOINT).is_file():
        return ["--val"]
    if any((fold / name).is_file() for name in UNFINISHED_CHECKPOINTS):
        return ["--c"]
    return ["-pretrained_weights", str(weights)] if weights else []


def is_complete(fold: Path, score: str = "summary.json") -> bool:
    """Return whether a training is done and its validation has written its scores."""
    return (fold / CHECKPOINT).is_file() and (fold / "validation" / score).is_file()
