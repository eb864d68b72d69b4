"""The record of what was done with every source: a line of JSON each, appended, so that a run can
be killed at any moment.

In memory stay a few numbers per source (hashes instead of names), never the lines.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

CASE, SKIPPED, FAILED, FOLDER = "case", "skipped", "failed", "folder"
"""A case of the data set; unusable; not usable this time (tried again at the next run); a DICOM
folder that is done."""

DUPLICATE = "duplicate"
"""Reason: the same voxels as a case, which the record names."""


@dataclass(frozen=True)
class Record:
    """What became of a source.

    Attributes:
        source: path.
        series: of DICOM, else empty.
        signature: of the source when it was looked at.
        status: ``CASE``, ``SKIPPED``, ``FAILED`` or ``FOLDER``.
        case: name in the data set; of a duplicate, that of the case which it equals.
        reason: why it was skipped, one of a few.
        detail: what was found.
        facts: of a case: how its image was made, shape, spacing, intensities, share of the body.
    """

    source: str
    signature: str
    status: str
    series: str = ""
    case: str = ""
    reason: str = ""
    detail: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.source}\n{self.series}" if self.series else self.source

    def to_line(self) -> bytes:
        content = {
            name: value for name, value in asdict(self).items() if value or name == "signature"
        }
        return json.dumps(content).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Read a line.

        Raises:
            ValueError: it is damaged.
        """
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(f"not a record: {error}") from error


class _Known(NamedTuple):
    offset: int
    signature: int
    case: int
    """Of its name; 0 if it is none."""


class Manifest:
    """The records of a data set. The last one of a source is the valid one, and so is the last one
    of a case: a scan that was moved is recorded anew, and what is known of its old place is
        forgotten."""

    def __init__(self, path: Path, is_complete: Callable[[Record], bool]) -> None:
        """Read what is there and make it ready for more.

        A last line that was torn by a kill is cut off, and so is a last case whose files were not
        yet in place.

        Args:
            path: of the file, which need not exist.
            is_complete: whether the files of a case are there.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        self.cases = 0
        self._known: dict[int, _Known] = {}
        self._failures: dict[int, str] = {}
        self._source_of: dict[int, int] = {}
        self._duplicates: set[int] = set()
        end = 0
        last: Record | None = None
        last_offset = 0
        if path.exists():
            for offset, line in _lines(path):
                if not line.endswith(b"\n"):
                    break
                end = offset + len(line)
                try:
                    record = Record.from_line(line)
                except ValueError:
                    continue
                if last is not None:
                    self._remember(last, last_offset)
                last, last_offset = record, offset
        if last is not None and last.status == CASE and not is_complete(last):
            end = last_offset
        elif last is not None:
            self._remember(last, last_offset)
        # Unbuffered: a line that the disk did not take must not come back later.
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size != end:
            os.truncate(path, end)
        self._end = end

    def _remember(self, record: Record, offset: int) -> None:
        key = _number(record.key)
        self._drop(key)
        case = _number(record.case) if record.status == CASE else 0
        if case:
            moved_from = self._known.get(before := self._source_of.get(case, 0))
            if moved_from is not None and moved_from.case == case:
                self._drop(before)
            self._source_of[case] = key
            self.cases += 1
        self._known[key] = _Known(offset, _number(record.signature), case)
        (self._duplicates.add if record.reason == DUPLICATE else self._duplicates.discard)(key)
        if record.status == FAILED:
            self._failures[key] = record.reason + record.detail
        else:
            self._failures.pop(key, None)

    def _drop(self, key: int) -> None:
        known = self._known.pop(key, None)
        self.cases -= known is not None and known.case != 0

    def __len__(self) -> int:
        return len(self._known)

    def is_done(self, key: str, signature: str) -> bool:
        """Whether a source was dealt with as it is now, for good."""
        number = _number(key)
        known = self._known.get(number)
        return (
            known is not None
            and known.signature == _number(signature)
            and number not in self._failures
        )

    def last(self, key: str) -> Record | None:
        """The valid record of a source."""
        return self._read(_number(key))

    def duplicate(self, key: str) -> Record | None:
        """The valid record of a source if it is a duplicate."""
        return self.last(key) if _number(key) in self._duplicates else None

    def of_case(self, case: str) -> Record | None:
        """The valid record of a case."""
        number = _number(case)
        key = self._source_of.get(number, 0)
        return self._read(key) if key in self._known and self._known[key].case == number else None

    def _read(self, key: int) -> Record | None:
        known = self._known.get(key)
        if known is None:
            return None
        with self.path.open("rb") as file:
            file.seek(known.offset)
            return Record.from_line(file.readline())

    def append(self, record: Record) -> None:
        """Add a record; a failure that the last run met in the same words is not written again.

        Raises:
            OSError: the disk is full.
        """
        if (
            record.status == FAILED
            and self._failures.get(_number(record.key)) == record.reason + record.detail
        ):
            return
        line = record.to_line()
        if self._file.write(line) != len(line):
            os.truncate(self.path, self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._remember(record, self._end)
        self._end += len(line)

    def records(self) -> Iterator[Record]:
        """The valid record of every source, in the order in which they were written."""
        for offset, line in _lines(self.path):
            try:
                record = Record.from_line(line)
            except ValueError:
                continue
            known = self._known.get(_number(record.key))
            if known is not None and known.offset == offset:
                yield record

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _number(text: str) -> int:
    return int.from_bytes(
        blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little"
    )
