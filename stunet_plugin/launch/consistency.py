"""Consistency of the processes of one training, checked before any of them writes.

Where they differ a training waits for ever, or goes wrong silently: a process that finds no
checkpoint to continue from, because its results folder is another, would start from scratch.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch import distributed

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.options import OPTIONS
from stunet_plugin.utils.files import sha256_of

PATIENCE_SECONDS = 30.0
"""For a new file to be seen from other machines: network file systems cache folders."""


def check_consistency(options: argparse.Namespace) -> None:
    """Raise in every process unless all were started alike: arguments, options, plans, software."""
    difference = first_difference(_gather((socket.gethostname(), settings_of(options))))
    if difference is not None:
        raise PluginError(
            f"The processes were not started alike: {difference}. All need the same arguments,"
            " STUNET_* variables, plans and versions."
        )


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """Return what must be the same in every process, by the name that users know."""
    found = {f"the argument {name}": str(value) for name, value in vars(options).items()}
    found |= {option.variable: os.environ.get(option.variable, "not set") for option in OPTIONS}
    found |= {
        "stunet-plugin": __version__,
        "nnunetv2": host_version(),
        "torch": torch.__version__.partition("+")[0],
        "nnUNet_results": "set" if nnUNet_results.is_set() else "not set",
    }
    dataset = options.dataset_name_or_id
    # nnU-Net itself says what is wrong with a dataset's name.
    with suppress(RuntimeError):
        dataset = maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset)
    names = [f"{options.p}.json", "dataset.json"]
    names += ["splits_final.json"] if options.fold != "all" else []
    for file in (Path(nnUNet_preprocessed.get() or "", dataset, name) for name in names):
        found[file.name] = sha256_of(file)[:8] if file.is_file() else "missing"
    if options.pretrained_weights is not None:
        weights = Path(options.pretrained_weights)
        # Reading all of it takes minutes for the large sizes.
        size = f"{weights.stat().st_size} bytes" if weights.is_file() else "missing"
        found["the file of -pretrained_weights"] = size
    return found


def first_difference(everyone: Sequence[tuple[str, dict[str, str]]]) -> str | None:
    """Return the first difference between two processes, each given as (machine, settings)."""
    (machine, expected), *others = everyone
    for rank, (other_machine, found) in enumerate(others, 1):
        for name in {**expected, **found}:
            here, there = expected.get(name, "not set"), found.get(name, "not set")
            if here != there:
                first, other = f"process 0 on {machine}", f"process {rank} on {other_machine}"
                return f"{name} is {here} in {first}, {there} in {other}"
    return None


def check_results_are_shared() -> None:
    """Raise in every process unless all see what the first writes to its results folder."""
    results, names = Path(nnUNet_results), [""]
    with ExitStack() as until_seen:
        # If it cannot be written the trainer says so.
        with suppress(OSError):
            if distributed.get_rank() == 0:
                results.mkdir(parents=True, exist_ok=True)
                file = until_seen.enter_context(tempfile.NamedTemporaryFile(dir=results))
                names = [Path(file.name).name]
        distributed.broadcast_object_list(names)
        if not names[0]:
            return
        everyone = _gather((_appears(results / names[0]), socket.gethostname(), str(results)))
    (_, first_machine, first_folder), *_ = everyone
    for rank, (seen, machine, folder) in enumerate(everyone):
        if not seen:
            raise PluginError(
                f"nnUNet_results is not shared: process {rank} on {machine} does not see in its"
                f" {folder} what process 0 on {first_machine} writes to its {first_folder}. Set"
                " nnUNet_results to one folder on a shared file system."
            )


def _gather(own: Any) -> list[Any]:
    """Return what each process has."""
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return everyone


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
