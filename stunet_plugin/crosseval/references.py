"""References of a comparison: datasets, whose cases have label maps in one label system.

A dataset is a raw dataset of nnU-Net, or a folder of images and one of references. Where only
finished predictions are compared, the references alone will do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from stunet_plugin.crosseval.entries import DATASET_ENTRIES, ORIGIN, OWN_LABELS, PARTS, Entry, check
from stunet_plugin.datasets.raw_dataset import Case, find_raw, read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.label_systems import LabelSystem, load_label_system

PLACES = {"images": "images", "references": "labels"}
"""Keys of an entry, and what the folders of a raw dataset are called, with the part at the end."""
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
"""Of images and label maps; SimpleITK reads them."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Cases with references in one label system.

    Attributes:
        ending: of the references, and of predictions that are made.
        origin: folder, part, images, references: where the cases come from, as the user gave it;
            the folder in full.
        left_out: number of cases without a prediction, which are no longer among the cases.
        labels_from: the label system's name or file as the user gave it, or :data:`OWN_LABELS`.
    """

    name: str
    labels: LabelSystem
    ending: str
    cases: tuple[Case, ...] = field(repr=False)
    origin: Mapping[str, str] = field(default_factory=dict, repr=False)
    labels_from: str = OWN_LABELS
    left_out: int = 0
    kind: ClassVar = "dataset"

    def describe(self) -> dict[str, Any]:
        """Return where its cases are, how many, and what their labels mean, as JSON has it."""
        return {
            **self.origin,
            "cases": len(self.cases),
            **describe_labels(self.labels, self.labels_from),
        }


def describe_labels(labels: LabelSystem, labels_from: str) -> dict[str, Any]:
    """Return what labels mean, as JSON has it."""
    return {"labels": labels.name, "labels_from": labels_from, "classes": list(labels.classes)}


def read_dataset(entry: Entry) -> Dataset:
    """Read a dataset's entry (of a file or of ``--dataset``) and list its cases; raise PluginError
    for unknown entries, no such folders, no references, or images without one. Images may be left
    out where nothing has to be predicted.

    A raw dataset of nnU-Net is given by ``folder`` (a path, or an ID or name in nnUNet_raw;
    ``part``: Tr or Ts), anything else by ``images`` and ``references``. Images are named
    ``CASE_0000.nii.gz``, one per channel, or, with one channel, ``CASE.nii.gz``; references
    ``CASE.nii.gz``.
    """
    where = f"Dataset {entry.get('name')}"
    check({"name": None, **entry}, DATASET_ENTRIES, where)
    part = entry.get("part", PARTS[0])
    origin = {key: str(entry[key]) for key in ORIGIN if key in entry}
    places: dict[str, Path] = {x: Path(origin[x]).expanduser() for x in PLACES if x in origin}
    cases: tuple[Case, ...] = ()
    if "folder" in entry:
        folder = find_raw(os.path.expanduser(origin["folder"]))
        # In full: an ID says nothing to somebody who reads the report elsewhere.
        origin["folder"] = str(folder)
        description = folder / OWN_LABELS
        if "labels" not in entry and not description.is_file():
            raise PluginError(
                f"{where}: {folder} has no dataset.json, which says what labels mean. Give labels."
            )
        if len(origin) == 1 and description.is_file() and "dataset" in read_json(description):
            cases = read_raw(folder).cases  # that dataset.json lists, as nnU-Net allows
        if len(places) < 2:
            origin.setdefault("part", "listed in dataset.json" if cases else part)
        places = {x: places.get(x, folder / f"{y}{part}") for x, y in PLACES.items()}
    else:
        folder = _described(places, entry, where)
    labels = load_label_system(entry.get("labels", folder))
    cases = cases or _cases_in(places.get("images"), places["references"], where)
    channels = {len(case.images): case.name for case in cases}
    if len(channels) > 1:
        found = " and ".join(f"{name} has {count}" for count, name in channels.items())
        raise PluginError(f"{where}: cases differ in their number of channels: {found}.")
    ending = ending_of_map(cases[0].label)
    if not ending:
        raise PluginError(f"{where}: {cases[0].label} ends in none of {', '.join(ENDINGS)}.")
    return Dataset(
        entry["name"], labels, ending, cases, origin, str(entry.get("labels", OWN_LABELS))
    )


def _described(places: Mapping[str, Path], entry: Entry, where: str) -> Path:
    """Return the folder whose ``dataset.json`` says what references mean that are no part of a raw
    dataset: their own, or the one above (of ``labelsTr``). It is not looked at if labels are
    given."""
    if references := places.get("references"):
        for folder in (references, references.absolute().parent):
            if "labels" in entry or (folder / OWN_LABELS).is_file():
                return folder
        if references.is_dir() and "images" not in places:
            raise PluginError(
                f"{where}: {references} has no dataset.json, which says what label values mean. Add"
                " ,labels=FILE, such as one with {labels: {liver: 1, spleen: 2}}, or the name of a"
                " published label system."
            )
    raise PluginError(
        f"{where}: give folder (a raw dataset of nnU-Net), or images, references and labels;"
        " no images are needed where all predictions are there (--predictions). labels is a"
        " published label system, or a file such as {labels: {liver: 1, spleen: 2}}."
    )


def _cases_in(images: Path | None, references: Path, where: str) -> tuple[Case, ...]:
    for folder, kind in ((images, "images"), (references, "references")):
        if folder and not folder.is_dir():
            both = {x: [folder.parent / f"{y}{x}" for y in ("images", "labels")] for x in PARTS}
            parts = [f"part={part}" for part in PARTS if all(map(Path.is_dir, both[part]))]
            hint = f" Parts with images and references: {', '.join(parts)}." if parts else ""
            raise PluginError(f"{where}: there is no folder of {kind} {folder}.{hint}")
    known = files_by_name(references, where)
    if images is None:
        if not known:
            raise PluginError(
                f"{where}: no files in {references} that end in {', '.join(ENDINGS)}."
            )
        return tuple(Case(case, (), file) for case, file in known.items())
    cases: dict[str, list[Path]] = {}
    for stem, file in files_by_name(images, where).items():
        channel = re.fullmatch(r"(.+)_\d{4}", stem)
        cases.setdefault(channel[1] if channel and stem not in known else stem, []).append(file)
    alone = [case for case in cases if case not in known]
    if alone:
        raise PluginError(
            f"{where}: {len(alone)} of {len(cases)} images have no reference in {references}, such"
            f" as {alone[0]}. References have the name of the case without the channel's number."
        )
    if not cases:
        raise PluginError(f"{where}: no images in {images} that end in {', '.join(ENDINGS)}.")
    return tuple(Case(case, tuple(files), known[case]) for case, files in sorted(cases.items()))


def files_by_name(folder: Path, where: str) -> dict[str, Path]:
    """Return the images or label maps of a folder by their names without the ending."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("[!.]*")):
        if ending := ending_of_map(path):
            stem = path.name.removesuffix(ending)
            if stem in found:
                raise PluginError(
                    f"{where}: {found[stem]} and {path.name} are the same case twice. Remove one."
                )
            found[stem] = path
    return found


def ending_of_map(path: Path) -> str:
    """Return which of :data:`ENDINGS` a file has, "" if none."""
    return next((one for one in ENDINGS if path.name.endswith(one)), "")
