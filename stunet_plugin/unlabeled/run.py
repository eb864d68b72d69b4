"""``stunet unlabeled``: folders of scans without labels become a dataset in nnUNet_raw."""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import joblib
from tqdm import tqdm

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import FOLDS
from stunet_plugin.unlabeled.checks import MODALITIES
from stunet_plugin.unlabeled.dataset import Dataset, Prepared
from stunet_plugin.unlabeled.manifest import CASE, FAILED, FOLDER, Record
from stunet_plugin.unlabeled.parts import Part
from stunet_plugin.unlabeled.prepare_case import prepare, probe, record_of
from stunet_plugin.unlabeled.report import PICTURE, SKIPPED, write_picture, write_reports
from stunet_plugin.utils.discovery import EXCLUDED, SCAN_ENDINGS, Source, Tally, walk
from stunet_plugin.utils.files import OutputError
from stunet_plugin.utils.image_files import PICTURES, TIFF
from stunet_plugin.utils.parts import check_part
from stunet_plugin.utils.workers import Finished, run_ordered

if TYPE_CHECKING:
    from stunet_plugin.commands.unlabeled import Unlabeled

PROBED_SCANS = 5
"""Per folder, to tell the modality."""
PROBED_SOURCES = 100
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
    check_part(options.num_parts, options.part_id)
    dataset = Dataset(options.dataset_id, options.name)
    folders = _input_folders(options.folders, dataset)
    search = partial(walk, exclude=(*EXCLUDED, *options.exclude), avoid=str(dataset.folder))
    _check_choice(options, dataset)
    print(f"Looking for scans in {', '.join(folders)}", flush=True)
    tally = Tally()
    for _ in search(folders, tally=tally):
        pass
    _check_tally(tally, folders)
    modality = dataset.modality or options.modality
    modality = modality or _guess_modality([search([folder]) for folder in folders])
    file_ending = dataset.file_ending or options.file_ending or tally.frequent_ending
    choice = f"{modality}, {file_ending}; into {dataset.folder}"
    print(f"  files and DICOM folders: {tally.candidates}; {choice}", flush=True)
    part = Part(dataset, options.num_parts, options.part_id)
    try:
        if part.count > 1:
            with part.alone():
                dataset.begin(modality, file_ending)
            return _run_part(part, partial(search, folders), tally, options)
        dataset.begin(modality, file_ending)
        with dataset.opened():
            results = partial(_prepare_all, dataset, search(folders), tally.candidates, options)
            return _collect(dataset, tally, results)
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


def _check_choice(options: Unlabeled, dataset: Dataset) -> None:
    """Raise if a run asks for something else than the dataset was begun with."""
    for option, given, has in (
        ("--modality", options.modality, dataset.modality),
        ("--file-ending", options.file_ending, dataset.file_ending),
    ):
        if has and given not in (None, has):
            raise PluginError(
                f"{option} {given}: {dataset.folder} was begun with {has}, and a dataset has only"
                f" one. Leave {option} out, or make another dataset with another -d."
            )


def _check_tally(tally: Tally, folders: Sequence[str]) -> None:
    """Raise if there is nothing that could be a scan."""
    if tally.candidates:
        return
    others = tally.others_in_words()
    found = f"only other files: {others}" if others else "no files at all"
    pictures = not tally.others.keys().isdisjoint((*PICTURES, *TIFF))
    flat = " Pictures in 2D are no scans: volumes are needed." if pictures else ""
    raise PluginError(
        f"No scans in {', '.join(folders)}: {found}. Taken are {', '.join(SCAN_ENDINGS)} and DICOM"
        f" series, in folders of any depth.{flat} Nothing was written."
    )


def _guess_modality(searches: Sequence[Iterator[Source]]) -> str:
    """Return what the first scans of every folder look like.

    Raises:
        PluginError: they look like several modalities, or like none.
    """
    seen: dict[str, list[str]] = defaultdict(list)
    reasons: Counter[str] = Counter()
    further = operator.attrgetter("further")
    for sources in searches:
        usable = 0
        for result in run_ordered(islice(sources, PROBED_SOURCES), probe, 1, further):
            record = _prepared(result).record
            if record.status == CASE:
                usable += 1
                if modality := record.facts["modality"]:
                    seen[modality].append(record.source)
            elif record.status != FOLDER:
                reasons[record.reason] += 1
            if usable == PROBED_SCANS:
                break
    if len(seen) == 1:
        ((modality, scans),) = seen.items()
        what = f"which the first scans look like ({len(scans)} seen; --modality overrules)"
        print(f"  taken for {modality}, {what}", flush=True)
        return modality
    again = f"Say which with --modality {' or '.join(MODALITIES)}"
    if not seen:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        raise PluginError(
            f"The first scans do not tell their modality{f' ({why})' if why else ''}. {again}."
            " Nothing was written."
        )
    found = "; ".join(
        f"{len(scans)} like {modality}, for example {scans[0]}" for modality, scans in seen.items()
    )
    raise PluginError(
        f"Mixed modalities among the first scans: {found}. A dataset has one. {again}: scans of"
        " the other are then left out and listed. Or give the folders of one modality only (-i)."
        " Nothing was written."
    )


def _prepared(result: Finished) -> Prepared:
    failed = record_of(result.task, FAILED, "could not be processed", result.failure)
    return result.value or Prepared(failed)


def _run_part(
    part: Part, search: Callable[[], Iterator[Source]], tally: Tally, options: Unlabeled
) -> int:
    """Prepare the sources of a part; the last part that ends makes the dataset of all."""
    dataset = part.dataset
    with part.alone(), dataset.opened():
        wanted = part.own(search())
    workers = part.begin()
    results = run_ordered(
        (source for _, source in wanted.values()),
        partial(prepare, workers, options.copy),
        options.processes or joblib.cpu_count(),
        further=lambda prepared: prepared.further,
    )
    with contextlib.closing(results):
        for prepared in map(_prepared, results):
            if prepared.disk_error:
                raise OutputError(prepared.disk_error)
            part.keep(wanted[prepared.record.source][0], prepared)
    with part.alone():
        if left := part.end():
            told = f"Part {part.number} of {part.count} is done ({len(wanted)} sources)"
            print(f"{told}; {left} are not. The last one makes the dataset of all.")
            return 0
        with dataset.opened():
            code = _collect(dataset, tally, partial(_commit_all, dataset, part.joined()))
        part.clear()
        return code


def _collect(dataset: Dataset, tally: Tally, work: Callable[[], None]) -> int:
    """Let the work add cases to the dataset, then write its description and reports."""
    started, before = time.monotonic(), dataset.manifest.cases
    try:
        work()
    finally:
        # Also when interrupted: what is finished can be used. On a full disk this makes room.
        dataset.clear_unfinished()
        if cases := dataset.count_cases():
            dataset.write_description(cases)
        reasons = write_reports(dataset, tally)
    new = dataset.manifest.cases - before
    if cases and (new or not (dataset.records / PICTURE).exists()):
        write_picture(dataset)
    seconds = time.monotonic() - started
    number = f"{cases} {'case' if cases == 1 else 'cases'}, {new} new"
    print(f"{dataset.folder.name}: {number}, in {seconds:.0f} s.")
    _say(dataset, tally, cases, reasons)
    return 0 if cases else 1


def _prepare_all(
    dataset: Dataset, sources: Iterator[Source], candidates: int, options: Unlabeled
) -> None:
    every = 0.5 if sys.stderr.isatty() else LINE_EVERY
    progress = tqdm(total=candidates, unit="scan", mininterval=every, maxinterval=every)
    new: Counter[str] = Counter()

    def wanted(source: Source) -> bool:
        done = dataset.is_done(source)
        progress.update(done)
        return not done

    results = run_ordered(
        filter(wanted, sources),
        partial(prepare, dataset, options.copy),
        options.processes or joblib.cpu_count(),
        further=lambda prepared: [*filter(wanted, prepared.further)],
    )

    def show(record: Record) -> None:
        new["new" if record.status == CASE else "left_out"] += 1
        progress.set_postfix(new, refresh=False)
        progress.update()

    # Closed at once when something is raised, so that no worker goes on.
    with progress, contextlib.closing(results):
        _commit_all(dataset, map(_prepared, results), show)


def _commit_all(
    dataset: Dataset, results: Iterable[Prepared], show: Callable[[Record], None] = lambda _: None
) -> None:
    """Give all that is prepared its place, and describe the dataset now and then."""
    failed_folders: set[str] = set()
    described = 0.0
    for prepared in results:
        if prepared.disk_error:
            raise OutputError(prepared.disk_error)
        if prepared.record.status == FOLDER and prepared.record.source in failed_folders:
            # To be looked into again.
            continue
        record = dataset.commit(prepared)
        if record.status == FAILED:
            failed_folders.add(record.source)
        if record.status == FOLDER:
            continue
        show(record)
        if record.status == CASE and time.monotonic() - described > DESCRIBE_EVERY:
            dataset.write_description(dataset.manifest.cases)
            described = time.monotonic()


def _say(dataset: Dataset, tally: Tally, cases: int, reasons: Counter[str]) -> None:
    for reason, count in reasons.most_common():
        print(f"  left out: {count:>6}  {reason}")
    if others := tally.others_in_words():
        print(f"  files of other kinds: {others}")
    print(f"Tables, summary and picture: {dataset.records}")
    if not cases:
        print(f"No scan could be used; {dataset.records / SKIPPED} says why.", file=sys.stderr)
        return
    if cases == 1:
        print("One scan only: Volume Fusion will take both of its sub-volumes from it.")
    if cases < FOLDS:
        print(
            f"Fewer than {FOLDS} scans cannot be split into nnU-Net's {FOLDS} folds: train with"
            " fold 'all'."
        )
    print(f"Next: nnUNetv2_plan_and_preprocess -d {dataset.dataset_id} -c 3d_fullres")
