"""Reading one scan: first bytes, header, voxels; each step refuses what the next need not see.

nnU-Net will read the scans with SimpleITK, and so do we, but for the voxels of NIfTI files: ITK
takes a NIfTI file that ends too early, or whose compressed stream is damaged, for a good one and
leaves the rest of the voxels to chance.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from stunet_plugin.errors import last_line
from stunet_plugin.unlabeled.checks import UnreachableError, UnusableError, check_header
from stunet_plugin.unlabeled.discovery import (
    CANNOT_OPEN,
    DICOM_SERIES,
    NIFTI,
    NIFTI_GZ,
    Source,
    scan_ending,
)
from stunet_plugin.utils.geometry import Geometry

GZIP_MAGIC = b"\x1f\x8b"
READ_ON = 1 << 20


@dataclass(frozen=True)
class Scan:
    """A volume with axes (z, y, x).

    Attributes:
        as_it_is: nnU-Net can read the file itself as this volume.
    """

    array: np.ndarray
    geometry: Geometry
    as_it_is: bool


def read_scan(source: Source) -> Scan:
    """Read a scan.

    Raises:
        UnusableError: it is none, or is damaged.
        UnreachableError: it cannot be opened at present.
    """
    if source.problem is not None:
        raise (UnreachableError if source.unreachable else UnusableError)(*source.problem)
    check_names(source)
    if source.kind == DICOM_SERIES:
        return _read_series(source)
    return _read_file(source.path)


def check_names(source: Source) -> None:
    """Refuse names that are not UTF-8: SimpleITK aborts the process when it is given one."""
    try:
        "".join((source.path, *source.files)).encode()
    except UnicodeEncodeError as error:
        raise UnusableError("name of the file", "not in UTF-8; rename it") from error


def _read_file(path: str) -> Scan:
    _check_opens(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise UnusableError(
                "skewed axes", "nnU-Net's reader takes axes at right angles only"
            ) from error
        raise UnusableError("unreadable", last_line(error)) from error
    size = reader.GetSize()
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    complex_pixels = reader.GetPixelIDValue() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64)
    check_header(size, reader.GetSpacing(), reader.GetNumberOfComponents() + complex_pixels)
    geometry = _geometry(size, reader)
    read = _nifti_voxels if scan_ending(path) in (NIFTI_GZ, NIFTI) else _itk_voxels
    try:
        array = read(path).reshape(size[::-1])
    except MemoryError:
        raise
    except Exception as error:
        # Damaged files raise whatever they happen to break.
        what = f"{type(error).__name__}: {last_line(error)}"
        raise UnusableError(
            "unreadable", f"its header can be read, its voxels cannot ({what})"
        ) from error
    return Scan(array, geometry, as_it_is=reader.GetDimension() == 3)


def _check_opens(path: str) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(1)
    except OSError as error:
        raise UnreachableError(CANNOT_OPEN, error.strerror or str(error)) from error
    if not start:
        raise UnusableError("unreadable", "empty file")


def _geometry(size: tuple[int, ...], image: Any) -> Geometry:
    """Of an image or a reader, which may have more axes than ``size``."""
    axes = image.GetDimension()
    direction = np.reshape(image.GetDirection(), (axes, axes))[:3, :3]
    return Geometry(
        tuple(size),
        tuple(image.GetSpacing()[:3]),
        tuple(image.GetOrigin()[:3]),
        tuple(float(value) for value in direction.ravel()),
    )


def _itk_voxels(path: str) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(path))
    return array


def _nifti_voxels(path: str) -> np.ndarray:
    """Return the voxels with axes (z, y, x); reads to the end of the stream, where the checksum
    is."""
    with open(path, "rb") as raw:
        compressed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
        image = nibabel.Nifti1Image.from_file_map(
            nibabel.Nifti1Image.make_file_map({"image": file}), mmap=False
        )
        voxels = image.dataobj
        scaled = (voxels.slope, voxels.inter) != (1, 0)
        array = np.asarray(voxels, dtype=np.float32) if scaled else voxels.get_unscaled()
        while file.read(READ_ON):
            pass
    return np.asarray(array).T


def _read_series(source: Source) -> Scan:
    names = [os.path.join(source.path, name) for name in source.files]
    try:
        if len(names) == 1:
            reader: Any = sitk.ImageFileReader()
            reader.SetFileName(names[0])
        else:
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(names)
        reader.SetImageIO("GDCMImageIO")
        image = reader.Execute()
    except RuntimeError as error:
        raise UnusableError("unreadable", last_line(error)) from error
    check_header(image.GetSize(), image.GetSpacing(), image.GetNumberOfComponentsPerPixel())
    return Scan(sitk.GetArrayFromImage(image), _geometry(image.GetSize(), image), as_it_is=False)
