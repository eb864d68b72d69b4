"""Images and label maps, read strictly: what is cut off, not finite or of another kind is refused.

The one reader for all commands; ``image_files`` knows the formats.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from stunet_plugin.errors import last_line
from stunet_plugin.utils.geometry import Grid
from stunet_plugin.utils.image_files import (
    AXES,
    COMPONENTS,
    NIFTI,
    PICTURES,
    TIFF,
    UNREADABLE,
    ImageError,
    check_data,
    check_start,
    ending_of,
    nifti_header,
    nifti_voxels,
    picture_voxels,
)

ROUNDING = 1e-3
"""Label values that are this close to whole numbers are rounded."""
NOT_FINITE, BAD_SPACING, SKEWED = "not finite", "absurd spacing", "skewed axes"
ONE_SLICE, FEW_SLICES = "one slice", "too few slices"
NOT_LABELS, UNDECLARED = "not a label map", "undeclared label values"
MINIMUM_SIZE = 5
"""Voxels on every axis; an image of one slice is no volume, and one of a few has nothing to learn
from in 3D."""
MAXIMUM_VOXELS = 2**31
SPACING_LIMITS = (0.05, 20.0)
"""Millimetres; outside of them the header is wrong or the image not one of a patient."""


def read_geometry(path: Path | str) -> Grid:
    """Return where the voxels of an image are, from its header alone; axes of length 1 after the
    third are dropped, a negative pixdim is taken as its size. Raise ImageError if it cannot be read
    or is not of one volume with one value per voxel (pictures may have colours)."""
    return _read_header(path)[1]


def read_image(path: Path | str) -> Any:
    """Return an image (sitk.Image of two or three axes) that is whole, finite, of one volume and,
    pictures apart, of one value per voxel; raise ImageError if it is not."""
    grid = read_geometry(path)
    if ending_of(path) in NIFTI:
        array = nifti_voxels(path)
        check_finite(path, array)
        image = sitk.GetImageFromArray(array.reshape(grid.size[::-1]))
    else:
        check_image(path)
        image = _with_reader(path, lambda: sitk.ReadImage(str(path)))
        while image.GetDimension() > 3:
            image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    grid.apply_to(image)
    return image


def check_image(path: Path | str) -> None:
    """Raise ImageError as :func:`read_image`, but leave skewed axes and colours of pictures to the
    reader of nnU-Net that is to read the image then."""
    ending = ending_of(path)
    if ending in NIFTI:
        array = nifti_voxels(path)
        _check_spacing(path, np.abs(nifti_header(path)["pixdim"][1 : min(array.ndim, 3) + 1]))
    elif ending in (*PICTURES, *TIFF):
        array = picture_voxels(path)
    else:
        check_data(path, _read_header(path)[0])
        array = _with_reader(path, lambda: sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    check_finite(path, array)


def check_header(
    path: Path | str, size: Sequence[int], spacing: Sequence[float], components: int = 1
) -> None:
    """Raise an ImageError if a header is not that of a volume of one value per voxel; ``size`` and
    ``spacing`` (mm) x first."""
    text = " x ".join(map(str, size))
    low, high = SPACING_LIMITS
    if components > 1:
        raise ImageError(path, COMPONENTS, f"{components} (colour image)")
    if len(size) > 3:
        raise ImageError(path, AXES, text)
    if len(size) < 3 or min(size) == 1:
        raise ImageError(path, ONE_SLICE, text)
    if min(size) < MINIMUM_SIZE:
        raise ImageError(path, FEW_SLICES, f"{text} voxels; needed are {MINIMUM_SIZE} per axis")
    if math.prod(size) > MAXIMUM_VOXELS:
        raise ImageError(path, "too large", f"{text} voxels")
    if not all(low <= step <= high for step in spacing):
        steps = " x ".join(f"{step:g}" for step in spacing)
        raise ImageError(path, BAD_SPACING, f"{steps} mm; taken are {low:g} to {high:g} mm")


def check_finite(path: Path | str, array: np.ndarray) -> None:
    """Raise an ImageError if voxels (any shape) are NaN or infinite."""
    if array.dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(array))):
        raise ImageError(path, NOT_FINITE, f"{bad} of {array.size} voxels are NaN or infinite")


def read_images(
    paths: Sequence[Path], reader: Any, channels: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the images of a case (channel, z, y, x) and their geometry as one of nnU-Net's readers
    sees them; raise ImageError if they are bad, it cannot read them, or the channels are others."""
    for path in paths:
        check_image(path)
    names = [os.fspath(path) for path in paths]
    array, properties = _with_reader(paths[0], lambda: reader.read_images(names))
    if len(array) != channels:
        found = f"{len(array)}, expected {channels}"
        raise ImageError(paths[0], "another number of channels", found)
    return array, properties


def read_label_map(path: Path | str, values: Collection[int] | None = None) -> Any:
    """Return a label map as a sitk.Image of integers, checked for the declared values if given;
    raise ImageError as :func:`read_image` and :func:`check_labels`."""
    image = read_image(path)
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise ImageError(path, COMPONENTS, "a label map in colours")
    labels = check_labels(path, sitk.GetArrayViewFromImage(image), values)
    whole = sitk.GetImageFromArray(labels)
    whole.CopyInformation(image)
    return whole


def read_label_array(
    path: Path | str, reader: Any, values: Collection[int] | None = None
) -> tuple[np.ndarray, dict[str, Any], bool]:
    """Return a label map (z, y, x) of integers as one of nnU-Net's readers sees it, its geometry
    for writing, and whether values were rounded; raise as :func:`read_label_map`."""
    check_image(path)
    array, properties = _with_reader(path, lambda: reader.read_seg(os.fspath(path)))
    if array.shape[0] != 1:
        raise ImageError(path, COMPONENTS, f"{array.shape[0]}: a label map in colours or layers")
    labels = check_labels(path, array[0], values)
    return labels, properties, not np.array_equal(labels, array[0])


def check_labels(
    path: Path | str, array: np.ndarray, values: Collection[int] | None = None
) -> np.ndarray:
    """Return labels (any shape) as integers; values within 1e-3 of one are rounded, which is said
    once. Raise ImageError if they are no whole numbers, or not declared."""
    check_finite(path, array)
    labels = array
    if array.dtype.kind == "f":
        nearest = np.rint(array)
        distance = np.abs(array - nearest)
        odd = array[(distance > ROUNDING) | (np.abs(nearest) >= 2**31)]
        if odd.size:
            raise ImageError(path, NOT_LABELS, f"it holds values such as {odd[0]:.6g}")
        if distance.any():
            _say_rounded(Path(path).parent)
        labels = nearest.astype(np.int32)
    if values is not None:
        found, counts = np.unique(labels, return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        others = [f"{value} ({count} voxels)" for value, count in pairs if value not in values]
        if others:
            known = ", ".join(map(str, sorted(values)))
            advice = f"Declared are {known}: declare them, or fix or remove the case."
            raise ImageError(path, UNDECLARED, ", ".join(others[:5]), advice)
    return labels


@cache
def _say_rounded(folder: Path) -> None:
    # Not into the line of a bar.
    tqdm.write(f"Note: label maps in {folder} are a little off whole numbers; rounded.")


def _read_header(path: Path | str) -> tuple[Any, Grid]:
    """Return ITK's reader with the header of an image, and its checked geometry."""
    check_start(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            advice = "ITK takes axes at right angles only: resample it."
            raise ImageError(path, SKEWED, advice=advice) from error
        raise ImageError(path, UNREADABLE, last_line(error)) from error
    is_complex = "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID())
    components = reader.GetNumberOfComponents() + is_complex
    if components > 1 and ending_of(path) not in (*PICTURES, *TIFF):
        raise ImageError(path, COMPONENTS, f"{components}: colours, vectors or layers of labels")
    size, axes = reader.GetSize(), reader.GetDimension()
    if len(size) < 2 or min(size) < 1 or any(count != 1 for count in size[3:]):
        raise ImageError(path, AXES if axes > 3 else UNREADABLE, f"{' x '.join(map(str, size))}")
    kept = min(axes, 3)
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:kept, :kept]
    spacing, origin = reader.GetSpacing()[:kept], reader.GetOrigin()[:kept]
    if ending_of(path) in NIFTI and kept == 3:
        header = nifti_header(path)
        if (header["pixdim"][1:4] < 0).any():
            # ITK turns such an axis round, though the affine says where it lies.
            affine = np.diag([-1.0, -1.0, 1.0]) @ header.get_best_affine()[:3]
            spacing, origin = np.linalg.norm(affine[:, :3], axis=0), affine[:, 3]
            direction = affine[:, :3] / np.where(spacing > 0, spacing, 1)
    _check_spacing(path, spacing)
    values = [tuple(map(float, x)) for x in (spacing, origin, direction.ravel())]
    if not np.isfinite([*values[1], *values[2]]).all():
        raise ImageError(path, "absurd position", f"origin {values[1]}")
    return reader, Grid(tuple(size[:kept]), *values)


def _check_spacing(path: Path | str, spacing: Any) -> None:
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ImageError(path, BAD_SPACING, f"{' x '.join(f'{x:g}' for x in spacing)} mm")


def _with_reader(path: Path | str, read: Callable[[], Any]) -> Any:
    """Return what a reader returns; what it raises becomes an ImageError, and what it prints is
    left out."""
    try:
        with contextlib.redirect_stdout(None):
            return read()
    except MemoryError:
        raise
    except Exception as error:  # each reader has its own
        raise ImageError(path, UNREADABLE, last_line(error)) from error
