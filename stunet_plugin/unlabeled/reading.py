"""Reading one scan, by the reader of all commands; a file or a DICOM series."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from stunet_plugin.errors import last_line
from stunet_plugin.unlabeled.checks import UnreachableError, UnusableError, check_header
from stunet_plugin.unlabeled.discovery import DICOM_SERIES, Source
from stunet_plugin.utils import images
from stunet_plugin.utils.geometry import Grid
from stunet_plugin.utils.image_files import CANNOT_OPEN, UNREADABLE, ImageError


class Scan(NamedTuple):
    """A volume (z, y, x); ``as_it_is``: nnU-Net's reader sees the file itself as this volume."""

    array: np.ndarray
    geometry: Grid
    as_it_is: bool


def read_scan(source: Source) -> Scan:
    """Read a scan.

    Raises:
        UnusableError: it is none, or is damaged.
        UnreachableError: it cannot be opened at present.
    """
    if source.problem is not None:
        raise (UnreachableError if source.unreachable else UnusableError)(*source.problem)
    if source.kind == DICOM_SERIES:
        image = _read_series(source)
        return Scan(sitk.GetArrayFromImage(image), Grid.of(image), as_it_is=False)
    try:
        grid = images.read_geometry(source.path)
        check_header(grid.size, grid.spacing)
        image = images.read_image(source.path)
    except ImageError as error:
        unreachable = error.reason == CANNOT_OPEN
        raise (UnreachableError if unreachable else UnusableError)(
            error.reason, error.detail
        ) from error
    reader = sitk.ImageFileReader()
    reader.SetFileName(source.path)
    reader.ReadImageInformation()
    # Not where more axes were dropped or a negative pixdim was taken as its size.
    as_it_is = reader.GetDimension() == 3 and Grid.of(reader).agrees(grid)
    return Scan(sitk.GetArrayFromImage(image), grid, as_it_is)


def check_names(source: Source) -> None:
    """Refuse names that are not UTF-8: SimpleITK aborts the process when it is given one."""
    try:
        "".join((source.path, *source.files)).encode()
    except UnicodeEncodeError as error:
        raise UnusableError("name of the file", "not in UTF-8: rename it") from error


def _read_series(source: Source) -> Any:
    check_names(source)
    names = [os.path.join(source.path, name) for name in source.files]
    try:
        image = sitk.ReadImage(names if len(names) > 1 else names[0], imageIO="GDCMImageIO")
    except RuntimeError as error:
        raise UnusableError(UNREADABLE, last_line(error)) from error
    check_header(image.GetSize(), image.GetSpacing(), image.GetNumberOfComponentsPerPixel())
    return image
