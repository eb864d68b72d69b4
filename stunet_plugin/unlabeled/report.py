"""Reports of a run: tables of cases and of what was left out, a summary, a picture."""

from __future__ import annotations

import heapq
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk

from stunet_plugin.unlabeled.checks import CT
from stunet_plugin.unlabeled.dataset import Dataset
from stunet_plugin.unlabeled.image_files import is_in_place
from stunet_plugin.unlabeled.manifest import CASE, FAILED, FOLDER, Record
from stunet_plugin.utils.discovery import Tally
from stunet_plugin.utils.files import write_if_new
from stunet_plugin.utils.image_files import CANNOT_OPEN
from stunet_plugin.utils.workers import run_ordered

CASES, SKIPPED, SUMMARY, PICTURE = "cases.csv", "skipped.csv", "summary.json", "contact_sheet.png"
CASE_COLUMNS = ("case", "source", "series", "image", "size", "spacing", "lowest", "highest", "body")
SKIPPED_COLUMNS = ("source", "series", "reason", "detail", "tried_again")
SHEET_ROWS = 6
CT_WINDOW = (-1000.0, 400.0)
MR_PERCENTILES = (0.5, 99.5)
PLANES = ("axes y, x", "axes z, x", "axes z, y")
INCHES = 2.6


def write_reports(dataset: Dataset, tally: Tally) -> Counter[str]:
    """Write the tables and the summary, where they differ from what is there; return how many
    sources were left out, by reason. Cases that somebody removed from the dataset are not listed.
    """
    cases, skipped, missing, broken = [], [], 0, 0
    for record in dataset.manifest.records():
        one = {"source": record.source, "series": record.series}
        if record.status == CASE:
            if not dataset.has(record.case):
                continue
            facts = {name: _flat(value) for name, value in record.facts.items()}
            cases.append({"case": record.case, **one, **facts})
            if not os.path.exists(record.source):
                missing += 1
                broken += not is_in_place(dataset.files_of(record.case)[0])
        elif record.status != FOLDER and not _opens_now(record):
            found = {"reason": record.reason, "detail": record.detail}
            again = "yes" if record.status == FAILED else "no"
            skipped.append({**one, **found, "tried_again": again})
    _write_table(dataset.records / CASES, cases, CASE_COLUMNS)
    _write_table(dataset.records / SKIPPED, skipped, SKIPPED_COLUMNS)
    reasons = Counter(row["reason"] for row in skipped)
    summary = {
        "dataset": dataset.folder.name,
        "modality": dataset.modality,
        "file_ending": dataset.file_ending,
        "cases": len(cases),
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


def write_picture(dataset: Dataset) -> None:
    """Draw some cases with their masks, in a worker process.

    Those with the first names: names are hashes, so that is a random choice, always the same.
    """
    cases = (record.case for record in dataset.manifest.records() if record.status == CASE)
    names = heapq.nsmallest(SHEET_ROWS, (case for case in cases if dataset.has(case)))
    sheet = {name: dataset.files_of(name) for name in names}
    temporary = dataset.temporary / PICTURE
    draw = partial(save_contact_sheet, modality=dataset.modality, path=temporary)
    result = next(run_ordered(iter([sheet]), draw, processes=1))
    if result.failure:
        print(f"No picture: {result.failure}.")
    else:
        os.replace(temporary, dataset.records / PICTURE)


def save_contact_sheet(cases: dict[str, tuple[Path, Path]], modality: str, path: Path) -> bool:
    """Write a PNG with a row per case (image and label by name): the middle slices along each axis,
    in storage order, with the outline of the body."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * INCHES, len(cases) * INCHES), layout="constrained")
    rows = figure.subplots(len(cases), 3, squeeze=False)
    for row, (name, files) in zip(rows, cases.items(), strict=True):
        image, label = (sitk.ReadImage(str(file)) for file in files)
        array, mask = sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(label)
        low, high = CT_WINDOW if modality == CT else np.percentile(array, MR_PERCENTILES)
        for axis, (plot, plane) in enumerate(zip(row, PLANES, strict=True)):
            middle = array.shape[axis] // 2
            vertical, horizontal = np.delete(image.GetSpacing()[::-1], axis)
            gray, outline = (np.take(one, middle, axis=axis) for one in (array, mask))
            plot.imshow(gray, cmap="gray", vmin=low, vmax=high, aspect=vertical / horizontal)
            if outline.min() != outline.max():
                plot.contour(outline, levels=[0.5], colors="red", linewidths=0.8)
            body = f"{name}: body {mask.mean():.0%}"
            plot.set_title(f"{plane}, slice {middle}" if axis else body, fontsize=7)
            plot.set_axis_off()
    figure.savefig(path, dpi=90)
    return True


def _write_table(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    # As objects: numbers stay as they are where another case lacks one.
    table = pd.DataFrame(rows, columns=list(columns), dtype=object)
    # Names of files that are not UTF-8 are escaped: a table has one encoding.
    text = table.to_csv(index=False, lineterminator="\r\n")
    write_if_new(path, text.encode(errors="backslashreplace").decode())


def _opens_now(record: Record) -> bool:
    """Whether this is a folder that an earlier run could not open, and that opens now."""
    of_folder = record.reason == CANNOT_OPEN and os.path.isdir(record.source)
    return of_folder and os.access(record.source, os.R_OK | os.X_OK)


def _flat(value: Any) -> Any:
    return " x ".join(f"{entry:g}" for entry in value) if isinstance(value, list) else value
