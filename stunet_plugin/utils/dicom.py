"""DICOM series: found from the headers of a folder's files, and read as one volume.

Every file is opened once, however many series there are: a folder may hold a whole archive.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from stunet_plugin.errors import last_line
from stunet_plugin.utils.discovery import DICOM_SERIES, Source
from stunet_plugin.utils.image_files import UNREADABLE, ImageError
from stunet_plugin.utils.images import SKEWED, check_header

SERIES_UID, MODALITY, NUMBER = "0020|000e", "0008|0060", "0020|0011"
PIXEL_DATA = b"\xe0\x7f\x10\x00"
"""Tag in front of the voxels."""
GAP_TOLERANCE = 0.1
"""By which share of the median gap the gaps between slices may differ."""
SHIFT_TOLERANCE = 0.5
"""By how many voxels slices may lie aside of each other's normal."""
SAME_PLACE = 1e-3
"""Millimetres: slices nearer to each other are two images of one place."""


def read_series(source: Source) -> Any:
    """Return a series of :func:`series_of` as a volume (sitk.Image).

    Raises:
        ImageError: it has a problem, or its voxels cannot be read.
    """
    if source.problem is not None:
        raise ImageError(source.shown, *source.problem)
    names = [os.path.join(source.path, name) for name in source.files]
    try:
        image = sitk.ReadImage(names if len(names) > 1 else names[0], imageIO="GDCMImageIO")
    except RuntimeError as error:
        raise ImageError(source.shown, UNREADABLE, last_line(error)) from error
    components = image.GetNumberOfComponentsPerPixel()
    check_header(source.shown, image.GetSize(), image.GetSpacing(), components)
    return image


def damaged_images(folder: Source, series: Sequence[Source]) -> list[str]:
    """Return the files of a DICOM folder that hold voxels but are in none of its series: damaged,
    or compressed in a way that is not known. A report, say, holds none."""
    read = {name for one in series for name in one.files}
    others = [name for name in folder.files if name not in read]
    return [name for name in others if PIXEL_DATA in Path(folder.path, name).read_bytes()]


class _Slice(NamedTuple):
    """One file; where it lies (mm along its rows, its columns and its normal), spacing in plane."""

    name: str
    place: np.ndarray
    spacing: tuple[float, ...]
    size: tuple[int, ...]
    components: int
    modality: str
    number: str


def series_of(folder: Source) -> list[Source]:
    """Return the series of a folder, each with its slices in their order in space and with what is
    wrong with it.

    Images of one series that differ in size or orientation, such as the planes of a localizer,
    become several.

    Raises:
        ImageError: the folder cannot be read at all, or none of its files is an image.
    """
    try:
        # SimpleITK aborts the process when it is given another name.
        "".join((folder.path, *folder.files)).encode()
    except UnicodeEncodeError as error:
        shown = ascii(folder.path)
        raise ImageError(shown, "name of the file", "not in UTF-8: rename it") from error
    stacks: dict[str, dict[tuple[Any, ...], list[_Slice]]] = defaultdict(lambda: defaultdict(list))
    others: list[str] = []
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    for name in folder.files:
        reader.SetFileName(os.path.join(folder.path, name))
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            # Reports, presentation states and other things that are no images; or a damaged one.
            others.append(name)
            continue
        uid = _tag(reader, SERIES_UID) or "no series UID"
        stack, image = _image(reader, name)
        stacks[uid][stack].append(image)
    if not stacks:
        found = f"none of {len(others)} DICOM files can be read as one, for example {others[0]}"
        raise ImageError(folder.path, "no image", found)
    series = []
    for uid, parts in sorted(stacks.items()):
        for number, (_, slices) in enumerate(sorted(parts.items()), start=1):
            label = uid if len(parts) == 1 else f"{uid}#{number}"
            series.append(_series(folder, label, slices, len(others)))
    return series


def _tag(reader: Any, tag: str) -> str:
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""


def _image(reader: Any, name: str) -> tuple[tuple[Any, ...], _Slice]:
    """Return the stack that an image belongs to (size and orientation), and the image."""
    axes = reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (axes, axes))
    size, spacing = reader.GetSize(), reader.GetSpacing()[:2]
    place = direction.T @ reader.GetOrigin() if axes == 3 else np.zeros(3)
    # Written with few digits, so that noise in the last one does not make another stack.
    stack = (size[:2], tuple(np.round(direction.ravel(), 2) + 0.0))
    components, tags = reader.GetNumberOfComponents(), [_tag(reader, x) for x in (MODALITY, NUMBER)]
    return stack, _Slice(name, place, spacing, size, components, *tags)


def _series(folder: Source, label: str, slices: Sequence[_Slice], others: int) -> Source:
    ordered = sorted(slices, key=lambda one: (one.place[2], one.name))
    problem = None
    try:
        _check_slices(folder.path, ordered)
    except ImageError as error:
        more = f"; {others} of the folder's files cannot be read as images" if others else ""
        problem = error.reason, error.detail + more
    return replace(
        folder,
        kind=DICOM_SERIES,
        series=label,
        files=tuple(one.name for one in ordered),
        modality=ordered[0].modality,
        number=ordered[0].number,
        problem=problem,
    )


def _check_slices(folder: str, slices: Sequence[_Slice]) -> None:
    """Refuse slices (in their order in space) that do not make a volume."""
    first = slices[0]
    # One file may hold many slices: the reader makes a volume of it.
    depth = first.size[2] if len(slices) == 1 and len(first.size) == 3 else len(slices)
    check_header(folder, (*first.size[:2], depth), first.spacing, first.components)
    if len(slices) == 1:
        return
    places = np.array([one.place for one in slices]) - first.place
    gaps = np.diff(places[:, 2])
    if gaps.min() < SAME_PLACE:
        detail = "slices at the same place (points in time, echoes)"
        raise ImageError(folder, "several volumes in one series", detail)
    if np.ptp(gaps) > GAP_TOLERANCE * np.median(gaps):
        detail = f"gaps from {gaps.min():.2f} to {gaps.max():.2f} mm"
        raise ImageError(folder, "slices missing", detail)
    if not np.allclose([one.spacing for one in slices], first.spacing, rtol=1e-3):
        detail = f"{first.spacing} mm and others"
        raise ImageError(folder, "several spacings in one series", detail)
    shifts = np.linalg.norm(places[:, :2], axis=1)
    if shifts.max() > SHIFT_TOLERANCE * min(first.spacing):
        # ITK would stack the slices straight, each as far off as it is shifted.
        tilt = math.degrees(math.atan2(shifts[-1], places[-1, 2]))
        found = f"gantry tilt of {tilt:.1f} degrees, the last slice is {shifts[-1]:.1f} mm aside"
        raise ImageError(folder, SKEWED, f"{found}: convert it with dcm2niix, which resamples it")
