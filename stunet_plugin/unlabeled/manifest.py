"""Records of what became of every source, in a sqlite file: a run can be killed at any moment."""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError

CASE, SKIPPED, FAILED, FOLDER = "case", "skipped", "failed", "folder"
"""A case of the dataset; unusable; not usable this time (tried again at the next run); a DICOM
folder that is done."""
DUPLICATE = "duplicate"
"""Reason: the same voxels as a case, which the record names."""
# Replaced records stay, not valid, until the next one is written: the last one may be taken back.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records
  (number INTEGER PRIMARY KEY AUTOINCREMENT, source, of_case, valid, content);
CREATE INDEX IF NOT EXISTS sources ON records (source);
CREATE INDEX IF NOT EXISTS cases ON records (of_case);
CREATE INDEX IF NOT EXISTS replaced ON records (valid) WHERE NOT valid;
"""


@dataclass(frozen=True)
class Record:
    """What became of a source.

    Attributes:
        source: path.
        signature: of the source when it was looked at.
        status: ``CASE``, ``SKIPPED``, ``FAILED`` or ``FOLDER``.
        series: of DICOM, else empty.
        case: name in the dataset; of a duplicate, that of the case which it equals.
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


class Manifest:
    """The records of a dataset: one of each source, and one source of each case.

    Args:
        folder: of the file, which need not exist.
        is_complete: whether the files of a case are in place; a last record of which they are not
            is taken back.

    Raises:
        PluginError: the file is damaged.
        OSError: it cannot be written.
    """

    FILE = "records.sqlite"

    def __init__(self, folder: Path, is_complete: Callable[[Record], bool]) -> None:
        self.path = folder / self.FILE
        # Without sqlite's locks, which some network file systems lack: the dataset has its own.
        uri = f"{self.path.absolute().as_uri()}?nolock=1"
        try:
            self._base = sqlite3.connect(uri, uri=True, isolation_level=None)
            self._base.executescript(_SCHEMA)
            last = self._one("1 ORDER BY number DESC")
        except sqlite3.OperationalError as error:
            raise OSError(errno.EIO, str(error)) from error
        except sqlite3.DatabaseError as error:
            raise PluginError(
                f"{self.path} is damaged ({error}). Remove it: the next run reads all scans again."
            ) from error
        if last is not None and last.status == CASE and not is_complete(last):
            with self._writing():
                newest = "(SELECT max(number) FROM records)"
                self._base.execute(f"DELETE FROM records WHERE number = {newest}")
                self._base.execute("UPDATE records SET valid = 1 WHERE NOT valid")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._base:
                self._base.execute("BEGIN")
                yield
        except sqlite3.OperationalError as error:
            raise OSError(errno.ENOSPC, f"{self.path.name}: {error}") from error

    def _one(self, which: str, *values: str) -> Record | None:
        found = self._base.execute(f"SELECT content FROM records WHERE {which} LIMIT 1", values)
        row = found.fetchone()
        return Record(**json.loads(row[0])) if row else None

    @property
    def cases(self) -> int:
        query = "SELECT count(*) FROM records WHERE valid AND of_case IS NOT NULL"
        return int(self._base.execute(query).fetchone()[0])

    def last(self, key: str) -> Record | None:
        """The record of a source."""
        return self._one("source = ? AND valid", json.dumps(key))

    def of_case(self, case: str) -> Record | None:
        """The record of a case."""
        return self._one("of_case = ? AND valid", case)

    def append(self, record: Record) -> None:
        """Write a record, unless it is the failure that the last run met.

        Raises:
            OSError: the disk is full.
        """
        if record.status == FAILED and self.last(record.key) == record:
            return
        # As ASCII: names of files need not be text.
        key, case = json.dumps(record.key), record.case if record.status == CASE else None
        values = (key, case, json.dumps(asdict(record)))
        with self._writing():
            run = self._base.execute
            run("DELETE FROM records WHERE NOT valid")
            run("UPDATE records SET valid = 0 WHERE source = ? OR of_case = ?", (key, case))
            run("INSERT INTO records (source, of_case, valid, content) VALUES (?, ?, 1, ?)", values)

    def records(self) -> Iterator[Record]:
        """The records in the order in which they were written."""
        query = "SELECT content FROM records WHERE valid ORDER BY number"
        for (content,) in self._base.execute(query):
            yield Record(**json.loads(content))

    def close(self) -> None:
        self._base.close()
