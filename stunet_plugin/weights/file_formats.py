"""File formats of checkpoints, recognised by content; zip files checked without unpickling."""

from __future__ import annotations

import contextlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from stunet_plugin.errors import PluginError


class FileFormat(Enum):
    """The formats that are read here."""

    TORCH_ZIP = "torch file (zip format)"
    TORCH_LEGACY = "torch file (format before torch 1.6)"
    PICKLE = "plain pickle"
    SAFETENSORS = "safetensors"


DOWNLOAD_AGAIN = "Download it again and compare its size with what the download page says"
# The number that torch.save wrote first before 1.6 (0x1950a86a20f9469cfc6c), as pickle writes it.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_OTHER_FILES = {
    rb"\s*<(!doctype|html|head|\?xml|!--)|(?s:.{,1024})<html": "a web page (HTML), which a failed"
    " download leaves. Open the address in a browser, or take hf://ziyanhuang/STU-Net",
    rb"(?s:.{257})ustar": "a tar archive, as of torch before 0.1.10: unpack it, or save it again",
    rb"(?s:.{344})n[+i]1\0": "a NIfTI image. Images are for nnUNetv2_predict -i",
    rb"\x1f\x8b|7z\xbc\xaf|Rar!": "a gzip, 7z or rar archive: unpack it first",
    rb"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    rb"\s*\{": "text (JSON), often the error message of a download",
}
"""How other files begin, and what they are."""


def recognise(path: Path) -> FileFormat:
    """Return the format of a file; nothing is unpickled, and its name counts for nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise PluginError(f"{path} cannot be read: {reason}. Name a checkpoint file.") from error
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        _check_torch_zip(path)
        return FileFormat.TORCH_ZIP
    if _LEGACY_MAGIC in head[:64]:
        return FileFormat.TORCH_LEGACY
    if re.match(rb"\x80[\x02-\x05]", head):
        return FileFormat.PICKLE
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return FileFormat.SAFETENSORS
    start = head.removeprefix(b"\xef\xbb\xbf")
    with contextlib.suppress(zlib.error):
        # An image may be packed, an archive is what it is.
        unpacked = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head)
        start = unpacked if unpacked[345:348] in (b"+1\0", b"i1\0") else head
    found = (x for pattern, x in _OTHER_FILES.items() if re.match(pattern, start, re.IGNORECASE))
    other = f"neither a torch file nor a pickle: it starts with {head[:16]!r}. {DOWNLOAD_AGAIN}"
    raise PluginError(f"{path} is {next(found, other) if head else f'empty. {DOWNLOAD_AGAIN}'}.")


def check_integrity(path: Path) -> None:
    """Raise unless the checksums of a zip-format file hold; reads it once as a whole."""
    if zipfile.is_zipfile(path):
        with _open_zip(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise PluginError(f"{path}: the checksum of {damaged} is wrong. {DOWNLOAD_AGAIN}.")


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise PluginError(
            f"{path} begins like a zip-format torch file, but is truncated or damaged ({error};"
            f" {path.stat().st_size} bytes are there). {DOWNLOAD_AGAIN}."
        ) from error


def _check_torch_zip(path: Path) -> None:
    """Raise unless the archive has the layout that torch.save gives it, and nothing beside it."""
    with _open_zip(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    top = names[0].partition("/")[0] if names else ""
    if len(set(names)) != len(names):
        reason = "it names the same entry twice"
    elif f"{top}/data.pkl" not in names or not all(x.startswith(f"{top}/") for x in names):
        reason = (
            f"it is a zip archive, but no torch file ({len(names)} entries, for example"
            f" {names[:3]}). A model folder is unpacked first, or installed with"
            " nnUNetv2_install_pretrained_model_from_zip"
        )
    elif any(x == f"{top}/constants.pkl" or x.startswith(f"{top}/code/") for x in names):
        reason = "it is a TorchScript program, which is code"
    elif any(x.compress_type != zipfile.ZIP_STORED or x.flag_bits & 1 for x in entries):
        reason = "entries are compressed or encrypted, which torch never does"
    else:
        return
    raise PluginError(f"{path} is refused: {reason}.")
