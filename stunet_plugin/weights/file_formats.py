"""What a file is, told from its content alone: nothing is unpickled here, and the name of the file
counts for nothing.

Downloads fail in well-known ways (an HTML page under the name of a checkpoint, half a file), and a
checkpoint of unknown origin may be built to do harm. Both end here, with a message, before anything
reads further.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from enum import Enum
from pathlib import Path, PurePosixPath

from stunet_plugin.errors import PluginError


class FileFormat(Enum):
    """The formats that the readers of this package know."""

    TORCH_ZIP = "torch file (zip format)"
    TORCH_LEGACY = "torch file (format before torch 1.6)"
    PICKLE = "plain pickle"


DOWNLOAD_AGAIN = "Download it again and compare its size with what the download page says."

_HEAD_BYTES = 4096
_ZIP_START = b"PK\x03\x04"
_EMPTY_ZIP_START = b"PK\x05\x06"
# The number that torch.save wrote first before 1.6 (0x1950a86a20f9469cfc6c), as pickle writes it.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_PICKLE_PROTOCOLS = range(2, 6)
_TAR_OFFSET = 257
_HTML_STARTS = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_KNOWN_STARTS = {
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a rar archive: unpack it first",
    b"\x89HDF": "an HDF5 file, which no release of STU-Net uses",
    b"version https://git-lfs": (
        "a Git LFS pointer, not the file that it points to: fetch that with `git lfs pull`"
    ),
    b"{": "text (JSON), often the error message of a download",
}


def recognise(path: Path) -> FileFormat:
    """Return the format of a file.

    Raises:
        PluginError: it is none of the known ones, truncated, or a zip archive that torch did not
            write; the message says what it is and what to do.
    """
    head = _read_head(path)
    if head.startswith((_ZIP_START, _EMPTY_ZIP_START)):
        _check_torch_zip(path)
        return FileFormat.TORCH_ZIP
    if _LEGACY_MAGIC in head[:64]:
        return FileFormat.TORCH_LEGACY
    if head[0] == 0x80 and len(head) > 1 and head[1] in _PICKLE_PROTOCOLS:
        return FileFormat.PICKLE
    raise PluginError(f"{path} is {_describe(head)}.")


def check_integrity(path: Path) -> None:
    """Compare the checksums that a zip-format torch file carries with its content (reads the whole
    file once).

    Raises:
        PluginError: a part is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise PluginError(f"{path} is damaged ({error}). {DOWNLOAD_AGAIN}") from error
    if damaged:
        raise PluginError(
            f"{path} is damaged: the checksum of its part {damaged} is wrong. {DOWNLOAD_AGAIN}"
        )


def _read_head(path: Path) -> bytes:
    if path.is_dir():
        raise PluginError(
            f"{path} is a folder. Name the checkpoint file in it, for example"
            f" {path / 'base_ep4k.model'}."
        )
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError as error:
        raise PluginError(f"{path}: there is no such file.") from error
    except OSError as error:
        raise PluginError(f"{path} cannot be read ({error.strerror}).") from error
    if not head:
        raise PluginError(f"{path} is empty. {DOWNLOAD_AGAIN}")
    return head


def _describe(head: bytes) -> str:
    """Say what a file that is no checkpoint is."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_HTML_STARTS) or b"<html" in text[:1024]:
        return (
            "a web page (HTML), not a checkpoint: what a download that failed or asked for a"
            " confirmation leaves. Open the address in a browser, or take the file from"
            " hf://ziyanhuang/STU-Net"
        )
    if head[_TAR_OFFSET : _TAR_OFFSET + 5] == b"ustar":
        return (
            "a tar archive (torch's format before 0.1.10 is one too). Unpack it, or save it again"
            " with a newer torch"
        )
    start = head
    if head.startswith(b"\x1f\x8b"):
        with contextlib.suppress(zlib.error):
            start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head)
    if start[344:348] in (b"n+1\0", b"ni1\0"):
        return "a NIfTI image, not a checkpoint. Images are for nnUNetv2_predict -i"
    for start, description in _KNOWN_STARTS.items():
        if head.lstrip().startswith(start):
            return description
    return (
        f"no checkpoint: it starts with {head[:16]!r}. Expected a file written by torch.save"
        f" (nnU-Net v1 .model, nnU-Net v2 .pth). {DOWNLOAD_AGAIN.removesuffix('.')}"
    )


def _check_torch_zip(path: Path) -> None:
    """Raise unless the archive has the layout that torch.save gives it, with nothing beside it and
    nothing compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise PluginError(
            f"{path} begins like a zip-format torch file, but its end is missing"
            f" ({path.stat().st_size} bytes are there): it is truncated. {DOWNLOAD_AGAIN}"
        ) from error
    names = [entry.filename for entry in entries]
    for name in names:
        if _points_outside(name):
            raise PluginError(
                f"{path} is refused: its entry {name!r} points outside of the archive, which torch"
                " never writes."
            )
    if len(set(names)) != len(names):
        raise PluginError(
            f"{path} is refused: it names the same entry twice, which torch never does."
        )
    tops = {PurePosixPath(name).parts[0] for name in names if PurePosixPath(name).parts}
    top = next(iter(tops), "")
    if len(tops) != 1 or f"{top}/data.pkl" not in names:
        raise PluginError(
            f"{path} is a zip archive, but no torch file ({len(names)} entries, for example"
            f" {names[:3]}). If it holds a model folder, unpack it and name the checkpoint in it;"
            " models of nnU-Net v2 are installed with nnUNetv2_install_pretrained_model_from_zip."
        )
    if f"{top}/constants.pkl" in names or any(name.startswith(f"{top}/code/") for name in names):
        raise PluginError(
            f"{path} is refused: it is a TorchScript program, which is code. Expected a checkpoint"
            " with weights."
        )
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise PluginError(
            f"{path} is refused: entries are compressed or encrypted, which torch never does."
        )


def _points_outside(name: str) -> bool:
    return (
        name.startswith(("/", "\\"))
        or "\\" in name
        or ":" in name
        or ".." in PurePosixPath(name).parts
    )
