"""Files of images: whether they are whole, and the other files that belong to them.

ITK and nibabel return rubbish or zeros where a file ends early. So a file's size, or its compressed
stream to the end, is compared with what its header asks for.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import shutil
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.utils.files import link_or_copy, sha256_of

NIFTI, META, NRRD = (".nii", ".nii.gz"), (".mha", ".mhd"), (".nrrd", ".nhdr")
TIFF, PICTURES = (".tif", ".tiff"), (".png", ".bmp", ".jpg", ".jpeg")
LINK, COPY, MOVE = "link", "copy", "move"
CANNOT_OPEN, UNREADABLE, CUT_OFF = "cannot be opened", "unreadable", "cut off or damaged"
COMPONENTS, AXES = "several values per voxel", "more than three axes"
SEVERAL_FILES = "voxels in several files, or as text"
_PIECE = 1 << 20
_HEADER_BYTES = 1 << 16
_DEFLATE_RATIO = 1040
"""No gzip stream holds more times its own size."""


class ImageError(PluginError):
    """An image that cannot be used: a reason, one of a few for counting, and what was found."""

    def __init__(self, path: Path | str, reason: str, detail: str = "", advice: str = "") -> None:
        found = f"{reason} ({detail})" if detail else reason
        super().__init__(f"{path}: {found}. {advice or 'Fix the file or leave the case out.'}")
        self.reason, self.detail = reason, detail


def ending_of(path: Path | str) -> str:
    """Return the ending that decides how a file is read, in small letters, such as ``.nii.gz``."""
    name = os.path.basename(path).lower()
    return ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]


def check_start(path: Path | str) -> None:
    """Raise an ImageError if a file cannot be opened, is empty, or is no gzip but called so."""
    try:
        # SimpleITK aborts the process when it is given such a name.
        os.fspath(path).encode()
        if Path(path).is_fifo():
            raise ImageError(path, CANNOT_OPEN, "not a file but a pipe")
        with open(path, "rb") as file:
            start = file.read(2)
    except UnicodeEncodeError as error:
        raise ImageError(ascii(str(path)), "name of the file", "not in UTF-8: rename it") from error
    except OSError as error:
        raise ImageError(path, CANNOT_OPEN, error.strerror or str(error)) from error
    if not start:
        raise ImageError(path, UNREADABLE, "empty file")
    if str(path).lower().endswith(".gz") and start != b"\x1f\x8b":
        raise ImageError(path, "not gzip", "though its name ends in .gz: compress or rename it")


# --- files that belong together


def side_files(path: Path | str, elsewhere: bool = False) -> list[Path]:
    """Return the other files that belong to an image: the voxels of a detached header (.mhd,
    .nhdr), and the .json with the spacing of nnU-Net's .tif. Voxels in other folders, which a
    header only points to, count with ``elsewhere``."""
    path = Path(path)
    ending = ending_of(path)
    if ending in (*META, *NRRD):
        data = _data_file(path, _fields(path)[0])
        return [data] if data and (elsewhere or data.parent == path.parent) else []
    if ending in TIFF:
        stem = path.name[: -len(ending)]
        names = dict.fromkeys((stem, re.sub(r"_\d{4}$", "", stem)))
        return [file for name in names if (file := path.with_name(f"{name}.json")).is_file()][:1]
    return []


def hash_of_image(path: Path) -> str:
    """Return the SHA-256 of an image with all files that belong to it."""
    hashes = [sha256_of(file) for file in (path, *side_files(path, elsewhere=True))]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


def place_image(source: Path, target: Path, how: str) -> None:
    """Link, copy or move an image with the files that belong to it, under names that appear when
    they are complete; nothing is done where the target is there. Raise ImageError if its voxels are
    in several files."""
    if os.path.lexists(target):
        return
    stem, new_stem = (x.name[: len(x.name) - len(ending_of(x))] for x in (source, target))
    header = None
    for other in side_files(source, elsewhere=True):
        if ending_of(source) in TIFF:
            # Without the channel, as in the name of the source's.
            name = f"{new_stem[: len(new_stem) - len(stem) + len(other.stem)]}.json"
        elif other.parent != source.parent:
            header = with_data_file(source, str(other.absolute()))
            continue
        else:
            name = other.name if stem == new_stem else f"{new_stem}{other.suffix}"
            header = with_data_file(source, name)
        _place_file(other, target.with_name(name), how)
    _place_file(source, target, how, header)


def _place_file(source: Path, target: Path, how: str, content: bytes | None = None) -> None:
    """Place one file, with other content if that is given."""
    if os.path.lexists(target):
        return
    if how == MOVE and content is None:
        os.replace(source, target)
        return
    partial = target.with_name(f".partial_{target.name}")
    partial.unlink(missing_ok=True)
    if content is not None:
        partial.write_bytes(content)
    elif how == COPY:
        shutil.copyfile(source, partial)
    else:
        link_or_copy(str(source.absolute()), partial)
    os.replace(partial, target)
    if how == MOVE:
        source.unlink(missing_ok=True)


# --- MetaImage and NRRD


def _fields(path: Path | str) -> tuple[dict[str, str], int]:
    """Return the fields of a MetaImage or NRRD header (names in small letters, without blanks) and
    how long it is."""
    is_meta = ending_of(path) in META
    with open(path, "rb") as file:
        content = file.read(_HEADER_BYTES)
    fields: dict[str, str] = {}
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        text = line.decode("latin-1").strip()
        key, separator, value = text.partition("=" if is_meta else ":")
        key = key.replace(" ", "").lower()
        if separator and not text.startswith("#"):
            fields.setdefault(key, value.lstrip("=").strip())
        if key == "elementdatafile" or (not is_meta and not text):
            break
    return fields, end


def _data_file(path: Path, fields: dict[str, str]) -> Path | None:
    """Return the file that holds the voxels of a header; None if they follow it."""
    name = fields.get("elementdatafile") or fields.get("datafile") or "LOCAL"
    if name.upper().startswith("LIST") or "%" in name:
        raise ImageError(path, SEVERAL_FILES, name, "Convert it to .mha or .nii.gz.")
    return None if name.upper() == "LOCAL" else path.parent / name


def with_data_file(path: Path, name: str) -> bytes:
    """Return a detached header that names another file for its voxels."""
    new = os.fsencode(name)
    pattern = rb"(?mi)^((?:ElementDataFile\s*=|data ?file\s*:)[ \t]*)[^\r\n]*"
    return re.sub(pattern, lambda match: match[1] + new, path.read_bytes(), count=1)


def check_data(path: Path | str, reader: Any) -> None:
    """Raise ImageError if a MetaImage, NRRD or GIPL file has fewer or more voxels than its header
    says, which ``reader``, ITK's, has read; other formats are not checked."""
    ending = ending_of(path)
    if ending not in (*META, *NRRD, ".gipl"):
        return
    pixel = sitk.Image([1] * reader.GetDimension(), reader.GetPixelID(), 1)
    voxel_bytes = reader.GetNumberOfComponents() * pixel.GetSizeOfPixelComponent()
    expected = math.prod(reader.GetSize()) * voxel_bytes
    if ending == ".gipl":
        _check_length(path, os.path.getsize(path) - 256, expected)
        return
    fields, header = _fields(path)
    detached = _data_file(Path(path), fields)
    if detached is not None and not detached.is_file():
        raise ImageError(path, CUT_OFF, f"its voxels should be in {detached}, which is not there")
    try:
        given = int(fields.get("headersize") or fields.get("byteskip") or 0)
        lines = int(fields.get("lineskip") or 0)
    except ValueError as error:
        raise ImageError(path, UNREADABLE, str(error)) from error
    encoding = fields.get("encoding", "raw").lower()
    if fields.get("compresseddata", "").lower() == "true":
        encoding = "gzip"
    is_text = fields.get("binarydata", "").lower() == "false"
    if is_text or lines or encoding not in ("raw", "gzip", "gz"):
        raise ImageError(path, SEVERAL_FILES, encoding, "Convert it to .nii.gz.")
    data = detached or Path(path)
    skip = (0 if detached else header) + max(given, 0)
    if encoding != "raw":
        _check_length(path, _stream_length(path, data, skip), expected)
    elif given >= 0 or data.stat().st_size < expected + skip:  # else they are the last bytes
        _check_length(path, data.stat().st_size - skip, expected)


def _stream_length(path: Path | str, data: Path, skip: int) -> int:
    """Decompress a stream to its end and return how long it is."""
    stream, length = zlib.decompressobj(32 + zlib.MAX_WBITS), 0  # gzip or zlib, whatever it is
    try:
        with data.open("rb") as file:
            file.seek(skip)
            while not stream.eof and (piece := file.read(_PIECE)):
                length += len(stream.decompress(piece))
    except (OSError, zlib.error) as error:
        raise ImageError(path, CUT_OFF, str(error)) from error
    if not stream.eof:
        raise ImageError(path, CUT_OFF, f"the compressed voxels end after {length} bytes")
    return length


def _check_length(path: Path | str, found: int, expected: int) -> None:
    if found != expected:
        raise ImageError(path, CUT_OFF, f"its header asks for {expected} bytes, it has {found}")


# --- NIfTI


def nifti_header(path: Path | str) -> Any:
    """Return nibabel's header of a NIfTI file, or raise an ImageError."""
    check_start(path)
    try:
        with _opened(path) as file:
            second = nibabel.Nifti2Header.may_contain_header(file.read(540))
            file.seek(0)
            kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
            header = kind.from_fileobj(file, check=False)
        header.get_data_shape(), header.get_data_dtype(), header.get_best_affine()
    except (EOFError, zlib.error, OSError) as error:
        raise ImageError(path, CUT_OFF, last_line(error)) from error
    except Exception as error:  # nibabel has several
        raise ImageError(path, UNREADABLE, last_line(error)) from error
    return header


def nifti_voxels(path: Path | str) -> np.ndarray:
    """Return the voxels (z, y, x) of a NIfTI file, read to its end, where the checksum is; raise
    ImageError if it is cut off, or holds no single volume of real numbers."""
    header = nifti_header(path)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if not len(shape) or any(count != 1 for count in shape[3:]):
        reason = COMPONENTS if len(shape) == 5 and shape[3] == 1 else AXES
        raise ImageError(path, reason, f"{' x '.join(map(str, shape))} voxels")
    if dtype.kind not in "iuf":
        raise ImageError(path, COMPONENTS, "colours or complex numbers")
    expected = int(header.get_data_offset()) + math.prod(map(int, shape)) * dtype.itemsize
    most = _DEFLATE_RATIO if str(path).lower().endswith(".gz") else 1
    if not 0 < expected <= os.path.getsize(path) * most:
        raise ImageError(path, CUT_OFF, f"its header asks for {expected} bytes")
    second = isinstance(header, nibabel.Nifti2Header)
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    try:
        with _opened(path) as file:
            voxels = kind.from_file_map(kind.make_file_map({"image": file}), mmap=False).dataobj
            scaled = (voxels.slope, voxels.inter) != (1, 0)
            array = np.asarray(np.asarray(voxels, np.float32) if scaled else voxels.get_unscaled())
            surplus = 0
            while piece := file.read(_PIECE):
                surplus += len(piece)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise whatever they happen to break
        raise ImageError(path, CUT_OFF, last_line(error)) from error
    if surplus:
        raise ImageError(path, CUT_OFF, f"{surplus} bytes more than its header asks for")
    # ITK has neither float128 nor foreign byte orders.
    native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    return array.astype(native, copy=False).reshape(shape[:3]).T


def _opened(path: Path | str) -> Any:
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")


# --- pictures


def picture_voxels(path: Path | str) -> np.ndarray:
    """Return the voxels of a .png, .bmp, .jpg or .tif as nnU-Net's readers see them; raise
    ImageError if it is cut off or damaged."""
    check_start(path)
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
