"""``stunet doctor``: what is installed and registered, and what to do about what is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.registration import find_host, host_version, registered, trainers_folder
from stunet_plugin.options import Options

FOLDERS = {
    "nnUNet_raw": "data sets",
    "nnUNet_preprocessed": "preprocessed data and plans",
    "nnUNet_results": "trained models",
}
PROCESSES = {
    "nnUNet_def_n_proc": ("processes of validation after training and of evaluation", 1),
    "nnUNet_n_proc_DA": ("processes of augmentation in training", 0),
}
"""nnU-Net's variables for numbers of processes: of what, and the least that it takes."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: the thing examined.
        state: what was found.
        advice: what to do, empty where nothing is wrong.
        may_be_meant: the advice is a warning: what was found serves some purposes.
    """

    what: str
    state: str
    advice: str = ""
    may_be_meant: bool = False

    @property
    def mark(self) -> str:
        return "ok" if not self.advice else "! " if self.may_be_meant else "!!"


def examine() -> int:
    """Print the report; return 0 if nothing is wrong, else 1."""
    wrong = 0
    for finding in findings():
        print(f"[{finding.mark}] {finding.what}: {finding.state}")
        if finding.advice:
            wrong += not finding.may_be_meant
            print(f"     {finding.advice}")
    print(f"\n{wrong} thing(s) to mend." if wrong else "\nEverything is in place.")
    return 1 if wrong else 0


def findings() -> Iterator[Finding]:
    """Examine versions, the host, the GPU and the environment, one finding after the other."""
    yield Finding("stunet-plugin", f"{__version__}, Python {platform.python_version()}")
    yield from _host()
    yield from _libraries()
    yield from _gpu()
    yield from _environment()


def _host() -> Iterator[Finding]:
    try:
        host = find_host()
    except PluginError as error:
        yield Finding("nnunetv2", host_version(), str(error))
        return
    yield Finding("nnunetv2", f"{host_version()} in {host}")
    states = registered(host)
    external = [
        Path(path) for path in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if path
    ]
    for what, state in states.items():
        if state == "registered":
            yield Finding(what, state)
        elif what == "trainers" and any(
            path.resolve() == trainers_folder().resolve() for path in external
        ):
            yield Finding(what, f"{state}, but found through nnUNet_extTrainer")
        elif what == "planners" and external and states["trainers"] != "registered":
            # Whoever goes without registration plans with `stunet plan`.
            yield Finding(what, f"{state}; use `stunet plan` instead of nnUNetv2_plan_experiment")
        else:
            yield Finding(what, state, "Run: stunet register")
    yield from _lookup()


def _lookup() -> Iterator[Finding]:
    """Ask nnU-Net itself for a trainer, as its commands do."""
    import contextlib
    import io
    import warnings

    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    name = "STUNetTrainer_base"
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # nnU-Net imports all its trainers on the way, and some of their libraries complain.
            warnings.simplefilter("ignore")
            trainer = recursive_find_trainer_class_by_name(name)
    except Exception as error:
        yield Finding(
            "look-up",
            f"nnU-Net does not find {name} ({type(error).__name__})",
            "Run: stunet register",
        )
        return
    yield Finding("look-up", f"nnU-Net finds {name} in {trainer.__module__}")


def _libraries() -> Iterator[Finding]:
    for package in ("torch", "dynamic-network-architectures", "batchgeneratorsv2", "torchvision"):
        try:
            yield Finding(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "not installed", f"Run: pip install {package}")


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "GPU", "none that torch can use; add -device cpu to nnU-Net's commands (slow)"
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("GPU", f"{properties.name}, {properties.total_memory / 1024**3:.0f} GB")


def _environment() -> Iterator[Finding]:
    for variable, content in FOLDERS.items():
        value = os.environ.get(variable)
        if not value:
            yield Finding(
                variable, "not set", f"Run: export {variable}=/path/to/{variable}    # {content}"
            )
        elif not Path(value).is_dir():
            yield Finding(variable, f"{value} (no such folder)", f"Run: mkdir -p {value}")
        elif not os.access(value, os.W_OK):
            yield Finding(
                variable,
                f"{value} (not writable)",
                f"Make {value} writable, or set {variable} to another folder.",
            )
        else:
            yield Finding(variable, value)
    yield from _processes()
    try:
        lines = Options().lines()
    except PluginError as error:
        yield Finding("options", "invalid", str(error))
        return
    for line in lines:
        yield Finding("option", line)


def _processes() -> Iterator[Finding]:
    for variable, (purpose, least) in PROCESSES.items():
        value = os.environ.get(variable)
        if value is None:
            continue
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            yield Finding(
                variable,
                f"{value!r} is no number of processes",
                f"Set it to {least} or more, or unset it: {purpose}.",
            )
        elif variable == "nnUNet_n_proc_DA" and number == 0:
            advice = (
                "nnUNetv2_plan_and_preprocess and nnUNetv2_plan_experiment stop with it: set 1 or"
                " more for them."
            )
            yield Finding(variable, value, advice, may_be_meant=True)
        else:
            yield Finding(variable, f"{value}, {purpose}")
