"""What a worker process does with one source: everything but giving the files their places."""

from __future__ import annotations

import os
from dataclasses import replace
from hashlib import blake2b, sha1

import numpy as np
import SimpleITK as sitk

from stunet_plugin.unlabeled.body_mask import body_mask
from stunet_plugin.unlabeled.checks import (
    MODALITIES,
    UnusableError,
    check_modality,
    check_tag,
    check_voxels,
    looks_like,
)
from stunet_plugin.unlabeled.dataset import Dataset, Prepared
from stunet_plugin.unlabeled.image_files import is_in_place, place_image, write_image
from stunet_plugin.unlabeled.manifest import CASE, FAILED, FOLDER, SKIPPED, Record
from stunet_plugin.unlabeled.reading import read_scan, series_of
from stunet_plugin.utils.discovery import DICOM_FOLDER, Source
from stunet_plugin.utils.files import OutputError
from stunet_plugin.utils.image_files import CANNOT_OPEN

NAME_DIGITS = 16


def prepare(dataset: Dataset, copy: bool, source: Source) -> Prepared:
    """Read, check, hash, mask and write one scan; a scan that cannot be used is the normal case."""
    # As many processes as cores already.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        return _series(source) or _prepare_scan(dataset, copy, source)
    except UnusableError as error:
        status = FAILED if error.reason == CANNOT_OPEN else SKIPPED
        return Prepared(record_of(source, status, error.reason, error.detail))
    except OutputError as error:
        return Prepared(record_of(source, SKIPPED), disk_error=str(error))


def probe(source: Source) -> Prepared:
    """Say what modality a scan looks like: in ``facts``, None where it does not tell."""
    try:
        if found := _series(source):
            return found
        check_tag(MODALITIES, source.modality)
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
    path, signature, series = source.path, source.signature, source.series
    return Record(path, signature, status, series, reason=reason, detail=detail)


def _prepare_scan(dataset: Dataset, copy: bool, source: Source) -> Prepared:
    check_tag([dataset.modality], source.modality)
    scan = read_scan(source)
    low, high, sample = check_voxels(scan.array)
    check_modality(dataset.modality, low, sample)
    record = replace(record_of(source, CASE), case=case_name(scan.array))
    if is_in_place(dataset.files_of(record.case)[0]):
        # The parent knows whether it is this scan again or another with the same voxels.
        return Prepared(record)
    geometry = scan.geometry
    mask = body_mask(scan.array, geometry.spacing[::-1], geometry.axial, dataset.modality)
    if mask is None:
        raise UnusableError("no body", "next to nothing stands out from the air")
    # Of one source and process: a worker that a killed run left behind writes files of its own.
    key = blake2b(source.key.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    image, label = (
        dataset.temporary / f"{key}_{os.getpid()}_{kind}{dataset.file_ending}"
        for kind in ("image", "label")
    )
    for left in (image, label):
        left.unlink(missing_ok=True)
    write_image(mask, geometry, label)
    facts = {
        "image": place_image(source, scan, image, copy),
        "size": list(geometry.size),
        "spacing": [round(step, 4) for step in geometry.spacing],
        "lowest": round(low, 3),
        "highest": round(high, 3),
        "body": round(float(mask.mean()), 4),
    }
    return Prepared(replace(record, facts=facts), (image, label))


def case_name(array: np.ndarray) -> str:
    """Return a name that depends on the voxels (z, y, x) alone, not on order, format or place: a
    copy is noticed at once. The header does not count: programs write other last digits."""
    # The fastest of hashlib's on most processors; nobody is attacked by a collision here.
    digest = sha1(str(array.shape).encode(), usedforsecurity=False)
    for part in array:
        digest.update(np.ascontiguousarray(part, dtype=np.float32).data)
    return f"scan_{digest.hexdigest()[:NAME_DIGITS]}"
