"""Registration: a bridge module in each of two folders of ``nnunetv2`` finds our classes.

nnU-Net 2.8 looks for trainers in its own tree and in ``nnUNet_extTrainer``, for planners in its own
tree alone, and has no entry points. A bridge imports our classes, and does nothing without the
plugin. Nothing of nnU-Net is changed. This module imports neither torch nor nnunetv2.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import stunet_plugin
from stunet_plugin.errors import PluginError, setting
from stunet_plugin.nnunet.names import EXTERNAL
from stunet_plugin.utils.files import write_atomically

BRIDGE_NAME = "stunet_plugin_bridge.py"
MARKER, REMOVAL = "Written by `stunet register`", "Remove with `stunet unregister`."

_BRIDGE = '''"""{marker}: lets nnU-Net find the {what} of stunet-plugin. {removal}

Does nothing once stunet-plugin is uninstalled.
"""

try:
    from {module} import *
    from {module} import __getattr__
except ModuleNotFoundError as error:
    # Only our own absence is fine; anything else that is missing is worth a traceback.
    if (error.name or "").partition(".")[0] != "stunet_plugin":
        raise
'''

_INSTEAD = f"""The plugin works without registration too:
  {setting("nnUNet_extTrainer", "$(stunet path trainers)")}    # finds trainers
  stunet plan -d ID -pl STUNetPlanner_base    # plans, for nnUNetv2_preprocess -plans_name"""


class Bridge(NamedTuple):
    """What it makes findable, the module it imports, and its folder below ``nnunetv2``."""

    what: str
    module: str
    folder: str

    def path(self, host: Path) -> Path:
        return host / self.folder / BRIDGE_NAME

    def text(self) -> str:
        return _BRIDGE.format(marker=MARKER, removal=REMOVAL, what=self.what, module=self.module)


BRIDGES = (
    Bridge("trainers", "stunet_plugin.trainers", "training/nnUNetTrainer"),
    Bridge("planners", "stunet_plugin.plans", "experiment_planning/experiment_planners"),
)


def find_host() -> Path:
    """Return the folder of the ``nnunetv2`` that this Python imports; raise if it is below 2.8."""
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        raise PluginError("nnunetv2 is not installed. Run: pip install 'nnunetv2>=2.8'")
    version = host_version()
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers and numbers < (2, 8):
        advice = "Run: pip install --upgrade 'nnunetv2>=2.8'"
        raise PluginError(f"nnunetv2 {version} is installed, older than 2.8. {advice}")
    return Path(next(iter(spec.submodule_search_locations)))


def host_version() -> str:
    """Return the installed version of nnunetv2 (``unknown`` where it carries no metadata)."""
    try:
        return importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def register(_: object) -> int:
    """Write the bridges, all or none, and print what was done; return 0."""
    host, lines = find_host(), []
    with ExitStack() as undo:
        for bridge, state in zip(BRIDGES, registered(host).values(), strict=True):
            path = bridge.path(host)
            if state == "registered":
                lines.append(f"{bridge.what}: already registered in {path}")
                continue
            try:
                write_atomically(path, bridge.text())
            except OSError as error:
                told = f"Cannot write to {path.parent} ({error.strerror})"
                raise PluginError(f"{told}. {_INSTEAD}") from error
            undo.callback(path.unlink, missing_ok=True)
            lines.append(f"{bridge.what}: registered in {path}")
        undo.pop_all()
    print("\n".join([*lines, "Check with: stunet doctor"]))
    return 0


def unregister(_: object) -> int:
    """Remove the bridges, and print what was done; return 0."""
    host = find_host()
    for bridge, state in zip(BRIDGES, registered(host).values(), strict=True):
        path = bridge.path(host)
        if state == "not registered":
            print(f"{bridge.what}: not registered, nothing to do")
            continue
        try:
            path.unlink()
        except OSError as error:
            told = f"Cannot remove {path} ({error.strerror})"
            raise PluginError(f"{told}. Ask whoever may write there.") from error
        print(f"{bridge.what}: removed {path}")
    return 0


def registered(host: Path) -> dict[str, str]:
    """Return the state of each bridge: ``registered``, ``out of date`` or ``not registered``; raise
    if a file of its name is not ours."""
    states = {}
    for bridge in BRIDGES:
        path = bridge.path(host)
        text = path.read_text(errors="replace") if path.is_file() else ""
        if os.path.lexists(path) and MARKER not in text:
            raise PluginError(f"{path}: `stunet register` did not write it. Move it away.")
        current = "registered" if text == bridge.text() else "out of date"
        states[bridge.what] = current if text else "not registered"
    return states


def trainers_folder() -> Path:
    """Return the folder for ``nnUNet_extTrainer``."""
    return package_folder("trainers")


def missing_variables() -> dict[str, str]:
    """Return what to set so that stock commands find our trainers; nothing if they do already."""
    known = os.environ.get(EXTERNAL) or "registered" in registered(find_host()).values()
    return {} if known else {EXTERNAL: str(trainers_folder())}


def package_folder(name: str) -> Path:
    """Return the folder of ``stunet_plugin.trainers`` or ``.plans``, which would import torch."""
    return next(path for base in stunet_plugin.__path__ if (path := Path(base, name)).is_dir())
