"""Files of the dataset: links to the scans where that is possible, conversions elsewhere, and
labels. All are first written under a temporary name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from stunet_plugin.unlabeled import discovery
from stunet_plugin.unlabeled.discovery import METAIMAGE, NIFTI, Source, scan_ending
from stunet_plugin.unlabeled.reading import Scan
from stunet_plugin.utils.files import copy_file, flush, guarded, link_or_copy
from stunet_plugin.utils.geometry import Grid

COMPRESSION = 1
"""gzip's fastest: half the time of its default for a few per cent more bytes."""
NIFTI_HEADER_BYTES = 352
_METAIMAGE_DATA = "ElementDataFile"
_METAIMAGE_HEADER_BYTES = 1 << 16

CONVERTED, HEADER = "converted", "header that points to the data"


def place_image(source: Source, scan: Scan, target: Path, copy: bool) -> str:
    """Make the image of a case, whose ending is the dataset's, and return how; raise OutputError if
    it cannot be written."""
    ending = scan_ending(source.path) if source.kind == discovery.FILE else ""
    wanted = scan_ending(target.name)
    if scan.as_it_is and ending == wanted:
        return copy_file(source.path, target) if copy else link_or_copy(source.path, target)
    if scan.as_it_is and not copy and (ending, wanted) == (discovery.METAIMAGE_HEADER, METAIMAGE):
        header = _pointing_header(source.path)
        if header is not None:
            with guarded():
                target.write_bytes(header)
            return HEADER
    write_image(_compact(scan.array), scan.geometry, target)
    return CONVERTED


def points_to(image: Path) -> str | None:
    """Return the file that an image of the dataset leads to, by a link or a header, or None if it
    holds its voxels itself."""
    if image.is_symlink():
        return os.readlink(image)
    if not image.name.endswith(METAIMAGE) or image.stat().st_size > _METAIMAGE_HEADER_BYTES:
        return None
    for line in image.read_bytes().splitlines():
        key, _, value = line.partition(b"=")
        if key.strip() == _METAIMAGE_DATA.encode():
            name = os.fsdecode(value.strip())
            return name if os.path.isabs(name) else None
    return None


def is_in_place(image: Path) -> bool:
    """Whether an image of the dataset is there, and so is what it leads to."""
    return image.exists() and ((leads_to := points_to(image)) is None or os.path.exists(leads_to))


def write_image(array: np.ndarray, geometry: Grid, target: Path) -> None:
    """Write an image (z, y, x), compressed unless it is a .nii, and see to it that all of it is on
    the disk: ITK's writer of NIfTI says nothing when that is full. Raises OutputError."""
    image = sitk.GetImageFromArray(array)
    geometry.apply_to(image)
    with guarded():
        sitk.WriteImage(
            image,
            str(target),
            useCompression=not target.name.endswith(NIFTI),
            compressionLevel=COMPRESSION,
        )
        flush(target)
        _check_size(target, array.nbytes)


def _check_size(path: Path, voxel_bytes: int) -> None:
    expected = NIFTI_HEADER_BYTES + voxel_bytes
    size = path.stat().st_size
    if path.name.endswith(discovery.NIFTI_GZ):
        # The last four bytes of a gzip stream are the size of its content.
        with path.open("rb") as file:
            file.seek(max(0, size - 4))
            whole = int.from_bytes(file.read(), "little") == expected % 2**32
    else:
        whole = size == expected or not path.name.endswith(NIFTI)
    if not whole:
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"only a part of {path.name} could be written ({free // 1024} kB free)")


def _compact(array: np.ndarray) -> np.ndarray:
    """The same values in fewer bytes where they are small integers; else float32, which nnU-Net
    computes in."""
    if array.dtype.kind in "iub":
        for small in (np.uint8, np.int16):
            limits = np.iinfo(small)
            if limits.min <= array.min() and array.max() <= limits.max:
                return array.astype(small, copy=False)
    return array.astype(np.float32, copy=False)


def _pointing_header(path: str) -> bytes | None:
    """The header of a .mhd file as that of a .mha file that leads to the same voxels; None where
    these are in several files, or the header is not as expected."""
    with open(path, "rb") as file:
        content = file.read(_METAIMAGE_HEADER_BYTES + 1)
    lines = content.splitlines()
    last = next((line for line in reversed(lines) if line.strip()), b"")
    key, _, value = last.partition(b"=")
    name = os.fsdecode(value.strip())
    if (
        len(content) > _METAIMAGE_HEADER_BYTES
        or key.strip() != _METAIMAGE_DATA.encode()
        or "%" in name
    ):
        return None
    data = os.path.join(os.path.dirname(path), name)
    if not os.path.isfile(data):
        return None
    kept = lines[: len(lines) - 1 - lines[::-1].index(last)]
    return b"\n".join(
        [*kept, f"{_METAIMAGE_DATA} = ".encode() + os.fsencode(os.path.abspath(data)), b""]
    )
