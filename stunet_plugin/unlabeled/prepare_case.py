"""What a worker process does with one source: everything but giving the files their places."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha1
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.unlabeled.body_mask import body_mask
from stunet_plugin.unlabeled.checks import (
    MODALITIES,
    UnreachableError,
    UnusableError,
    check_modality,
    check_tag,
    check_voxels,
    looks_like,
)
from stunet_plugin.unlabeled.dicom import series_of
from stunet_plugin.unlabeled.discovery import DICOM_FOLDER, Source
from stunet_plugin.unlabeled.image_files import is_in_place, place_image, write_image
from stunet_plugin.unlabeled.manifest import CASE, FAILED, FOLDER, SKIPPED, Record
from stunet_plugin.unlabeled.reading import Scan, read_scan
from stunet_plugin.utils.files import OutputError

NAME_DIGITS = 16


@dataclass(frozen=True)
class Settings:
    """What all sources are prepared with.

    Attributes:
        modality: ``CT`` or ``MR``.
        file_ending: of the data set.
        images: folder of the images that are in place.
        temporary: folder for files that are not.
        copy: do not link.
    """

    modality: str
    file_ending: str
    images: Path
    temporary: Path
    copy: bool = False

    def image_name(self, case: str) -> str:
        return f"{case}_0000{self.file_ending}"


@dataclass(frozen=True)
class Prepared:
    """The record of a source and, of a new case, its files.

    Attributes:
        record: what became of it.
        image, label: temporary files, if there are any.
        further: the series of a DICOM folder.
        disk_error: the data set cannot be written, so the run must stop.
    """

    record: Record
    image: Path | None = None
    label: Path | None = None
    further: Sequence[Source] = field(default=())
    disk_error: str = ""


def prepare(settings: Settings, source: Source) -> Prepared:
    """Read, check, hash, mask and write one scan; a scan that cannot be used is the normal case."""
    # As many processes as cores already.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    record = record_of(source, SKIPPED)
    try:
        if source.kind == DICOM_FOLDER and source.problem is None:
            return Prepared(replace(record, status=FOLDER), further=series_of(source))
        return _prepare_scan(settings, source)
    except UnusableError as error:
        status = FAILED if isinstance(error, UnreachableError) else SKIPPED
        return Prepared(replace(record, status=status, reason=error.reason, detail=error.detail))
    except OutputError as error:
        return Prepared(record, disk_error=str(error))


def record_of(source: Source, status: str, reason: str = "", detail: str = "") -> Record:
    return Record(
        source.path, source.signature, status, source.series, reason=reason, detail=detail
    )


def probe(source: Source) -> Prepared:
    """Say what modality a scan looks like: in ``facts``, None where it does not tell."""
    record = record_of(source, SKIPPED)
    try:
        if source.kind == DICOM_FOLDER and source.problem is None:
            return Prepared(replace(record, status=FOLDER), further=series_of(source))
        if source.modality and source.modality not in MODALITIES:
            check_tag(" or ".join(MODALITIES), source.modality)
        low, _, sample = check_voxels(read_scan(source).array)
    except UnusableError as error:
        return Prepared(replace(record, reason=error.reason, detail=error.detail))
    seen = source.modality or looks_like(low, sample)
    return Prepared(replace(record, status=CASE, facts={"modality": seen}))


def _prepare_scan(settings: Settings, source: Source) -> Prepared:
    check_tag(settings.modality, source.modality)
    scan = read_scan(source)
    low, high, sample = check_voxels(scan.array)
    check_modality(settings.modality, low, sample)
    record = replace(record_of(source, CASE), case=case_name(scan.array))
    image_name = settings.image_name(record.case)
    if is_in_place(settings.images / image_name):
        # The parent knows whether it is this scan again or another with the same voxels.
        return Prepared(record)
    spacing = scan.geometry.spacing[::-1]
    mask = body_mask(scan.array, spacing, scan.geometry.axial, settings.modality)
    if mask is None:
        raise UnusableError("no body", "next to nothing stands out from the air")
    # Names of one source and process: a worker that a killed run left behind writes files of its
    # own.
    prefix = f"{blake2b(source.key.encode(errors='surrogatepass'), digest_size=8).hexdigest()}_{os.getpid()}"  # noqa: E501
    image, label = (
        settings.temporary / f"{prefix}_{kind}{settings.file_ending}" for kind in ("image", "label")
    )
    for left in (image, label):
        left.unlink(missing_ok=True)
    write_image(mask, scan.geometry, label)
    how = place_image(source, scan, image, settings.copy)
    return Prepared(replace(record, facts=_facts(scan, mask, low, high, how)), image, label)


def _facts(scan: Scan, mask: np.ndarray, low: float, high: float, how: str) -> dict[str, Any]:
    return {
        "image": how,
        "size": list(scan.geometry.size),
        "spacing": [round(step, 4) for step in scan.geometry.spacing],
        "lowest": round(low, 3),
        "highest": round(high, 3),
        "body": round(float(mask.mean()), 4),
    }


def case_name(array: np.ndarray) -> str:
    """Return a name that depends on the voxels alone.

    The same scan thus gets the same name in whatever order, format or place it is found, and a
    second copy of it is noticed without comparing it with any other. The header does not count:
    programs write the same geometry with other digits.

    Args:
        array: (z, y, x).
    """
    # The fastest of hashlib's on most processors; nobody is attacked by a collision here.
    digest = sha1(str(array.shape).encode(), usedforsecurity=False)
    for part in array:
        digest.update(np.ascontiguousarray(part, dtype=np.float32).data)
    return f"scan_{digest.hexdigest()[:NAME_DIGITS]}"
