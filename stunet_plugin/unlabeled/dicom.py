"""The series of a folder of DICOM files, from their headers. Every file is opened once, however
many series there are: a folder may hold a whole archive."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.unlabeled.checks import MINIMUM_SIZE, UnusableError
from stunet_plugin.unlabeled.discovery import DICOM_SERIES, Source
from stunet_plugin.unlabeled.reading import check_names
from stunet_plugin.utils.images import SKEWED

SERIES_UID, MODALITY = "0020|000e", "0008|0060"
GAP_TOLERANCE = 0.1
"""By which share of the median gap the gaps between slices may differ."""
SHIFT_TOLERANCE = 0.5
"""By how many voxels slices may lie aside of each other's normal."""
SAME_PLACE = 1e-3
"""Millimetres: slices nearer to each other are two images of one place."""


@dataclass(frozen=True)
class _Slice:
    name: str
    position: float
    aside: np.ndarray
    """Where it lies in its own plane, in mm."""
    spacing: tuple[float, ...]
    """Between its voxels, in mm."""
    size: tuple[int, ...]
    components: int
    modality: str


def series_of(folder: Source) -> list[Source]:
    """Return the series of a folder, each with its slices in their order in space and with what is
    wrong with it.

    Images of one series that differ in size or orientation, such as the planes of a localizer,
    become several.

    Raises:
        UnusableError: the folder cannot be read at all, or none of its files is an image.
    """
    check_names(folder)
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
        raise UnusableError(
            "no image",
            f"none of {len(others)} DICOM files can be read as one, for example {others[0]}",
        )
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
    size, spacing = tuple(reader.GetSize()), tuple(reader.GetSpacing()[:2])
    position, aside = 0.0, np.zeros(2)
    if axes == 3:
        normal = np.cross(direction[:, 0], direction[:, 1])
        position = float(np.dot(normal, reader.GetOrigin()))
        aside = direction[:, :2].T @ reader.GetOrigin()
    # Written with few digits, so that noise in the last one does not make another stack.
    stack = (size[:2], tuple(np.round(direction.ravel(), 2) + 0.0))
    components, modality = reader.GetNumberOfComponents(), _tag(reader, MODALITY)
    return stack, _Slice(name, position, aside, spacing, size, components, modality)


def _series(folder: Source, label: str, slices: Sequence[_Slice], others: int) -> Source:
    ordered = sorted(slices, key=lambda one: (one.position, one.name))
    problem = _problem(ordered)
    if problem and others:
        problem = (
            problem[0],
            f"{problem[1]}; {others} of the folder's files cannot be read as images",
        )
    return replace(
        folder,
        kind=DICOM_SERIES,
        series=label,
        files=tuple(one.name for one in ordered),
        modality=ordered[0].modality,
        problem=problem,
    )


def _problem(slices: Sequence[_Slice]) -> tuple[str, str] | None:
    first = slices[0]
    if first.components > 1:
        return "several values per voxel", f"{first.components} (colour image)"
    if len(slices) == 1 and len(first.size) == 3 and first.size[2] > 1:
        # One file with many frames: the reader makes a volume of it.
        return None
    if len(slices) == 1:
        return "one slice", " x ".join(map(str, first.size[:2]))
    if len(slices) < MINIMUM_SIZE:
        return "too few slices", f"{len(slices)}; at least {MINIMUM_SIZE} are needed"
    gaps = np.diff([one.position for one in slices])
    if gaps.min() < SAME_PLACE:
        return "several volumes in one series", "slices at the same place (points in time, echoes)"
    median = float(np.median(gaps))
    if np.ptp(gaps) > GAP_TOLERANCE * median:
        return "slices missing", f"gaps from {gaps.min():.2f} to {gaps.max():.2f} mm"
    if not np.allclose([one.spacing for one in slices], first.spacing, rtol=1e-3):
        return "several spacings in one series", f"{first.spacing} mm and others"
    shifts = [float(np.linalg.norm(one.aside - first.aside)) for one in slices]
    if max(shifts) > SHIFT_TOLERANCE * min(first.spacing):
        # ITK would stack the slices straight, each as far off as it is shifted.
        tilt = math.degrees(math.atan2(shifts[-1], slices[-1].position - first.position))
        found = f"gantry tilt of {tilt:.1f} degrees, the last slice is {shifts[-1]:.1f} mm aside"
        return SKEWED, f"{found}: convert it with dcm2niix, which resamples it"
    return None
