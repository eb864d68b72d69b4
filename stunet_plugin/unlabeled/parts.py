"""Parts of a run of ``stunet unlabeled``, for the jobs of an array: each prepares every N-th source
into a folder of its own, and the last one gives all their places, in the order of the search."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stunet_plugin.unlabeled.dataset import Dataset, Prepared
from stunet_plugin.unlabeled.manifest import FOLDER, Record
from stunet_plugin.utils.discovery import DICOM_FOLDER, Source
from stunet_plugin.utils.files import guarded, lock, write_atomically

PREPARED, DONE = "prepared.jsonl", "done"


class Part:
    """One part of a dataset: what it has prepared is in files, so that it can be killed.

    Args:
        count, number: of how many parts which one, 0 first.
    """

    def __init__(self, dataset: Dataset, count: int, number: int) -> None:
        self.dataset, self.count, self.number = dataset, count, number
        self.all_parts = dataset.records / "parts"
        self.folder = self._folder(number)

    def _folder(self, number: int) -> Path:
        return self.all_parts / f"{number}_of_{self.count}"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other part read or write the dataset meanwhile."""
        place = self.dataset.folder.parent / f".{self.dataset.folder.name}.lock"
        with lock(place, f"part works on {self.dataset.folder.name}", wait=True):
            yield

    def begin(self) -> Dataset:
        """Return the dataset for worker processes, which leave their files in the part's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / DONE).unlink(missing_ok=True)
        workers = copy.copy(self.dataset)
        workers.temporary = self.folder
        return workers

    def own(self, sources: Iterator[Source]) -> dict[str, tuple[int, Source]]:
        """Return the sources of this part that have to be looked at, by path, with their place in
        the search; those that a run prepared which was killed are not."""
        ready = {record.source: record for _, record, _ in self._entries(self.number)}
        wanted = {}
        for index, source in enumerate(sources):
            if index % self.count != self.number or self.dataset.is_done(source):
                continue
            known = ready.get(source.path)
            # Of a DICOM folder the record of the folder itself comes last.
            whole = known is not None and (known.status == FOLDER or source.kind != DICOM_FOLDER)
            if not whole or known is None or known.signature != source.signature:
                wanted[source.path] = index, source
        return wanted

    def keep(self, index: int, prepared: Prepared) -> None:
        """Note what became of the source at a place in the search."""
        names = [file.name for file in prepared.files]
        line = json.dumps({"index": index, "record": asdict(prepared.record), "files": names})
        with guarded(), (self.folder / PREPARED).open("a", encoding="ascii") as file:
            # On a line of its own, also after one that a kill cut off.
            file.write(f"\n{line}")

    def end(self) -> int:
        """Note that the part is done; return how many are not."""
        with guarded():
            write_atomically(self.folder / DONE, "")
        return sum(not (self._folder(x) / DONE).is_file() for x in range(self.count))

    def joined(self) -> Iterator[Prepared]:
        """Yield what all parts have prepared, in the order of the search."""
        entries = [entry for part in range(self.count) for entry in self._entries(part)]
        for _, record, files in sorted(entries, key=lambda entry: entry[0]):
            yield Prepared(record, files)

    def clear(self) -> None:
        shutil.rmtree(self.all_parts, ignore_errors=True)

    def _entries(self, number: int) -> Iterator[tuple[int, Record, tuple[Path, ...]]]:
        """Yield place, record and files of what a part has prepared, the last of each source."""
        folder, found = self._folder(number), dict[str, Any]()
        with contextlib.suppress(FileNotFoundError):
            for line in (folder / PREPARED).read_text(encoding="ascii").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # cut off by a kill
                    content = json.loads(line)
                    record = Record(**content["record"])
                    files = tuple(folder / name for name in content["files"])
                    key = f"{record.key}\n" if record.status == FOLDER else record.key
                    found.pop(key, None)
                    found[key] = content["index"], record, files
        for index, record, files in found.values():
            if all(map(_is_there, files)):
                yield index, record, files


def _is_there(file: Path) -> bool:
    return file.is_symlink() or file.is_file()
