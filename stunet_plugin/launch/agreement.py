"""What the processes of one training have to have in common, compared before any of them writes.

Where they differ a training does not fail but wait for ever, or go wrong unseen: a process that
    finds no checkpoint to continue
from, because its results folder is another one, starts anew beside one that goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
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

PATIENCE_SECONDS = 30.0
"""For a new file to be seen from the other machines: network file systems remember for a while what
was in a folder."""


def check_agreement(options: argparse.Namespace) -> None:
    """Raise unless all processes were started alike. Every process has to call this, and all raise
    the same.

    Args:
        options: of the launcher.

    Raises:
        PluginError: two of them have other arguments, options, plans or software.
    """
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, (socket.gethostname(), facts(options)))
    difference = first_difference(everyone)
    if difference is not None:
        raise PluginError(
            f"The processes were not started alike: {difference}. All need the same arguments,"
            " STUNET_* variables, plans and versions."
        )


def facts(options: argparse.Namespace) -> dict[str, str]:
    """Return what has to be the same in every process, by the name that a user knows it by."""
    found = {f"the argument {name}": str(value) for name, value in vars(options).items()}
    found |= {option.variable: os.environ.get(option.variable, "not set") for option in OPTIONS}
    found |= {
        "stunet-plugin": __version__,
        "nnunetv2": host_version(),
        "torch": torch.__version__.partition("+")[0],
    }
    found["nnUNet_results"] = "set" if nnUNet_results.is_set() else "not set"
    dataset = options.dataset_name_or_id
    # What is wrong with the name of a dataset nnU-Net says itself, when all processes have it.
    with suppress(RuntimeError):
        dataset = maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset)
    folder = Path(nnUNet_preprocessed.get() or "", dataset)
    names = [
        f"{options.p}.json",
        "dataset.json",
        *(["splits_final.json"] if options.fold != "all" else []),
    ]
    for file in (folder / name for name in names):
        found[file.name] = (
            hashlib.sha256(file.read_bytes()).hexdigest()[:8] if file.is_file() else "missing"
        )
    if options.pretrained_weights is not None:
        weights = Path(options.pretrained_weights)
        # Reading all of it takes minutes for the large sizes.
        found["the file of -pretrained_weights"] = (
            f"{weights.stat().st_size} bytes" if weights.is_file() else "missing"
        )
    return found


def first_difference(everyone: Sequence[tuple[str, dict[str, str]]]) -> str | None:
    """Return what is the first thing that two processes differ in, or None.

    Args:
        everyone: machine and facts of each process.
    """
    (machine, expected), *others = everyone
    for rank, (other_machine, found) in enumerate(others, 1):
        for name in {**expected, **found}:
            here, there = expected.get(name, "not set"), found.get(name, "not set")
            if here != there:
                return (
                    f"{name} is {here} in process 0 on {machine}, {there} in process {rank} on"
                    f" {other_machine}"
                )
    return None


def check_results_are_shared() -> None:
    """Raise unless every process sees what the first one writes to its results folder. Every
    process has to call this.

    Raises:
        PluginError: one does not; all raise the same.
    """
    results = Path(nnUNet_results)
    names = [""]
    if distributed.get_rank() == 0:
        # Where it cannot be written the trainer says so.
        with suppress(OSError):
            results.mkdir(parents=True, exist_ok=True)
            descriptor, path = tempfile.mkstemp(prefix=".stunet_plugin_", dir=results)
            os.close(descriptor)
            names = [Path(path).name]
    try:
        distributed.broadcast_object_list(names)
        if not names[0]:
            return
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(
            everyone, (_appears(results / names[0]), socket.gethostname(), str(results))
        )
    finally:
        if distributed.get_rank() == 0 and names[0]:
            (results / names[0]).unlink(missing_ok=True)
    first = everyone[0]
    for rank, (seen, machine, folder) in enumerate(everyone):
        if not seen:
            raise PluginError(
                f"nnUNet_results is not shared: process {rank} on {machine} does not see in its"
                f" {folder} what process 0 on {first[1]} writes to its {first[2]}. Set"
                " nnUNet_results to one folder, on a file system that all machines share."
            )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
