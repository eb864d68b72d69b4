"""What is settled before anything is written: where to look, the modality and the kind of files of
the dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from stunet_plugin.errors import PluginError
from stunet_plugin.unlabeled.checks import MODALITIES
from stunet_plugin.unlabeled.dataset import Choice
from stunet_plugin.unlabeled.discovery import (
    DATASET_ENDINGS,
    METAIMAGE,
    METAIMAGE_HEADER,
    SCAN_ENDINGS,
    Source,
    Tally,
    walk,
)
from stunet_plugin.unlabeled.manifest import CASE, FAILED, FOLDER
from stunet_plugin.unlabeled.prepare_case import probe, record_of
from stunet_plugin.utils.workers import run_ordered

PROBED_SCANS = 5
"""Per folder, to tell the modality."""
PROBED_SOURCES = 100
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Search:
    """Where the scans are looked for: absolute folders, patterns to leave out, and the dataset to
    stay out of."""

    folders: Sequence[str]
    exclude: Sequence[str]
    avoid: Path

    def sources(self, tally: Tally | None = None) -> Iterator[Source]:
        return walk(self.folders, self.exclude, str(self.avoid), tally)


def check_choice(
    existing: Choice, modality: str | None, file_ending: str | None, folder: Path
) -> None:
    """Raise if a run asks for something else than the dataset was begun with."""
    for option, given, has in (
        ("--modality", modality, existing.modality),
        ("--file-ending", file_ending, existing.file_ending),
    ):
        if given is not None and given != has:
            raise PluginError(
                f"{option} {given}: {folder} was begun with {has}, and a dataset has only one."
                f" Leave {option} out, or make another dataset with another -d."
            )


def check_tally(tally: Tally, folders: Sequence[str]) -> None:
    """Raise if there is nothing that could be a scan."""
    if tally.candidates:
        return
    others = tally.others_in_words()
    found = f"only other files: {others}" if others else "no files at all"
    pictures = any(ending in PICTURES for ending in tally.others)
    flat = " Pictures in 2D are no scans: volumes are needed." if pictures else ""
    raise PluginError(
        f"No scans in {', '.join(folders)}: {found}. Taken are {', '.join(SCAN_ENDINGS)} and DICOM"
        f" series, in folders of any depth.{flat} Nothing was written."
    )


def frequent_ending(tally: Tally) -> str:
    """Return the ending for the dataset: that of most files, because these can be linked."""
    counts = Counter({ending: tally.scans[ending] for ending in DATASET_ENDINGS})
    # The header of a .mhd file can be written as that of a .mha file.
    counts[METAIMAGE] += tally.scans[METAIMAGE_HEADER]
    return max(DATASET_ENDINGS, key=lambda ending: counts[ending])


def guess_modality(search: Search) -> str:
    """Return what the first scans of every folder look like.

    Raises:
        PluginError: they look like several modalities, or like none.
    """
    seen: Counter[str] = Counter()
    examples: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    for folder in search.folders:
        sources = islice(replace(search, folders=[folder]).sources(), PROBED_SOURCES)
        usable = 0
        for result in run_ordered(sources, probe, 1, further=lambda value: value.further):
            failed = record_of(result.task, FAILED, "could not be processed")
            record = result.value.record if result.value else failed
            if record.status == CASE:
                usable += 1
                if modality := record.facts["modality"]:
                    seen[modality] += 1
                    examples.setdefault(modality, record.source)
            elif record.status != FOLDER:
                reasons[record.reason] += 1
            if usable == PROBED_SCANS:
                break
    if len(seen) == 1:
        ((modality, count),) = seen.items()
        what = f"which the first scans look like ({count} seen; --modality overrules)"
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
        f"{count} like {modality}, for example {examples[modality]}"
        for modality, count in seen.most_common()
    )
    raise PluginError(
        f"Mixed modalities among the first scans: {found}. A dataset has one. {again}: scans of"
        " the other are then left out and listed. Or give the folders of one modality only (-i)."
        " Nothing was written."
    )
