"""Checks of the installation: what is installed and registered, and how to fix what is wrong."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import shlex
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError, setting
from stunet_plugin.nnunet.commands import NAMELESS
from stunet_plugin.nnunet.names import EXTERNAL, PREPROCESSED, RAW, RESULTS
from stunet_plugin.nnunet.registration import find_host, host_version, registered, trainers_folder
from stunet_plugin.nnunet.registry import HINT
from stunet_plugin.options import Options
from stunet_plugin.utils.findings import OK, WARNING, WRONG, Finding, report

FOLDERS = {RAW: "datasets", PREPROCESSED: "preprocessed data and plans", RESULTS: "trained models"}
PROCESSES = {
    "nnUNet_def_n_proc": ("processes of validation after training and of evaluation", 1),
    "nnUNet_n_proc_DA": ("processes of augmentation in training", 0),
}
"""nnU-Net's variables for numbers of processes: of what, and the least that it takes."""
LIBRARIES = ("torch", "dynamic-network-architectures", "batchgeneratorsv2", "torchvision")


def examine(trainer: str, as_json: bool = False) -> int:
    """Print the report; return 0 if nothing is wrong, else 1."""
    return report(findings(trainer), as_json, "Everything is in place.")


def findings(trainer: str) -> Iterator[Finding]:
    """Examine versions, registration, libraries, GPU, user and environment, one after the other."""
    yield Finding(OK, "stunet-plugin", f"{__version__}, Python {platform.python_version()}")
    try:
        host = find_host()
    except PluginError as error:
        yield Finding(WRONG, "nnunetv2", host_version(), str(error))
    else:
        yield Finding(OK, "nnunetv2", f"{host_version()} in {host}")
        yield from _registration(host)
        yield _lookup(trainer)
    for package in LIBRARIES:
        try:
            yield Finding(OK, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(WRONG, package, "not installed", f"Run: pip install {package}")
    yield from _gpus()
    yield from _user()
    yield from (_folder(name, os.environ.get(name, "")) for name in FOLDERS)
    if external := os.environ.get(EXTERNAL):
        yield _folder(EXTERNAL, external)
    yield from (_processes(name, os.environ[name]) for name in PROCESSES if name in os.environ)
    try:
        yield from (Finding(OK, "option", line) for line in Options().lines())
    except PluginError as error:
        yield Finding(WRONG, "options", "invalid", str(error))


def _registration(host: Path) -> Iterator[Finding]:
    try:
        states = registered(host)
    except PluginError as error:
        yield Finding(WRONG, "registration", "in the way of another file", str(error))
        return
    external = [Path(path) for path in os.environ.get(EXTERNAL, "").split(os.pathsep) if path]
    found = any(path.resolve() == trainers_folder().resolve() for path in external)
    for what, state in states.items():
        if state == "registered":
            yield Finding(OK, what, state)
        elif what == "trainers" and found:
            yield Finding(OK, what, f"{state}, but found through {EXTERNAL}")
        elif what == "planners" and external and states["trainers"] != "registered":
            instead = "use `stunet plan` instead of nnUNetv2_plan_experiment"
            yield Finding(OK, what, f"{state}; {instead}")
        else:
            yield Finding(WRONG, what, state, "Run: stunet register")


def _lookup(name: str) -> Finding:
    """Ask nnU-Net itself for a trainer, as its commands do."""
    said = io.StringIO()
    try:
        with redirect_stdout(None), redirect_stderr(said), warnings.catch_warnings():
            # nnU-Net imports all its trainers on the way, and some of their libraries complain.
            warnings.simplefilter("ignore")
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            module = recursive_find_trainer_class_by_name(name).__module__
    except Exception as error:
        state = f"nnU-Net does not find {name} ({type(error).__name__})"
        # Where nnU-Net sees our trainers, they have answered a name that is nearly right.
        hints = [line for line in said.getvalue().splitlines() if line.startswith(HINT)]
        advice = "Ours: stunet list --trainers. Not registered? Run: stunet register"
        return Finding(WRONG, "look-up", state, hints[-1] if hints else advice)
    return Finding(OK, "look-up", f"nnU-Net finds {name} in {module}")


def _gpus() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(OK, "GPU", f"{gpu.name}, {gpu.total_memory / 1024**3:.0f} GB")
    if torch.backends.mps.is_available():
        yield Finding(OK, "GPU", "Apple's; add -device mps to nnU-Net's commands")
    elif not torch.cuda.is_available():
        state = "none that torch can use; add -device cpu to nnU-Net's commands (slow)"
        yield Finding(OK, "GPU", state)


def _user() -> Iterator[Finding]:
    """A user id without a name (docker --user), at which torch's compiler and others fail."""
    if os.environ.get("USER") == NAMELESS:
        state = "this user id has no name, so nnU-Net's commands can fail at an import"
        advice = "Run: export USER=nnunet    # in docker: -e USER=nnunet"
        yield Finding(WRONG, "user", state, advice)
    home = os.path.expanduser("~")
    if not os.access(home, os.W_OK):
        advice = "torch and matplotlib keep caches there. Set HOME to a folder that can be written."
        yield Finding(WARNING, "HOME", f"{home} cannot be written", advice)


def _folder(variable: str, value: str) -> Finding:
    wrong = partial(Finding, WRONG, variable)

    def run(value: str) -> str:
        return f"Run: {setting(variable, value)}"

    if not value:
        return wrong("not set", f"{run(f'/path/to/{variable}')}    # {FOLDERS[variable]}")
    meant = value.strip().strip("'\"").strip()
    if meant != value or meant.startswith("~"):
        meant = str(Path(meant).expanduser())
        state = f"{value!r} holds a ~, quotes or blanks, which nnU-Net takes as part of the name"
        return wrong(state, run(meant if os.name == "nt" else shlex.quote(meant)))
    external = variable == EXTERNAL
    for folder in value.split(os.pathsep) if external else [value]:
        if not Path(folder).is_dir():
            make = f"Run: mkdir -p {shlex.quote(os.path.abspath(folder))}"
            advice = run("$(stunet path trainers)") if external else make
            return wrong(f"{folder} (no such folder)", advice)
    if not external and not os.access(value, os.W_OK):
        advice = f"Make it writable, or set {variable} to another folder."
        return wrong(f"{value} (not writable)", advice)
    return Finding(OK, variable, value)


def _processes(variable: str, value: str) -> Finding:
    purpose, least = PROCESSES[variable]
    number = int(value) if value.strip().isdecimal() else -1
    if number < least:
        advice = f"Set it to {least} or more, or unset it: {purpose}."
        return Finding(WRONG, variable, f"{value!r} is no number of processes", advice)
    if number == 0:
        advice = "nnU-Net's planners stop with it: set 1 or more for them."
        return Finding(WARNING, variable, value, advice)
    return Finding(OK, variable, f"{value}, {purpose}")
