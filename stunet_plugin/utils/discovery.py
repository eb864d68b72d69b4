"""Finding scans: a walk through folders that holds one folder's listing at a time, however many
scans there are."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
DICOM_TRIALS = 3
"""Files without a telling name that are opened in a folder, to see whether it is one of DICOM."""
OTHER_ENDINGS_KEPT = 30
_WORD_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")

Entry = os.DirEntry[str]
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
        modality, number: of the series, as DICOM says; empty where it does not.
        problem: reason and detail why it cannot be used, where the search has seen that already.
    """

    path: str
    kind: str = FILE
    signature: str = ""
    series: str = ""
    files: tuple[str, ...] = ()
    modality: str = ""
    number: str = ""
    problem: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """What it is known by from run to run."""
        return f"{self.path}\n{self.series}" if self.series else self.path

    @property
    def shown(self) -> str:
        """What messages call it."""
        return f"{self.path}, series {self.number or self.series}" if self.series else self.path


@dataclass
class Tally:
    """What a walk met, in numbers: scans by ending (in lower case), folders with DICOM files, and
    files of other kinds by ending."""

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

    @property
    def frequent_ending(self) -> str:
        """The ending for a dataset: that of most files, because these can be linked."""
        # The header of a .mhd file can be written as that of a .mha file.
        counts = self.scans + Counter({METAIMAGE: self.scans[METAIMAGE_HEADER]})
        return max(DATASET_ENDINGS, key=lambda ending: counts[ending])

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
    closed = (_identity(avoid),) if avoid and os.path.isdir(avoid) else ()
    for folder in folders:
        yield from _walk(folder, closed, exclude, tally or Tally())


def _walk(
    folder: str, closed: tuple[tuple[int, int], ...], exclude: Sequence[str], tally: Tally
) -> Iterator[Source]:
    try:
        identity = _identity(folder)
        if identity in closed:
            return
        with os.scandir(folder) as listing:
            entries = sorted(_wanted(listing, exclude), key=lambda entry: entry.name)
    except OSError as error:
        yield _closed(folder, error.strerror or str(error))
        return
    folders: list[str] = []
    dicom: dict[str, Entry] = {}
    single: dict[str, Entry] = {}
    for entry in entries:
        if _is(entry.is_dir):
            slice_ = _only_dicom(entry.path, exclude)
            if slice_ is not None:
                single[os.path.join(entry.name, slice_.name)] = slice_
            folders.append(entry.path)
        elif ending := scan_ending(entry.name):
            tally.scans[ending] += 1
            yield _file_source(entry)
        elif _may_be_dicom(entry.name) and _is(entry.is_file):
            dicom[entry.name] = entry
        else:
            tally.add_other(entry.name)
    del entries
    if len(single) > 1:
        # A folder per slice.
        dicom |= single
        together = {os.path.dirname(entry.path) for entry in single.values()}
        folders = [path for path in folders if path not in together]
    if _is_dicom(list(dicom.values())):
        tally.dicom_folders += 1
        yield _dicom_source(folder, dicom)
    else:
        for name in dicom:
            tally.add_other(name)
    for path in folders:
        yield from _walk(path, (*closed, identity), exclude, tally)


def _wanted(listing: Iterable[Entry], exclude: Sequence[str]) -> Iterator[Entry]:
    for entry in listing:
        if not any(fnmatchcase(entry.name, pattern) for pattern in (".*", *exclude)):
            yield entry


def _only_dicom(folder: str, exclude: Sequence[str]) -> Entry | None:
    """The DICOM file of a folder that holds nothing else."""
    with contextlib.suppress(OSError), os.scandir(folder) as listing:
        first = list(islice(_wanted(listing, exclude), 2))
        if len(first) == 1 and first[0].is_file() and _may_be_dicom(first[0].name):
            return first[0] if _is_dicom(first) else None
    return None


def _dicom_source(folder: str, entries: dict[str, Entry]) -> Source:
    digest = blake2b(digest_size=16)
    try:
        for name, entry in entries.items():
            status = entry.stat()
            text = f"{name}\n{status.st_size}\n{status.st_mtime_ns}\n"
            digest.update(text.encode(errors="surrogateescape"))
    except OSError as error:
        return _closed(folder, f"{name}: {error.strerror}", DICOM_FOLDER)
    return Source(folder, DICOM_FOLDER, digest.hexdigest(), files=tuple(entries))


def _closed(path: str, why: str, kind: str = FILE) -> Source:
    return Source(path, kind, problem=(CANNOT_OPEN, why))


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; a link in a circle is of none."""
    try:
        return kind()
    except OSError:
        return False


def _file_source(entry: Entry) -> Source:
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


def _is_dicom(entries: Sequence[Entry]) -> bool:
    if any(entry.name.lower().endswith(DICOM_ENDINGS) for entry in entries):
        return True
    for entry in entries[:DICOM_TRIALS]:
        with contextlib.suppress(OSError), open(entry.path, "rb") as file:
            if file.read(132)[128:] == b"DICM":
                return True
    return False
