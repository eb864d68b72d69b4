"""Images and label maps, read strictly: what is cut off, not finite or of another kind is refused.

ITK and nibabel return rubbish or zeros where a file ends early. So a file's size, or its compressed
stream to the end, is checked against its header before voxels are believed.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk

from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.utils.files import link_or_copy
from stunet_plugin.utils.geometry import Grid

NIFTI, META, NRRD = (".nii", ".nii.gz"), (".mha", ".mhd"), (".nrrd", ".nhdr")
TIFF, PICTURES = (".tif", ".tiff"), (".png", ".bmp", ".jpg", ".jpeg")
DETACHED = (".mhd", ".nhdr")
"""Headers whose voxels are in another file."""
GZIP_MAGIC = b"\x1f\x8b"
ROUNDING = 1e-3
"""Label values that are this close to whole numbers are rounded."""
LINK, COPY, MOVE = "link", "copy", "move"
CANNOT_OPEN, UNREADABLE, CUT_OFF = "cannot be opened", "unreadable", "cut off or damaged"
NOT_FINITE, COMPONENTS, AXES = "not finite", "several values per voxel", "more than three axes"
BAD_SPACING, SKEWED, NOT_LABELS = "absurd spacing", "skewed axes", "not a label map"
UNDECLARED = "undeclared label values"
_PIECE = 1 << 20
_HEADER_BYTES = 1 << 16
_DEFLATE_RATIO = 1040
"""No gzip stream holds more times its own size."""


class ImageError(PluginError):
    """An image that cannot be used.

    Attributes:
        reason: one of a few, for counting.
        detail: what was found in this file.
    """

    def __init__(self, path: Path | str, reason: str, detail: str = "", advice: str = "") -> None:
        found = f"{reason} ({detail})" if detail else reason
        super().__init__(f"{path}: {found}. {advice or 'Fix the file or leave the case out.'}")
        self.reason, self.detail = reason, detail


class LabelArray(NamedTuple):
    """A label map.

    Attributes:
        labels: (z, y, x), integers.
        properties: its geometry, for the reader that writes it.
        rounded: whether the file holds other values than these.
    """

    labels: np.ndarray
    properties: dict[str, Any]
    rounded: bool


def ending_of(path: Path | str) -> str:
    """Return the ending that decides how a file is read, in small letters, such as ``.nii.gz``."""
    name = os.path.basename(path).lower()
    return ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]


def read_geometry(path: Path | str) -> Grid:
    """Return where the voxels of an image are, from its header alone; axes of length 1 after the
    third are dropped.

    Raises:
        ImageError: the header cannot be read, or is not that of one volume with one value per
            voxel (pictures may have colours).
    """
    reader = _read_header(path)
    components = reader.GetNumberOfComponents() + ("complex" in _pixel_type(reader))
    if components > 1 and ending_of(path) not in (*PICTURES, *TIFF):
        raise ImageError(path, COMPONENTS, f"{components}: colours, vectors or layers of labels")
    size, axes = reader.GetSize(), reader.GetDimension()
    _check_size(path, size)
    kept = min(axes, 3)
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:kept, :kept]
    grid = Grid(
        tuple(size[:kept]),
        tuple(reader.GetSpacing()[:kept]),
        tuple(reader.GetOrigin()[:kept]),
        tuple(float(value) for value in direction.ravel()),
    )
    if ending_of(path) in NIFTI:
        with _opened(path) as file:
            header = _nifti_class(path, file).header_class.from_fileobj(file, check=False)
        if (header["pixdim"][1 : kept + 1] < 0).any() and kept == 3:
            grid = _grid_of_affine(grid.size, _affine(path, header))
    _check_spacing(path, grid.spacing)
    if not np.isfinite([*grid.origin, *grid.direction]).all():
        raise ImageError(path, "absurd position", f"origin {grid.origin}")
    return grid


def read_image(path: Path | str) -> Any:
    """Return an image (sitk.Image of two or three axes) that is whole, finite, of one volume and,
    pictures apart, of one value per voxel.

    Raises:
        ImageError: it is not.
    """
    grid = read_geometry(path)
    if ending_of(path) in NIFTI:
        image = sitk.GetImageFromArray(_nifti_voxels(path).reshape(grid.size[::-1]))
    else:
        check_image(path)
        image = _read_itk(path)
        while image.GetDimension() > 3:
            image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    grid.apply_to(image)
    return image


def check_image(path: Path | str) -> None:
    """Read an image that one of nnU-Net's readers is to read then.

    Raises:
        ImageError: see :func:`read_image`; skewed axes and colours of pictures are left to that
            reader.
    """
    ending = ending_of(path)
    if ending in NIFTI:
        array = _nifti_voxels(path)
    elif ending in (*PICTURES, *TIFF):
        array = _picture(path)
    else:
        read_geometry(path)
        _check_data(path)
        array = sitk.GetArrayFromImage(_read_itk(path))
    check_finite(path, array)


def check_finite(path: Path | str, array: np.ndarray) -> None:
    """Raise an ImageError if voxels (any shape) are NaN or infinite."""
    if array.dtype.kind != "f":
        return
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ImageError(path, NOT_FINITE, f"{bad} of {array.size} voxels are NaN or infinite")


def read_label_map(path: Path | str, values: Collection[int] | None = None) -> Any:
    """Return a label map as a sitk.Image of integers.

    Args:
        path: of the file.
        values: that are declared; None takes any.

    Raises:
        ImageError: see :func:`read_image`, or it has values that are no whole numbers or that
            are not declared.
    """
    image = read_image(path)
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise ImageError(path, COMPONENTS, "a label map in colours")
    array = sitk.GetArrayViewFromImage(image)
    labels = check_labels(path, array, values)
    if labels is array:
        return image
    whole = sitk.GetImageFromArray(labels)
    whole.CopyInformation(image)
    return whole


def read_label_array(
    path: Path | str, reader: Any, values: Collection[int] | None = None
) -> LabelArray:
    """Return a label map as one of nnU-Net's readers sees it.

    Raises:
        ImageError: see :func:`read_label_map`, or the reader cannot read it.
    """
    check_image(path)
    array, properties = _with_reader(path, lambda: reader.read_seg(os.fspath(path)))
    if array.shape[0] != 1:
        raise ImageError(path, COMPONENTS, f"{array.shape[0]}: a label map in colours or layers")
    labels = check_labels(path, array[0], values)
    return LabelArray(labels, properties, not np.array_equal(labels, array[0]))


def read_images(
    paths: Sequence[Path], reader: Any, channels: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the images of a case (channel, z, y, x) and their geometry as one of nnU-Net's readers
    sees them.

    Raises:
        ImageError: see :func:`check_image`, the reader cannot read them, or they have another
            number of channels.
    """
    for path in paths:
        check_image(path)
    names = [os.fspath(path) for path in paths]
    array, properties = _with_reader(paths[0], lambda: reader.read_images(names))
    if len(array) != channels:
        found = f"{len(array)}, expected {channels}"
        raise ImageError(paths[0], "another number of channels", found)
    return array, properties


def _with_reader(path: Path | str, read: Callable[[], Any]) -> Any:
    try:
        with contextlib.redirect_stdout(None):
            return read()
    except Exception as error:  # each reader has its own
        raise ImageError(path, UNREADABLE, last_line(error)) from error


def check_labels(
    path: Path | str, array: np.ndarray, values: Collection[int] | None = None
) -> np.ndarray:
    """Return labels (any shape) as integers; values within 1e-3 of one are rounded, which is said
    once.

    Raises:
        ImageError: values that are no whole numbers, or not declared.
    """
    check_finite(path, array)
    labels = array
    if array.dtype.kind == "f":
        nearest = np.rint(array)
        distance = np.abs(array - nearest)
        if distance.max(initial=0) > ROUNDING:
            odd = array.ravel()[int(distance.argmax())]
            raise ImageError(path, NOT_LABELS, f"it holds values such as {odd:.6g}")
        if distance.max(initial=0) > 0:
            _say_once(f"Note: {path} and perhaps others hold labels such as 0.9999: rounded.")
        labels = nearest.astype(np.int32)
    if values is not None:
        found, counts = np.unique(labels, return_counts=True)
        odd = [(int(x), int(n)) for x, n in zip(found, counts, strict=True) if x not in values]
        if odd:
            listed = ", ".join(f"{value} ({count} voxels)" for value, count in odd[:5])
            known = ", ".join(map(str, sorted(values)))
            advice = f"Declared are {known}: declare them, or fix or remove the case."
            raise ImageError(path, UNDECLARED, listed, advice)
    return labels


_said: set[str] = set()


def _say_once(text: str) -> None:
    kind = text.split()[-1]
    if kind not in _said:
        _said.add(kind)
        print(text, flush=True)


def side_files(path: Path | str) -> list[Path]:
    """Return the other files that belong to an image: the voxels of a detached header (.mhd,
    .nhdr), and the .json with the spacing of nnU-Net's .tif."""
    path = Path(path)
    ending = ending_of(path)
    if ending in DETACHED:
        return _data_files(path, _fields(path)[0])
    if ending in TIFF:
        stem = path.name[: -len(ending)]
        names = dict.fromkeys((stem, re.sub(r"_\d{4}$", "", stem)))
        return [file for name in names if (file := path.with_name(f"{name}.json")).is_file()][:1]
    return []


def place_image(source: Path, target: Path, how: str) -> None:
    """Link, copy or move an image with the files that belong to it, under names that appear when
    they are complete; nothing is done where the target is there.

    Raises:
        ImageError: a detached header cannot be renamed, as its voxels are in several files.
    """
    if os.path.lexists(target):
        return
    others, renamed = side_files(source), source.name != target.name
    stem, new_stem = (str(x.name)[: -len(ending_of(x))] for x in (source, target))
    content = None
    for other in others:
        if ending_of(source) in TIFF:
            # Without the channel, as in the name of the source's.
            name = f"{new_stem[: len(new_stem) - len(stem) + len(other.stem)]}.json"
        elif renamed and len(others) > 1:
            raise ImageError(source, "voxels in several files", advice="Convert it to .mha.")
        else:
            name = f"{new_stem}{other.suffix}" if renamed else other.name
            content = _with_data_file(source, name)
        _place_file(other, target.with_name(name), how)
    if content is None:
        _place_file(source, target, how)
        return
    partial = target.with_name(f".partial_{target.name}")
    partial.write_bytes(content)
    os.replace(partial, target)
    if how == MOVE:
        source.unlink()


def _place_file(source: Path, target: Path, how: str) -> None:
    if os.path.lexists(target):
        return
    if how == MOVE:
        os.replace(source, target)
        return
    partial = target.with_name(f".partial_{target.name}")
    partial.unlink(missing_ok=True)
    if how == COPY:
        shutil.copyfile(source, partial)
    else:
        link_or_copy(str(source.absolute()), partial)
    os.replace(partial, target)


def _opened(path: Path | str) -> Any:
    """Return an open file, decompressed if it is a .gz, which then must be one."""
    _check_start(path)
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")


def _check_start(path: Path | str) -> None:
    """Raise an ImageError if a file cannot be opened, is empty, or is no gzip but called so."""
    try:
        # SimpleITK aborts the process when it is given such a name.
        os.fspath(path).encode()
        with open(path, "rb") as file:
            start = file.read(2)
    except UnicodeEncodeError as error:
        raise ImageError(ascii(str(path)), "name of the file", "not in UTF-8: rename it") from error
    except OSError as error:
        raise ImageError(path, CANNOT_OPEN, error.strerror or str(error)) from error
    if not start:
        raise ImageError(path, UNREADABLE, "empty file")
    if str(path).lower().endswith(".gz") and start != GZIP_MAGIC:
        raise ImageError(path, "not gzip", "though its name ends in .gz: compress or rename it")


def _read_header(path: Path | str) -> Any:
    _check_start(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            advice = "ITK takes axes at right angles only: resample it."
            raise ImageError(path, SKEWED, advice=advice) from error
        raise ImageError(path, UNREADABLE, last_line(error)) from error
    return reader


def _read_itk(path: Path | str) -> Any:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ImageError(path, UNREADABLE, last_line(error)) from error


def _pixel_type(reader: Any) -> str:
    return str(sitk.GetPixelIDValueAsString(reader.GetPixelID()))


def _check_size(path: Path | str, size: Iterable[int]) -> None:
    size = tuple(size)
    if len(size) < 2 or min(size) < 1 or any(count != 1 for count in size[3:]):
        reason = AXES if len(size) > 3 else UNREADABLE
        raise ImageError(path, reason, f"{' x '.join(map(str, size))} voxels; expected one volume")


def _check_spacing(path: Path | str, spacing: Iterable[float]) -> None:
    spacing = tuple(map(float, spacing))
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ImageError(path, BAD_SPACING, f"{' x '.join(f'{x:g}' for x in spacing)} mm")


def _nifti_class(path: Path | str, file: Any) -> Any:
    """Return nibabel's class for an open file and go back to its start."""
    try:
        start = file.read(4)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(path, CUT_OFF, str(error)) from error
    file.seek(0)
    return nibabel.Nifti2Image if 540 in _both_orders(start) else nibabel.Nifti1Image


def _both_orders(start: bytes) -> tuple[int, int]:
    return int.from_bytes(start, "little"), int.from_bytes(start, "big")


def _affine(path: Path | str, header: Any) -> np.ndarray:
    try:
        affine: np.ndarray = header.get_best_affine()
    except Exception as error:  # nibabel has several
        raise ImageError(path, UNREADABLE, last_line(error)) from error
    return affine


def _grid_of_affine(size: tuple[int, ...], affine: np.ndarray) -> Grid:
    """Return the grid of nibabel's affine: ITK turns axes with a negative pixdim round."""
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    direction = lps[:, :3] / np.where(spacing > 0, spacing, 1)
    return Grid(
        size, tuple(spacing.tolist()), tuple(lps[:, 3].tolist()), tuple(direction.ravel().tolist())
    )


def _nifti_voxels(path: Path | str) -> np.ndarray:
    """Return the voxels (z, y, x) of a NIfTI file, read to the end, where the checksum is."""
    with _opened(path) as file:
        kind = _nifti_class(path, file)
        try:
            header = kind.header_class.from_fileobj(file, check=False)
            shape, dtype = header.get_data_shape(), header.get_data_dtype()
            offset = int(header.get_data_offset())
            expected = offset + math.prod(map(int, shape)) * dtype.itemsize
        except (EOFError, zlib.error, OSError) as error:
            raise ImageError(path, CUT_OFF, last_line(error)) from error
        except Exception as error:  # nibabel has several
            raise ImageError(path, UNREADABLE, last_line(error)) from error
        _check_size(path, shape)
        if dtype.kind not in "iuf":
            raise ImageError(path, COMPONENTS, "colours or complex numbers")
        _check_spacing(path, np.abs(header["pixdim"][1 : min(len(shape), 3) + 1]))
        size = os.path.getsize(path)
        compressed = str(path).lower().endswith(".gz")
        if expected > size * (_DEFLATE_RATIO if compressed else 1):
            raise ImageError(path, CUT_OFF, f"its header asks for {expected} bytes")
        try:
            file.seek(0)
            file_map = kind.make_file_map({"image": file})
            voxels = kind.from_file_map(file_map, mmap=False).dataobj
            scaled = (voxels.slope, voxels.inter) != (1, 0)
            array = np.asarray(voxels, np.float32) if scaled else voxels.get_unscaled()
            surplus = 0
            while piece := file.read(_PIECE):
                surplus += len(piece)
        except MemoryError:
            raise
        except Exception as error:  # damaged files raise whatever they happen to break
            raise ImageError(path, CUT_OFF, last_line(error)) from error
    if surplus:
        raise ImageError(path, CUT_OFF, f"{surplus} bytes more than its header asks for")
    array = np.asarray(array)
    # float128 and other byte orders are nothing that ITK has.
    native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    return array.astype(native, copy=False).reshape(shape[:3]).T


def _picture(path: Path | str) -> np.ndarray:
    """Return the voxels of a .png, .bmp, .jpg or .tif as nnU-Net's readers see them."""
    _check_start(path)
    try:
        if ending_of(path) in TIFF:
            import tifffile

            array: np.ndarray = tifffile.imread(path)
        else:
            from PIL import Image
            from skimage.io import imread

            with Image.open(path) as picture:
                picture.verify()
            array = imread(path)
    except Exception as error:  # each library has its own
        raise ImageError(path, CUT_OFF, last_line(error)) from error
    if not array.size:
        raise ImageError(path, UNREADABLE, "no voxels")
    return array


def _fields(path: Path | str) -> tuple[dict[str, str], int]:
    """Return the fields of a MetaImage or NRRD header (names in small letters) and how long it
    is."""
    is_meta = ending_of(path) in META
    with open(path, "rb") as file:
        content = file.read(_HEADER_BYTES)
    fields: dict[str, str] = {}
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        text = line.decode("latin-1").strip()
        key, separator, value = text.partition("=" if is_meta else ":")
        if separator and not text.startswith("#"):
            fields.setdefault(key.strip().lower(), value.lstrip("=").strip())
        if (is_meta and key.strip() == "ElementDataFile") or (not is_meta and not text):
            break
    return fields, end


def _data_files(path: Path, fields: dict[str, str]) -> list[Path]:
    """Return the files that hold the voxels of a header; none if they follow it."""
    name = fields.get("elementdatafile") or fields.get("data file") or fields.get("datafile") or ""
    if name.upper() == "LOCAL" or not name:
        return []
    if name.upper().startswith("LIST"):
        with path.open("rb") as file:
            lines = file.read(_HEADER_BYTES).decode("latin-1").splitlines()
        first = next(i for i, line in enumerate(lines) if "LIST" in line.upper()) + 1
        return [path.parent / line.strip() for line in lines[first:] if line.strip()]
    if "%" in name:
        pattern = re.escape(name.split()[0])
        pattern = re.sub(r"%0?\d*d", r"\\d+", pattern)
        return sorted(x for x in path.parent.iterdir() if re.fullmatch(pattern, x.name))
    return [path.parent / name]


def _with_data_file(path: Path, name: str) -> bytes:
    """Return a detached header that names another file for its voxels."""
    content = path.read_bytes()
    new = os.fsencode(name)
    pattern = rb"(?mi)^((?:ElementDataFile\s*=|data ?file\s*:)[ \t]*)[^\r\n]*"
    return re.sub(pattern, lambda match: match[1] + new, content, count=1)


def _check_data(path: Path | str) -> None:
    """Raise an ImageError unless a MetaImage, NRRD or GIPL file holds the voxels that its header
    asks for: no fewer, no more."""
    ending = ending_of(path)
    if ending not in (*META, *NRRD, ".gipl"):
        return
    reader = _read_header(path)
    component = sitk.Image([1] * reader.GetDimension(), reader.GetPixelID(), 1)
    voxels = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
    expected = voxels * component.GetSizeOfPixelComponent()
    if ending == ".gipl":
        _check_length(path, os.path.getsize(path) - 256, expected)
        return
    fields, header = _fields(path)
    files = _data_files(Path(path), fields)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ImageError(path, CUT_OFF, f"its voxels should be in {missing[0]}, which is not there")
    skip = 0 if files else header
    encoding = fields.get("encoding", "raw").lower()
    if fields.get("compresseddata", "").lower() == "true":
        encoding = "gzip"
    elif fields.get("binarydata", "").lower() == "false":
        encoding = "text"
    given = int(fields.get("headersize") or fields.get("byte skip") or fields.get("byteskip") or 0)
    lines = int(fields.get("line skip") or fields.get("lineskip") or 0)
    if encoding in ("text", "txt", "ascii", "hex") or lines or len(files) > 1:
        if encoding == "raw" and not lines:
            _check_length(path, sum(x.stat().st_size for x in files), expected)
        elif encoding != "hex" and not lines:
            words = (files[0] if files else Path(path)).read_bytes()[skip:].split()
            _check_length(path, len(words), voxels)
        return
    data = files[0] if files else Path(path)
    if encoding == "raw":
        if given >= 0:
            _check_length(path, data.stat().st_size - skip - given, expected)
        return
    _check_length(path, _stream_length(path, data, skip + max(given, 0), encoding), expected)


def _stream_length(path: Path | str, data: Path, skip: int, encoding: str) -> int:
    """Decompress a stream to its end and return how long it is."""
    is_bzip2 = encoding in ("bzip2", "bz2")
    # gzip or zlib, whatever it is.
    stream: Any = bz2.BZ2Decompressor() if is_bzip2 else zlib.decompressobj(32 + zlib.MAX_WBITS)
    length = 0
    try:
        with data.open("rb") as file:
            file.seek(skip)
            while not stream.eof and (piece := file.read(_PIECE)):
                length += len(stream.decompress(piece))
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(path, CUT_OFF, str(error)) from error
    if not stream.eof:
        raise ImageError(path, CUT_OFF, f"the compressed voxels end after {length} bytes")
    return length


def _check_length(path: Path | str, found: int, expected: int) -> None:
    if found != expected:
        raise ImageError(path, CUT_OFF, f"its header asks for {expected} bytes, it has {found}")
