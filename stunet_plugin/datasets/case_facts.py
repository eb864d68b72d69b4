"""Facts about the files of a dataset: geometry of all of them, voxels of as many as there is time
for."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import SimpleITK as sitk

from stunet_plugin.datasets.raw_dataset import Case
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.geometry import Grid
from stunet_plugin.utils.images import read_geometry, read_image, read_label_map
from stunet_plugin.utils.label_systems import MAX_VALUE
from stunet_plugin.utils.workers import run_ordered

T = TypeVar("T")
LABELS_PER_IMAGE = 3
"""While time lasts."""


class Voxels(NamedTuple):
    """What the voxels of a file are like: how many have each value (of a label map), the least, the
    greatest and the standard deviation (of an image), and a hash of an image."""

    hash: str
    counts: dict[int, int]
    low: float = 0.0
    high: float = 0.0
    deviation: float = 0.0


@dataclass
class Facts:
    """What is known of a dataset's files: grids by file, voxels of those that were read, and what
    is wrong with those that cannot be."""

    cases: Sequence[Case]
    tests: Sequence[tuple[Path, ...]] = ()
    grids: dict[Path, Grid] = field(default_factory=dict)
    voxels: dict[Path, Voxels] = field(default_factory=dict)
    problems: dict[Path, str] = field(default_factory=dict)

    @property
    def sound(self) -> list[Case]:
        """The cases of which all headers can be read."""
        return [x for x in self.cases if all(file in self.grids for file in (*x.images, x.label))]


class FileTask(NamedTuple):
    path: Path
    is_label_map: bool


def gather(
    cases: Sequence[Case], tests: Sequence[tuple[Path, ...]], processes: int, seconds: float
) -> Facts:
    """Read the headers of all files, and voxels until the time is over: of cases that are far
    apart in the list before those of their neighbours."""
    facts = Facts(cases, tests)
    end = time.monotonic() + seconds
    for file in [file for case in cases for file in (*case.images, case.label)]:
        try:
            facts.grids[file] = read_geometry(file)
        except PluginError as error:
            facts.problems[file] = str(error)
    images = spread([file for case in cases for file in case.images])
    # Label maps are read sooner, and there is more to find in them.
    places = {FileTask(x.label, True): n for n, x in enumerate(spread(cases))}
    places |= {FileTask(x, False): n * LABELS_PER_IMAGE for n, x in enumerate(images)}
    tasks = sorted(places, key=lambda task: places[task])
    tasks += [FileTask(file, False) for files in tests for file in files]
    in_time = (x for x in tasks if x.path not in facts.problems and time.monotonic() < end)
    for task, found in _look_at_all(in_time, processes):
        if isinstance(found, Voxels):
            facts.voxels[task.path] = found
        else:
            facts.problems[task.path] = found
    return facts


def spread(items: Sequence[T]) -> list[T]:
    """Return items in an order of which every beginning is spread over the list."""
    order: list[int] = []
    step = 1 << len(items).bit_length()
    while step:
        order += range(0, len(items), step)
        step //= 2
    return [items[index] for index in dict.fromkeys(order)]


def _look_at_all(
    tasks: Iterator[FileTask], processes: int
) -> Iterator[tuple[FileTask, Voxels | str]]:
    if processes <= 1:
        yield from ((task, look_at(task)) for task in tasks)
        return
    for finished in run_ordered(tasks, look_at, processes):
        yield finished.task, finished.value or f"{finished.task.path}: {finished.failure}"


def look_at(task: FileTask) -> Voxels | str:
    """Return what the voxels of a file are like, or what is wrong with it."""
    try:
        image = (read_label_map if task.is_label_map else read_image)(task.path)
    except PluginError as error:
        return str(error)
    array = np.ascontiguousarray(sitk.GetArrayViewFromImage(image))
    if task.is_label_map:
        if array.min() >= 0 and array.max() <= MAX_VALUE:
            counts = np.bincount(array.ravel())  # five times as quick as a search for values
            return Voxels("", {int(x): int(counts[x]) for x in np.flatnonzero(counts)})
        values, counts = np.unique(array, return_counts=True)
        return Voxels("", dict(zip(values.tolist(), counts.tolist(), strict=True)))
    digest = hashlib.sha256(str(array.shape).encode())
    # The same voxels in another type are the same image.
    digest.update(array.astype(np.float32, copy=False).data)
    numbers = float(array.min()), float(array.max()), float(array.std(dtype=np.float64))
    return Voxels(digest.hexdigest(), {}, *numbers)
