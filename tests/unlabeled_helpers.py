"""Small scans, good and bad, for the tests of `stunet unlabeled`."""

from __future__ import annotations

import csv
import json
import locale
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from dataset_helpers import write_array

SHAPE = (14, 24, 26)
SPACING = (4.0, 3.0, 5.0)
"""Millimetres, x first."""
Run = Callable[..., int]
"""The command in this process."""


def mr_array(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A bright ellipse in dark noise, int16, (z, y, x)."""
    generator = np.random.default_rng(seed)
    z, y, x = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
    body = (x / 0.8) ** 2 + (y / 0.75) ** 2 + 0 * z < 1
    inside, outside = 500 + generator.normal(0, 60, shape), abs(generator.normal(0, 12, shape))
    return np.where(body, inside, outside).astype(np.int16)


def ct_array(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """The same in Hounsfield units."""
    mr = mr_array(seed, shape)
    return np.where(mr > 200, 40, -1000).astype(np.int16) + mr // 20


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> Path:
    return write_array(path, array, (-12.5, 30.25, 7.0), spacing, (-1, 0, 0, 0, -1, 0, 0, 0, 1))


def write_dicom(
    folder: Path,
    array: np.ndarray,
    uid: int,
    modality: str = "MR",
    positions: list[float] | None = None,
    tilt: float = 0.0,
) -> None:
    """Write a series, its files named in another order than that of the slices; ``tilt`` in degrees
    turns the slices about x, while the table moves along z."""
    cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    folder.mkdir(parents=True, exist_ok=True)
    settings = locale.setlocale(locale.LC_ALL)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index, part in enumerate(array):
        image = sitk.GetImageFromArray(part)
        image.SetSpacing(SPACING[:2])
        position = SPACING[2] * index if positions is None else positions[index]
        tags = {
            "0008|0060": modality,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": f"1.2.826.0.1.3680043.2.1125.1.{uid}",
            "0020|0011": str(uid),
            "0020|0013": str(index + 1),
            "0020|0032": f"-12.5\\30.25\\{position}",
            "0020|0037": f"1\\0\\0\\0\\{cos:.6f}\\{sin:.6f}",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}_{(5 * index) % len(array):03d}.dcm"))
        writer.Execute(image)
    # GDCM's writer sets the locale of the process to C.
    locale.setlocale(locale.LC_ALL, settings)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process and its children write no larger files, as if the disk were full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def truncate(path: Path, share: float) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder: kind, content or target, time."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_file():
            found[name] = ("file", path.read_bytes(), path.stat().st_mtime_ns)
        else:
            found[name] = ("other",)
    return found


def rows(dataset: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of one of a dataset's tables."""
    with (dataset / "unlabeled" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def arguments(*folders: Path, **options: Any) -> list[str]:
    given = ["unlabeled", "-d", "900", "-n", "Scans"]
    for folder in folders:
        given += ["-i", str(folder)]
    for name, value in options.items():
        dashes = "-" if name in ("np", "d", "n") else "--"
        given += [dashes + name.replace("_", "-"), str(value)]
    return given


def table(dataset: Path, name: str = "cases.csv") -> dict[str, dict[str, str]]:
    """A table's rows by the name of the source."""
    return {Path(row["source"]).name: row for row in rows(dataset, name)}


def description(dataset: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((dataset / "dataset.json").read_text())
    return content


def contents(dataset: Path) -> dict[str, object]:
    """A dataset without times, the order of records aside."""
    found: dict[str, object] = {}
    for name, (_, *content) in snapshot(dataset).items():
        lines = name.endswith(".csv") and sorted(str(content[0]).split("\\r\\n"))
        found[name] = lines or content[:1]
    found.pop("unlabeled/records.sqlite", None)
    return found
