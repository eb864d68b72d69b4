"""What a worker process does with one source: everything but giving the files their places."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha1
from pathlib import Path

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
from stunet_plugin.unlabeled.reading import read_scan
from stunet_plugin.utils.files import OutputError

NAME_DIGITS = 16


@dataclass(frozen=True)
class Settings:
    """What all sources are prepared with: modality and file ending of the dataset, its folder of
    images, a folder for files that are not in place yet, and whether to copy instead of linking."""

    modality: str
    file_ending: str
    images: Path
    temporary: Path
    copy: bool = False


@dataclass(frozen=True)
class Prepared:
    """What became of a source.

    Attributes:
        image, label: temporary files of a new case.
        further: the series of a DICOM folder.
        disk_error: the dataset cannot be written, so the run must stop.
    """

    record: Record
    image: Path | None = None
    label: Path | None = None
    further: Sequence[Source] = ()
    disk_error: str = ""


def prepare(settings: Settings, source: Source) -> Prepared:
    """Read, check, hash, mask and write one scan; a scan that cannot be used is the normal case."""
    # As many processes as cores already.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        return _series(source) or _prepare_scan(settings, source)
    except UnusableError as error:
        status = FAILED if isinstance(error, UnreachableError) else SKIPPED
        return Prepared(record_of(source, status, error.reason, error.detail))
    except OutputError as error:
        return Prepared(record_of(source, SKIPPED), disk_error=str(error))


def probe(source: Source) -> Prepared:
    """Say what modality a scan looks like: in ``facts``, None where it does not tell."""
    try:
        if found := _series(source):
            return found
        if source.modality not in MODALITIES:
            check_tag(" or ".join(MODALITIES), source.modality)
        low, _, sample = check_voxels(read_scan(source).array)
    except UnusableError as error:
        return Prepared(record_of(source, SKIPPED, error.reason, error.detail))
    seen = source.modality or looks_like(low, sample)
    return Prepared(replace(record_of(source, CASE), facts={"modality": seen}))


def _series(source: Source) -> Prepared | None:
    """The series of a DICOM folder; None for another source."""
    if source.kind != DICOM_FOLDER or source.problem is not None:
        return None
    return Prepared(record_of(source, FOLDER), further=series_of(source))


def record_of(source: Source, status: str, reason: str = "", detail: str = "") -> Record:
    return Record(
        source.path, source.signature, status, source.series, reason=reason, detail=detail
    )


def _prepare_scan(settings: Settings, source: Source) -> Prepared:
    check_tag(settings.modality, source.modality)
    scan = read_scan(source)
    low, high, sample = check_voxels(scan.array)
    check_modality(settings.modality, low, sample)
    record = replace(record_of(source, CASE), case=case_name(scan.array))
    if is_in_place(settings.images / f"{record.case}_0000{settings.file_ending}"):
        # The parent knows whether it is this scan again or another with the same voxels.
        return Prepared(record)
    geometry = scan.geometry
    mask = body_mask(scan.array, geometry.spacing[::-1], geometry.axial, settings.modality)
    if mask is None:
        raise UnusableError("no body", "next to nothing stands out from the air")
    # Of one source and process: a worker that a killed run left behind writes files of its own.
    key = blake2b(source.key.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    image, label = (
        settings.temporary / f"{key}_{os.getpid()}_{kind}{settings.file_ending}"
        for kind in ("image", "label")
    )
    for left in (image, label):
        left.unlink(missing_ok=True)
    write_image(mask, geometry, label)
    facts = {
        "image": place_image(source, scan, image, settings.copy),
        "size": list(geometry.size),
        "spacing": [round(step, 4) for step in geometry.spacing],
        "lowest": round(low, 3),
        "highest": round(high, 3),
        "body": round(float(mask.mean()), 4),
    }
    return Prepared(replace(record, facts=facts), image, label)


def case_name(array: np.ndarray) -> str:
    """Return a name that depends on the voxels (z, y, x) alone, not on order, format or place: a
    copy is noticed at once. The header does not count: programs write other last digits."""
    # The fastest of hashlib's on most processors; nobody is attacked by a collision here.
    digest = sha1(str(array.shape).encode(), usedforsecurity=False)
    for part in array:
        digest.update(np.ascontiguousarray(part, dtype=np.float32).data)
    return f"scan_{digest.hexdigest()[:NAME_DIGITS]}"
