"""Files of the dataset: links to the scans where that is possible, conversions elsewhere, and
labels. All are first written under a temporary name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from stunet_plugin.unlabeled.reading import Scan
from stunet_plugin.utils.discovery import METAIMAGE, METAIMAGE_HEADER, Source, scan_ending
from stunet_plugin.utils.files import copy_file, flush, guarded, link_or_copy
from stunet_plugin.utils.geometry import Grid
from stunet_plugin.utils.image_files import NIFTI, side_files, with_data_file

COMPRESSION = 1
"""gzip's fastest: half the time of its default for a few per cent more bytes."""
NIFTI_HEADER_BYTES = 352

CONVERTED, HEADER = "converted", "header that points to the data"


def place_image(source: Source, scan: Scan, target: Path, copy: bool) -> str:
    """Make the image of a case, whose ending is the dataset's, and return how; raise OutputError if
    it cannot be written."""
    # The header of a .mhd file can be that of a .mha file.
    ending = scan_ending(source.path).replace(METAIMAGE_HEADER, METAIMAGE)
    if scan.as_it_is and ending == scan_ending(target.name):
        data = side_files(source.path, elsewhere=True)
        if not data:
            return copy_file(source.path, target) if copy else link_or_copy(source.path, target)
        place = str(data[0].absolute())
        if not copy and "%" not in place:  # for ITK a pattern of names
            header = with_data_file(Path(source.path), place)
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
    data = side_files(image, elsewhere=True)
    return str(data[0]) if data else None


def is_in_place(image: Path) -> bool:
    """Whether an image of the dataset is there, and so is what it leads to."""
    return image.exists() and ((leads_to := points_to(image)) is None or os.path.exists(leads_to))


def write_image(array: np.ndarray, geometry: Grid, target: Path) -> None:
    """Write an image (z, y, x), compressed unless it is a .nii, and see to it that all of it is on
    the disk: ITK's writer of NIfTI says nothing when that is full. Raises OutputError."""
    image = sitk.GetImageFromArray(array)
    geometry.apply_to(image)
    with guarded():
        compress = not target.name.endswith(".nii")
        sitk.WriteImage(image, str(target), compress, compressionLevel=COMPRESSION)
        flush(target)
        if target.name.endswith(NIFTI):
            _check_size(target, NIFTI_HEADER_BYTES + array.nbytes)


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if path.name.endswith(".gz"):
        # The last four bytes of a gzip stream are the size of its content.
        with path.open("rb") as file:
            file.seek(max(0, size - 4))
            size, expected = int.from_bytes(file.read(), "little"), expected % 2**32
    if size != expected:
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
