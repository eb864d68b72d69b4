"""Reading one scan: a file, or a DICOM series."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from stunet_plugin.unlabeled.checks import UnusableError
from stunet_plugin.utils import dicom, images
from stunet_plugin.utils.discovery import DICOM_SERIES, Source
from stunet_plugin.utils.geometry import Grid
from stunet_plugin.utils.image_files import ImageError


class Scan(NamedTuple):
    """A volume (z, y, x); ``as_it_is``: nnU-Net's reader sees the file itself as this volume."""

    array: np.ndarray
    geometry: Grid
    as_it_is: bool


def read_scan(source: Source) -> Scan:
    """Read a scan.

    Raises:
        UnusableError: it is none, is damaged, or cannot be opened at present.
    """
    if source.problem is not None:
        raise UnusableError(*source.problem)
    try:
        if source.kind == DICOM_SERIES:
            image = dicom.read_series(source)
            return Scan(sitk.GetArrayFromImage(image), Grid.of(image), as_it_is=False)
        grid = images.read_geometry(source.path)
        images.check_header(source.path, grid.size, grid.spacing)
        image = images.read_image(source.path)
    except ImageError as error:
        raise UnusableError(error.reason, error.detail) from error
    reader = sitk.ImageFileReader()
    reader.SetFileName(source.path)
    reader.ReadImageInformation()
    # Not where more axes were dropped or a negative pixdim was taken as its size.
    as_it_is = reader.GetDimension() == 3 and Grid.of(reader).agrees(grid)
    return Scan(sitk.GetArrayFromImage(image), grid, as_it_is)


def series_of(folder: Source) -> list[Source]:
    """Return the series of a DICOM folder; see :func:`stunet_plugin.utils.dicom.series_of`.

    Raises:
        UnusableError: the folder cannot be read at all, or none of its files is an image.
    """
    try:
        return dicom.series_of(folder)
    except ImageError as error:
        raise UnusableError(error.reason, error.detail) from error
