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
from pathlib import Path
from typing import NamedTuple

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import write_atomically

MINIMUM_NNUNET = (2, 8)
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
    """Return the folder of the ``nnunetv2`` package that this Python imports.

    Raises:
        PluginError: nnunetv2 is not installed, or older than 2.8.
    """
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(
            "nnunetv2 is not installed for this Python. Install it: pip install 'nnunetv2>=2.8'"
        )
    check_version(host_version())
    return Path(next(iter(spec.submodule_search_locations)))


def host_version() -> str:
    """Return the installed version of nnunetv2 (``unknown`` where it carries no metadata)."""
    try:
        return importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_version(version: str) -> None:
    """Raise if this nnunetv2 is older than the plugin needs."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers and numbers < MINIMUM_NNUNET:
        needed = ".".join(map(str, MINIMUM_NNUNET))
        raise PluginError(
            f"nnunetv2 {version} is installed, but stunet-plugin needs {needed} or newer. Run:"
            f" pip install --upgrade 'nnunetv2>={needed}'"
        )


def register() -> list[str]:
    """Write the bridges; return one line per bridge on what was done.

    Raises:
        PluginError: a folder cannot be written, or a file that is not ours is there. Nothing is
            left half-written, and no bridge is left without the other.
    """
    host = find_host()
    lines: list[str] = []
    written: list[Path] = []
    states = registered(host)
    for bridge in BRIDGES:
        path = bridge.path(host)
        if states[bridge.what] == "registered":
            lines.append(f"{bridge.what}: already registered in {path}")
            continue
        try:
            write_atomically(path, bridge.text())
        except OSError as error:
            for done in written:
                done.unlink(missing_ok=True)
            raise PluginError(without_registration(path.parent, error)) from error
        written.append(path)
        lines.append(f"{bridge.what}: registered in {path}")
    return lines


def unregister() -> list[str]:
    """Remove the bridges; return one line per bridge on what was done.

    Raises:
        PluginError: one cannot be removed, or is not ours.
    """
    host = find_host()
    states = registered(host)
    lines = []
    for bridge in BRIDGES:
        path = bridge.path(host)
        if states[bridge.what] == "not registered":
            lines.append(f"{bridge.what}: not registered, nothing to do")
            continue
        try:
            path.unlink()
        except OSError as error:
            raise PluginError(
                f"Cannot remove {path} ({error.strerror}). Ask whoever may write there to do it."
            ) from error
        lines.append(f"{bridge.what}: removed {path}")
    return lines


def registered(host: Path) -> dict[str, str]:
    """Return the state of each bridge: ``registered``, ``out of date`` or ``not registered``.

    Raises:
        PluginError: a file of a bridge's name is not ours.
    """
    states = {}
    for bridge in BRIDGES:
        path = bridge.path(host)
        text = path.read_text(errors="replace") if path.is_file() else None
        if os.path.lexists(path) and MARKER not in (text or ""):
            raise PluginError(
                f"{path} is there, but `stunet register` did not write it. Move it away and try"
                " again."
            )
        current = "registered" if text == bridge.text() else "out of date"
        states[bridge.what] = current if text is not None else "not registered"
    return states


def trainers_folder() -> Path:
    """Return the folder for ``nnUNet_extTrainer``."""
    return _package_folder("stunet_plugin.trainers")


def plans_folder() -> Path:
    """Return the folder of the planners."""
    return _package_folder("stunet_plugin.plans")


def without_registration(folder: Path, error: OSError) -> str:
    """Say how to use the plugin where ``nnunetv2`` cannot be written."""
    return (
        f"Cannot write to {folder} ({error.strerror}). The plugin works without registration too:\n"
        "  export nnUNet_extTrainer=$(stunet path trainers)    # then nnUNetv2_train ... -tr"
        " STUNetTrainer_base\n"
        "  stunet plan -d DATASET_ID -pl STUNetPlanner_base    # then nnUNetv2_preprocess"
        " -plans_name STUNetPlans_base"
    )


def _package_folder(package: str) -> Path:
    # Only the parent is imported (light); the package itself would import torch.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(
            f"{package} is not installed. Install the plugin: pip install stunet-plugin"
        )
    return Path(next(iter(spec.submodule_search_locations)))
