"""``stunet unlabeled``: folders of scans without labels become a dataset in nnUNet_raw."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import joblib
from tqdm import tqdm

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import FOLDS
from stunet_plugin.unlabeled.dataset import Choice, Dataset
from stunet_plugin.unlabeled.discovery import EXCLUDED, Source, Tally
from stunet_plugin.unlabeled.manifest import CASE, FAILED, FOLDER, Manifest
from stunet_plugin.unlabeled.modality import (
    Search,
    check_choice,
    check_tally,
    frequent_ending,
    guess_modality,
)
from stunet_plugin.unlabeled.prepare_case import Prepared, prepare, record_of
from stunet_plugin.unlabeled.report import PICTURE, write_picture, write_reports
from stunet_plugin.utils.files import OutputError
from stunet_plugin.utils.workers import run_ordered

if TYPE_CHECKING:
    from stunet_plugin.commands.unlabeled import Unlabeled

DESCRIBE_EVERY = 2.0
"""Seconds between updates of dataset.json, so that a killed run leaves a usable dataset."""
LINE_EVERY = 30.0
"""Seconds between lines of progress in a log; a terminal's bar moves all the time."""


def run_unlabeled(options: Unlabeled) -> int:
    """Collect the scans; return 0 if the dataset has cases, 1 if it has none.

    Raises:
        PluginError: wrong input, or the disk is full; what is finished stays and the same command
            continues.
    """
    if options.processes is not None and options.processes < 1:
        raise PluginError(f"-np must be at least 1, not {options.processes}.")
    dataset = Dataset(options.dataset_id, options.name)
    folders = _input_folders(options.folders, dataset)
    search = Search(folders, (*EXCLUDED, *options.exclude), dataset.folder)
    existing = dataset.choice()
    if existing is not None and not dataset.count_cases(existing):
        # A run that found nothing, perhaps with the wrong modality, does not bind this one.
        existing = None
    if existing is not None:
        check_choice(existing, options.modality, options.file_ending, dataset.folder)
    print(f"Looking for scans in {', '.join(folders)}", flush=True)
    tally = Tally()
    for _ in search.sources(tally):
        pass
    check_tally(tally, folders)
    choice = existing or Choice(
        options.modality or guess_modality(search), options.file_ending or frequent_ending(tally)
    )
    print(
        f"  files and DICOM folders: {tally.candidates}; {choice.modality},"
        f" {choice.file_ending}; into {dataset.folder}",
        flush=True,
    )
    try:
        if existing is None:
            dataset.begin(choice)
        with dataset.locked(), contextlib.closing(dataset.open_manifest(choice)) as manifest:
            return _collect(options, dataset, search, tally, choice, manifest)
    except (OSError, OutputError) as error:
        raise PluginError(
            f"Cannot write to {dataset.folder}: {getattr(error, 'strerror', None) or error}. What"
            " is finished stays. Once mended, the same command continues."
        ) from error


def _input_folders(folders: tuple[str, ...], dataset: Dataset) -> list[str]:
    for folder in folders:
        if not os.path.isdir(folder):
            what = "is a file, not a folder" if os.path.exists(folder) else "is not there"
            raise PluginError(f"-i {folder} {what}.")
        if dataset.folder.resolve() in (path := Path(folder).resolve(), *path.parents):
            raise PluginError(f"-i {folder} lies in the dataset to be made, {dataset.folder}.")
    # Absolute but not resolved: a link that the user made may be moved to point elsewhere.
    return list(dict.fromkeys(os.path.abspath(folder) for folder in folders))


def _collect(
    options: Unlabeled,
    dataset: Dataset,
    search: Search,
    tally: Tally,
    choice: Choice,
    manifest: Manifest,
) -> int:
    started, before = time.monotonic(), manifest.cases
    try:
        _prepare_all(options, dataset, search, tally, choice, manifest)
    finally:
        # Also when interrupted: what is finished can be used. On a full disk this makes room.
        dataset.clear_unfinished()
        if cases := dataset.count_cases(choice):
            dataset.write_description(choice, cases)
        reasons = write_reports(dataset, choice, manifest, tally)
    new = manifest.cases - before
    if cases and (new or not (dataset.records / PICTURE).exists()):
        write_picture(dataset, choice, manifest)
    seconds = time.monotonic() - started
    number = f"{cases} {'case' if cases == 1 else 'cases'}, {new} new"
    print(f"{dataset.folder.name}: {number}, in {seconds:.0f} s.")
    _say(dataset, tally, cases, reasons)
    return 0 if cases else 1


def _prepare_all(
    options: Unlabeled,
    dataset: Dataset,
    search: Search,
    tally: Tally,
    choice: Choice,
    manifest: Manifest,
) -> None:
    every = 0.5 if sys.stderr.isatty() else LINE_EVERY
    progress = tqdm(total=tally.candidates, unit="scan", mininterval=every, maxinterval=every)
    new: Counter[str] = Counter()

    def wanted(source: Source) -> bool:
        done = dataset.is_done(source, manifest, choice)
        progress.update(done)
        return not done

    results = run_ordered(
        filter(wanted, search.sources()),
        partial(prepare, dataset.settings(choice, options.copy)),
        options.processes or joblib.cpu_count(),
        further=lambda prepared: [series for series in prepared.further if wanted(series)],
    )
    failed_folders: set[str] = set()
    described = 0.0
    # Closed at once when something is raised, so that no worker goes on.
    with progress, contextlib.closing(results):
        for result in results:
            prepared = result.value or Prepared(
                record_of(result.task, FAILED, "could not be processed", result.failure)
            )
            if prepared.disk_error:
                raise OutputError(prepared.disk_error)
            if prepared.record.status == FOLDER and prepared.record.source in failed_folders:
                # To be looked into again.
                continue
            record = dataset.commit(prepared, manifest, choice)
            if record.status == FAILED:
                failed_folders.add(record.source)
            if record.status == FOLDER:
                continue
            new["new" if record.status == CASE else "left_out"] += 1
            progress.set_postfix(new, refresh=False)
            progress.update()
            if record.status == CASE and time.monotonic() - described > DESCRIBE_EVERY:
                dataset.write_description(choice, manifest.cases)
                described = time.monotonic()


def _say(dataset: Dataset, tally: Tally, cases: int, reasons: Counter[str]) -> None:
    for reason, count in reasons.most_common():
        print(f"  left out: {count:>6}  {reason}")
    if others := tally.others_in_words():
        print(f"  files of other kinds: {others}")
    print(f"Tables, summary and picture: {dataset.records}")
    if not cases:
        table = dataset.records / "skipped.csv"
        print(f"No scan could be used; {table} says why for each.", file=sys.stderr)
        return
    if cases == 1:
        print("One scan only: Volume Fusion will take both of its sub-volumes from it.")
    if cases < FOLDS:
        print(
            f"Fewer than {FOLDS} scans cannot be split into nnU-Net's {FOLDS} folds: train with"
            " fold 'all'."
        )
    print(f"Next: nnUNetv2_plan_and_preprocess -d {dataset.dataset_id} -c 3d_fullres")
