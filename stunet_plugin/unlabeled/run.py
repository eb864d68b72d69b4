"""``stunet unlabeled``: folders of scans without labels become a dataset in nnUNet_raw."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import terminate_as_interrupt
from stunet_plugin.nnunet.names import FOLDS
from stunet_plugin.unlabeled.dataset import Choice, Dataset
from stunet_plugin.unlabeled.discovery import Source, Tally
from stunet_plugin.unlabeled.manifest import CASE, FAILED, FOLDER, Manifest
from stunet_plugin.unlabeled.modality import (
    Search,
    check_choice,
    check_tally,
    frequent_ending,
    guess_modality,
)
from stunet_plugin.unlabeled.names import EXCLUDED
from stunet_plugin.unlabeled.prepare_case import Prepared, prepare, record_of
from stunet_plugin.unlabeled.report import PICTURE, write_picture, write_reports
from stunet_plugin.utils.files import OutputError
from stunet_plugin.utils.progress import Progress, in_words
from stunet_plugin.utils.workers import run_ordered

DESCRIBE_EVERY = 2.0
"""Seconds between updates of dataset.json, so that a killed run leaves a usable data set."""
INTERRUPTED = 130


@dataclass(frozen=True)
class UnlabeledOptions:
    """What the user asked for; see ``stunet unlabeled --help``."""

    folders: Sequence[str]
    dataset_id: int
    name: str
    modality: str | None = None
    processes: int | None = None
    file_ending: str | None = None
    copy: bool = False
    exclude: Sequence[str] = ()

    @classmethod
    def from_arguments(cls, given: Any) -> UnlabeledOptions:
        choices = (given.modality, given.processes, given.file_ending, given.copy, given.exclude)
        return cls(given.folders, given.dataset_id, given.name, *choices)


def run_unlabeled(options: UnlabeledOptions) -> int:
    """Collect the scans; return 0 if the data set has cases, 1 if it has none, 130 if interrupted.

    Raises:
        PluginError: wrong input, or the disk is full; what is finished stays and the same command
            continues.
    """
    dataset = Dataset(options.dataset_id, options.name)
    search = Search(
        _input_folders(options.folders, dataset), (*EXCLUDED, *options.exclude), dataset.folder
    )
    processes = _processes(options.processes)
    with terminate_as_interrupt():
        try:
            return _Collecting(options, dataset, search, processes).run()
        except KeyboardInterrupt:
            print(
                "\nInterrupted. What is finished can be used. The same command continues:"
                f" {dataset.folder}",
                file=sys.stderr,
            )
            return INTERRUPTED


def _input_folders(folders: Sequence[str], dataset: Dataset) -> list[str]:
    for folder in folders:
        if not os.path.isdir(folder):
            raise PluginError(
                f"-i {folder}"
                f" {'is a file, not a folder' if os.path.exists(folder) else 'is not there'}."
            )
        if dataset.folder.resolve() in (path := Path(folder).resolve(), *path.parents):
            raise PluginError(
                f"-i {folder} lies in the dataset that is to be made, {dataset.folder}."
            )
    # Absolute but not resolved: a link that the user made may be moved to point elsewhere, and
    # shall then be followed.
    return list(dict.fromkeys(os.path.abspath(folder) for folder in folders))


def _processes(given: int | None) -> int:
    if given is not None and given < 1:
        raise PluginError(f"-np must be at least 1, not {given}.")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return given or cores


class _Collecting:
    """One run."""

    def __init__(
        self, options: UnlabeledOptions, dataset: Dataset, search: Search, processes: int
    ) -> None:
        self.options, self.dataset, self.search, self.processes = (
            options,
            dataset,
            search,
            processes,
        )
        self.tally = Tally()

    def run(self) -> int:
        started = time.monotonic()
        existing = self.dataset.choice()
        if existing is not None and not self.dataset.count_cases(existing):
            # A run that found nothing to use, perhaps with the wrong modality, does not bind this
            # one.
            existing = None
        if existing is not None:
            check_choice(
                existing, self.options.modality, self.options.file_ending, self.dataset.folder
            )
        print(f"Looking for scans in {', '.join(self.search.folders)}", flush=True)
        for _ in self.search.sources(self.tally):
            pass
        check_tally(self.tally, self.search.folders)
        choice = existing or Choice(
            self.options.modality or guess_modality(self.search),
            self.options.file_ending or frequent_ending(self.tally),
        )
        print(
            f"  files and DICOM folders: {self.tally.candidates}; {choice.modality},"
            f" {choice.file_ending}; processes: {self.processes}; into {self.dataset.folder}",
            flush=True,
        )
        try:
            if existing is None:
                self.dataset.begin(choice)
            with self.dataset.locked():
                manifest = self.dataset.open_manifest(choice)
                try:
                    return self._collect(manifest, choice, started)
                finally:
                    manifest.close()
        except (OSError, OutputError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            raise PluginError(
                f"Cannot write to {self.dataset.folder}: {reason}. What is finished stays. Once"
                " mended, the same command continues."
            ) from error

    def _collect(self, manifest: Manifest, choice: Choice, started: float) -> int:
        before = manifest.cases
        try:
            self._prepare_all(manifest, choice)
        finally:
            # Also when interrupted: what is finished can be used. On a full disk this makes room
            # for it.
            self.dataset.clear_unfinished()
            if cases := self.dataset.count_cases(choice):
                self.dataset.write_description(choice, cases)
            reasons = write_reports(self.dataset, choice, manifest, self.tally)
        if cases and (manifest.cases != before or not (self.dataset.records / PICTURE).exists()):
            write_picture(self.dataset, choice, manifest)
        self._say(cases, manifest.cases - before, reasons, time.monotonic() - started)
        return 0 if cases else 1

    def _prepare_all(self, manifest: Manifest, choice: Choice) -> None:
        progress = Progress(self.tally.candidates)
        settings = self.dataset.settings(choice, self.options.copy)

        def wanted(source: Source) -> bool:
            done = self.dataset.is_done(source, manifest, choice)
            progress.known += done
            return not done

        results = run_ordered(
            filter(wanted, self.search.sources()),
            partial(prepare, settings),
            self.processes,
            further=lambda prepared: [series for series in prepared.further if wanted(series)],
        )
        failed_folders: set[str] = set()
        described = 0.0
        # Closed at once when something is raised, so that no worker goes on.
        with contextlib.closing(results):
            for result in results:
                prepared = result.value
                if prepared is None:
                    prepared = Prepared(
                        record_of(result.task, FAILED, "could not be processed", result.failure)
                    )
                if prepared.disk_error:
                    raise OutputError(prepared.disk_error)
                if prepared.record.status == FOLDER and prepared.record.source in failed_folders:
                    # To be looked into again.
                    continue
                record = self.dataset.commit(prepared, manifest, choice)
                if record.status == FAILED:
                    failed_folders.add(record.source)
                if record.status == FOLDER:
                    continue
                progress.add(record.status == CASE)
                if record.status == CASE and time.monotonic() - described > DESCRIBE_EVERY:
                    self.dataset.write_description(choice, manifest.cases)
                    described = time.monotonic()
        progress.end()

    def _say(self, cases: int, new: int, reasons: Counter[str], seconds: float) -> None:
        records = self.dataset.records
        print(
            f"{self.dataset.folder.name}: {cases} {'case' if cases == 1 else 'cases'}, {new} new,"
            f" in {in_words(seconds)}."
        )
        for reason, count in reasons.most_common():
            print(f"  left out: {count:>6}  {reason}")
        if others := self.tally.others_in_words():
            print(f"  files of other kinds: {others}")
        print(f"Tables, summary and picture: {records}")
        if not cases:
            print(
                f"No scan could be used; {records / 'skipped.csv'} says why for each.",
                file=sys.stderr,
            )
            return
        if cases == 1:
            print("One scan only: Volume Fusion will take both of its sub-volumes from it.")
        if cases < FOLDS:
            print(
                f"Fewer than {FOLDS} scans cannot be split into nnU-Net's {FOLDS} folds: train with"
                " fold 'all'."
            )
        number = self.dataset.dataset_id
        print(f"Next: nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres")
