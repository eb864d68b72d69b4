"""Files: read, hashed, linked and written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from stunet_plugin.errors import PluginError, last_line, setting

MAX_JSON_BYTES = 16 * 1024**2
HOME = "STUNET_HOME"
"""Environment variable: the folder for what is downloaded or made once for all datasets."""


def home() -> Path:
    """Return the folder for what is downloaded or made once: STUNET_HOME, or ``stunet`` in the
    user's caches. It need not be there yet."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if given := os.environ.get(HOME, "").strip():
            return Path(given).expanduser().absolute()
        # As the XDG specification has it, a relative path counts for nothing.
        return (caches if caches.is_absolute() else Path.home() / ".cache") / "stunet"
    except RuntimeError as error:
        raise PluginError(
            f"This user has no home folder. Run: {setting(HOME, '/path/to/a/folder')}"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a text file as UTF-8 (names of files in it need not be), whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".stunet_", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode(errors="surrogateescape"))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def lock(path: Path, who: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, so that no second process does the same; where one does ``who``, for
    example "run is making X", raise PluginError, or ``wait`` for its end."""
    held = filelock.FileLock(path)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        if not wait:
            raise PluginError(f"Another {who}. Wait for it to end.") from error
        print(f"Another {who}. Waiting for it to end.", flush=True)
        held.acquire()
    except (OSError, NotImplementedError):
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        held.release()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1024**2):
            digest.update(piece)
    return digest.hexdigest()


def folder_name(name: str) -> str:
    """Return a name of letters, digits, '-' and '_' for a folder."""
    return "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise PluginError if it is missing, too large, or none."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise PluginError(f"{path} is refused: such files take a few kB, not {size} bytes.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PluginError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise PluginError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def link_or_copy(path: str, target: Path) -> str:
    """Link to a file; where the file system has no symbolic links make a hard link, where it has
    none either, a copy."""
    for how, make in ((LINK, os.symlink), (HARD_LINK, os.link)):
        try:
            make(path, target)
        except FileExistsError:
            raise
        except (OSError, NotImplementedError):
            continue
        return how
    return copy_file(path, target)


LINK, HARD_LINK, COPY = "link", "hard link", "copy"


class OutputError(Exception):
    """The dataset cannot be written: a matter of the disk, not of the scan."""


def write_if_new(path: Path, text: str) -> None:
    """Write a text file, unless it says the same already."""
    if not path.is_file() or path.read_bytes() != text.encode(errors="surrogateescape"):
        write_atomically(path, text)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Raise OutputError for what goes wrong inside."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OutputError(getattr(error, "strerror", None) or last_line(error)) from error


def flush(path: Path) -> None:
    with path.open("r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def copy_file(path: str, target: Path) -> str:
    with guarded():
        shutil.copyfile(path, target)
        flush(target)
    return COPY


def without_nan(value: Any) -> Any:
    """Return tables and lists with None for numbers that are not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
