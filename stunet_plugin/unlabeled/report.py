"""What people look at after a run: tables of cases and of what was left out, a summary, a
picture."""

from __future__ import annotations

import csv
import filecmp
import heapq
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from stunet_plugin.unlabeled.contact_sheet import SheetCase, save_contact_sheet
from stunet_plugin.unlabeled.dataset import Choice, Dataset
from stunet_plugin.unlabeled.discovery import Tally
from stunet_plugin.unlabeled.image_files import is_in_place
from stunet_plugin.unlabeled.manifest import CASE, FAILED, FOLDER, Manifest, Record
from stunet_plugin.utils.files import write_if_new
from stunet_plugin.utils.image_files import CANNOT_OPEN
from stunet_plugin.utils.workers import run_ordered

CASES, SKIPPED, SUMMARY, PICTURE = "cases.csv", "skipped.csv", "summary.json", "contact_sheet.png"
SHEET_ROWS = 6
CASE_COLUMNS = ("case", "source", "series", "image", "size", "spacing", "lowest", "highest", "body")
SKIPPED_COLUMNS = ("source", "series", "reason", "detail", "tried_again")


def write_reports(
    dataset: Dataset, choice: Choice, manifest: Manifest, tally: Tally
) -> Counter[str]:
    """Write the tables and the summary; return how many sources were left out, by reason.

    Files that are right already are not touched. Cases that somebody removed from the data set are
    left out.
    """
    reasons: Counter[str] = Counter()
    number = missing = broken = 0
    with (
        _table(dataset.records / CASES, CASE_COLUMNS) as cases,
        _table(dataset.records / SKIPPED, SKIPPED_COLUMNS) as skipped,
    ):
        for record in manifest.records():
            if record.status == CASE:
                if not dataset.has(record.case, choice):
                    continue
                number += 1
                facts = {name: _flat(value) for name, value in record.facts.items()}
                cases(
                    {"case": record.case, "source": record.source, "series": record.series, **facts}
                )
                if not os.path.exists(record.source):
                    missing += 1
                    broken += not is_in_place(dataset.files_of(record.case, choice)[0])
            elif record.status != FOLDER and not _opens_now(record):
                reasons[record.reason] += 1
                again = "yes" if record.status == FAILED else "no"
                row = {"reason": record.reason, "detail": record.detail, "tried_again": again}
                skipped({"source": record.source, "series": record.series, **row})
    summary = {
        "dataset": dataset.folder.name,
        "modality": choice.modality,
        "file_ending": choice.file_ending,
        "cases": number,
        "left_out": dict(reasons.most_common()),
        "sources_missing": missing,
        "other_files": dict(tally.others.most_common()),
    }
    write_if_new(dataset.records / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if broken:
        print(
            f"{broken} of the cases lead to scans that are not there any more. nnU-Net leaves such"
            " cases out without a word, or stops at them. Bring the scans back to where"
            f" {dataset.records / CASES} says, or give the folder where they are now with -i: the"
            " cases then lead there."
        )
    return reasons


def write_picture(dataset: Dataset, choice: Choice, manifest: Manifest) -> bool:
    """Draw some cases with their masks, in a worker process; return whether that worked.

    The cases with the first names: names are hashes, so that is a random choice, and the same one
        every time.
    """
    cases = (record.case for record in manifest.records() if record.status == CASE)
    names = heapq.nsmallest(SHEET_ROWS, (case for case in cases if dataset.has(case, choice)))
    sheet = [SheetCase(name, *dataset.files_of(name, choice)) for name in names]
    temporary = dataset.temporary / PICTURE
    drawn = partial(save_contact_sheet, modality=choice.modality, path=temporary)
    result = next(run_ordered(iter([sheet]), drawn, processes=1))
    if result.failure:
        print(f"No picture: {result.failure}.")
        return False
    os.replace(temporary, dataset.records / PICTURE)
    return True


@contextmanager
def _table(path: Path, columns: tuple[str, ...]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A CSV file that replaces the old one at the end, if it differs."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".stunet_", suffix=".tmp")
    temporary = Path(name)
    try:
        # Names of files need not be text; surrogates stand for such bytes.
        with os.fdopen(handle, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            yield writer.writerow
        temporary.chmod(0o644)
        if path.is_file() and filecmp.cmp(path, temporary, shallow=False):
            return
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _opens_now(record: Record) -> bool:
    """Whether this is about a folder that an earlier run could not open, and that can be opened
    now."""
    of_folder = record.reason == CANNOT_OPEN and os.path.isdir(record.source)
    return of_folder and os.access(record.source, os.R_OK | os.X_OK)


def _flat(value: Any) -> Any:
    return " x ".join(f"{entry:g}" for entry in value) if isinstance(value, list) else value
