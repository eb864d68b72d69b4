"""nnU-Net's commands: where they are, and what they need of the environment."""

from __future__ import annotations

import getpass
import os
import shutil
import sys
from pathlib import Path

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
