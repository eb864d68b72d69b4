"""nnU-Net's commands: where they are, what they need of the environment, how they are ended."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

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
