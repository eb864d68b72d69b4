"""Finding scans: a walk through folders that holds one folder's listing at a time, however many
scans there are."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import blake2b
from itertools import islice

from stunet_plugin.utils.image_files import CANNOT_OPEN, ImageError, side_files

NIFTI_GZ, NIFTI, NRRD, METAIMAGE, METAIMAGE_HEADER = ".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"
SCAN_ENDINGS = (NIFTI_GZ, NIFTI, NRRD, METAIMAGE, METAIMAGE_HEADER)
DATASET_ENDINGS = (NIFTI_GZ, METAIMAGE, NRRD, NIFTI)
"""Where a folder holds as many of two kinds, the first here wins."""
EXCLUDED = ("labelsTr", "labelsTs", "gt_segmentations")
"""Folders of labels in nnU-Net's layout."""
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
DICOM_MAGIC_AT, DICOM_MAGIC = 128, b"DICM"
DICOM_TRIALS = 3
"""Files without a telling name that are opened in a folder, to see whether it is one of DICOM."""
OTHER_ENDINGS_KEPT = 30
_WORD_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")

FILE, DICOM_FOLDER, DICOM_SERIES = "file", "DICOM folder", "DICOM series"


@dataclass(frozen=True)
class Source:
    """Something that may be a scan.

    Attributes:
        path: absolute; of a file, or of the folder of a DICOM series.
        kind: ``FILE``, ``DICOM_FOLDER`` (its series are not known yet) or ``DICOM_SERIES``.
        signature: sizes and times of the files; another signature is another content.
        series: instance UID of a DICOM series, with a number where it holds several stacks.
        files: names of its slices in their order in space.
        problem: reason and detail why it cannot be used, where the search has seen that already.
        unreachable: the problem may be gone at the next run.
    """

    path: str
    kind: str = FILE
    signature: str = ""
    series: str = ""
    files: tuple[str, ...] = ()
    modality: str = ""
    problem: tuple[str, str] | None = None
    unreachable: bool = False

    @property
    def key(self) -> str:
        """What it is known by from run to run."""
        return f"{self.path}\n{self.series}" if self.series else self.path


@dataclass
class Tally:
    """What a walk met, in numbers.

    Attributes:
        scans: files by ending (in lower case).
        dicom_folders: folders with DICOM files.
        others: files of other kinds, by ending.
    """

    scans: Counter[str] = field(default_factory=Counter)
    dicom_folders: int = 0
    others: Counter[str] = field(default_factory=Counter)

    @property
    def candidates(self) -> int:
        return sum(self.scans.values()) + self.dicom_folders

    def add_other(self, name: str) -> None:
        ending = os.path.splitext(name)[1].lower() or "no ending"
        known = ending in self.others or len(self.others) < OTHER_ENDINGS_KEPT
        self.others[ending if known else "other endings"] += 1

    def others_in_words(self) -> str:
        return ", ".join(f"{count} {ending}" for ending, count in self.others.most_common(5))


def scan_ending(name: str) -> str:
    """Return the ending of a scan's file name in lower case, or an empty string."""
    lower = name.lower()
    return next((ending for ending in SCAN_ENDINGS if lower.endswith(ending)), "")


def walk(
    folders: Sequence[str],
    exclude: Sequence[str],
    avoid: str | None = None,
    tally: Tally | None = None,
) -> Iterator[Source]:
    """Yield what may be scans, in an order that depends on the names alone.

    Links to folders are followed, but not back into a folder that they lie in. Hidden files and
    folders (a leading dot) are left out.

    Args:
        folders: absolute paths.
        exclude: patterns for names of files and folders to leave out.
        avoid: a folder to stay out of: the dataset that is being made.
        tally: is told what the walk meets.
    """
    walker = _Walker(
        exclude, _identity(avoid) if avoid and os.path.isdir(avoid) else None, tally or Tally()
    )
    for folder in folders:
        yield from walker.walk(folder, ())


@dataclass
class _Walker:
    exclude: Sequence[str]
    avoid: tuple[int, int] | None
    tally: Tally

    def walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Source]:
        try:
            identity = _identity(folder)
            if identity in above or identity == self.avoid:
                return
            with os.scandir(folder) as listing:
                entries = sorted(
                    (entry for entry in listing if self._wanted(entry.name)),
                    key=lambda entry: entry.name,
                )
        except OSError as error:
            yield _closed(folder, error.strerror or str(error))
            return
        folders: list[str] = []
        dicom: dict[str, os.DirEntry[str]] = {}
        single: dict[str, os.DirEntry[str]] = {}
        for entry in entries:
            if _is_folder(entry):
                slice_ = self._only_dicom(entry.path)
                if slice_ is not None:
                    single[os.path.join(entry.name, slice_.name)] = slice_
                folders.append(entry.path)
            elif ending := scan_ending(entry.name):
                self.tally.scans[ending] += 1
                yield _file_source(entry)
            elif _may_be_dicom(entry.name) and entry.is_file():
                dicom[entry.name] = entry
            else:
                self.tally.add_other(entry.name)
        del entries
        if len(single) > 1:
            # A folder per slice.
            dicom |= single
            together = {os.path.dirname(entry.path) for entry in single.values()}
            folders = [path for path in folders if path not in together]
        if dicom:
            yield from self._dicom(folder, dicom)
        for path in folders:
            yield from self.walk(path, (*above, identity))

    def _only_dicom(self, folder: str) -> os.DirEntry[str] | None:
        """The DICOM file of a folder that holds nothing else."""
        try:
            with os.scandir(folder) as listing:
                first = list(islice(filter(lambda x: self._wanted(x.name), listing), 2))
            if len(first) != 1 or scan_ending(first[0].name) or not first[0].is_file():
                return None
        except OSError:
            return None
        return first[0] if _may_be_dicom(first[0].name) and _is_dicom(first) else None

    def _wanted(self, name: str) -> bool:
        return not name.startswith(".") and not any(
            fnmatchcase(name, pattern) for pattern in self.exclude
        )

    def _dicom(self, folder: str, entries: dict[str, os.DirEntry[str]]) -> Iterator[Source]:
        if not _is_dicom(list(entries.values())):
            for name in entries:
                self.tally.add_other(name)
            return
        self.tally.dicom_folders += 1
        digest = blake2b(digest_size=16)
        try:
            for name, entry in entries.items():
                status = entry.stat()
                text = f"{name}\n{status.st_size}\n{status.st_mtime_ns}\n"
                digest.update(text.encode(errors="surrogateescape"))
        except OSError as error:
            yield _closed(folder, f"{name}: {error.strerror}", DICOM_FOLDER)
            return
        yield Source(folder, DICOM_FOLDER, digest.hexdigest(), files=tuple(entries))


def _closed(path: str, why: str, kind: str = FILE) -> Source:
    return Source(path, kind, problem=(CANNOT_OPEN, why), unreachable=True)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _file_source(entry: os.DirEntry[str]) -> Source:
    try:
        status = entry.stat()
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for ever.
            return _closed(entry.path, "not a file")
        signature = f"{status.st_size}-{status.st_mtime_ns}"
        with contextlib.suppress(ImageError):  # said by the reader
            for other in side_files(entry.path, elsewhere=True):
                if other.is_file():
                    status = other.stat()
                    signature += f" {status.st_size}-{status.st_mtime_ns}"
    except OSError as error:
        return _closed(entry.path, error.strerror or str(error))
    return Source(entry.path, FILE, signature)


def _may_be_dicom(name: str) -> bool:
    ending = os.path.splitext(name)[1].lower()
    return name != "DICOMDIR" and (ending in DICOM_ENDINGS or not _WORD_ENDING.fullmatch(ending))


def _is_dicom(entries: Sequence[os.DirEntry[str]]) -> bool:
    if any(entry.name.lower().endswith(DICOM_ENDINGS) for entry in entries):
        return True
    for entry in entries[:DICOM_TRIALS]:
        with contextlib.suppress(OSError), open(entry.path, "rb") as file:
            file.seek(DICOM_MAGIC_AT)
            if file.read(len(DICOM_MAGIC)) == DICOM_MAGIC:
                return True
    return False
