"""Needs of a training on a dataset, against what the machine has: memory of the worker processes
and of the export, shared memory, a compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch

from stunet_plugin.errors import setting
from stunet_plugin.utils.findings import OK, WARNING, WRONG, Finding
from stunet_plugin.utils.memory import GIGABYTE, free_memory

PROCESS = 0.6 * GIGABYTE
"""A worker process of nnU-Net, with torch imported."""
EXPORT_COPIES = 2
"""float32 values per voxel and output when a prediction is resampled to its image."""
IMAGE_COPIES = 4
"""float32 copies of an image while it is preprocessed."""
BATCHES_PER_WORKER = 2
"""In shared memory: one that is filled, one that waits."""
SHARED_MEMORY = Path("/dev/shm")
COMPILERS = ("gcc", "cc", "clang")


def check_machine(
    largest: int, channels: int, outputs: int, patch: Sequence[int], batch: int
) -> Iterator[Finding]:
    """Yield what is found.

    Args:
        largest: voxels of the largest image.
        channels, outputs: of the network.
        patch, batch: of the training, in voxels and samples.
    """
    yield _memory(largest, channels, outputs)
    yield _shared_memory(prod(patch) * batch * (channels + 1) * 4)
    yield _compiler()


def _memory(largest: int, channels: int, outputs: int) -> Finding:
    """Of the export of predictions in the validation, which is what takes most, and of
    preprocessing."""
    from nnunetv2.configuration import default_num_processes

    what, free = "memory", free_memory()
    export = EXPORT_COPIES * outputs * largest * 4
    each = PROCESS + max(export, IMAGE_COPIES * channels * largest * 4)
    text = (
        f"{default_num_processes} processes of preprocessing and export take up to"
        f" {each / GIGABYTE:.1f} GB each"
    )
    if free is None:
        return Finding(OK, what, text)
    text += f", {free / GIGABYTE:.1f} GB are free"
    fits = int(free // each)
    if fits >= default_num_processes:
        return Finding(OK, what, text)
    if not fits:
        advice = "Not even one fits: crop the largest images, or take a machine with more memory."
        return Finding(WRONG, what, text, advice)
    line = setting("nnUNet_def_n_proc", str(fits))
    advice = f"Run: {line}; -np {fits} for nnUNetv2_plan_and_preprocess."
    return Finding(WARNING, what, text, advice)


def _shared_memory(sample: int) -> Finding:
    """Batches go from the processes of augmentation to the training through /dev/shm."""
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    what = "shared memory"
    if not SHARED_MEMORY.is_dir():
        return Finding(OK, what, f"no {SHARED_MEMORY} on this system")
    workers = get_allowed_n_proc_DA()
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, workers * BATCHES_PER_WORKER * sample
    state = (
        f"{workers} processes of augmentation take up to {needed / GIGABYTE:.2f} GB of"
        f" {SHARED_MEMORY}, {free / GIGABYTE:.2f} GB are free"
    )
    if needed <= free:
        return Finding(OK, what, state)
    advice = f"In docker: --ipc=host or --shm-size=16g. Else: {setting('nnUNet_n_proc_DA', '2')}"
    return Finding(WARNING, what, state, advice)


def _compiler() -> Finding:
    """torch.compile, which nnU-Net uses on GPUs unless told otherwise, builds C code."""
    what = "compiler"
    asked = os.environ.get("nnUNet_compile", "true").lower() in ("true", "1", "t")
    if not asked or os.name == "nt" or not torch.cuda.is_available():
        return Finding(OK, what, "not needed: torch.compile is for CUDA, unless nnUNet_compile=f")
    names = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found:
        return Finding(OK, what, found)
    advice = "Run: apt-get install gcc; or, for a slower training: export nnUNet_compile=f"
    return Finding(WRONG, what, f"none of {', '.join(names)}, which torch.compile needs", advice)
