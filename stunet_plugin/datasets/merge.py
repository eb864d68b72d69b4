"""``stunet merge-datasets``: several datasets with different label systems become one, in
nnUNet_raw."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stunet_plugin.datasets.folds import balanced_folds
from stunet_plugin.datasets.label_systems import LabelSystem, canonical_name, load_label_system
from stunet_plugin.datasets.label_union import Joined, describe_table, join_labels, joint_system
from stunet_plugin.datasets.new_dataset import NewDataset, place_file, read_labels, write_labels
from stunet_plugin.datasets.raw_dataset import Case, RawDataset, find_raw, read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import FOLDS
from stunet_plugin.utils.progress import Progress

SPLITS = "splits_final.json"
"""In the raw dataset nnU-Net's planners find it and copy it to where training reads it."""
PROVENANCE = "merged_from.json"
READER = "overwrite_image_reader_writer"
CT = "ct"
"""The channel, in small letters, that nnU-Net normalises by the foreground's intensities."""


@dataclass(frozen=True)
class MergeOptions:
    """What the user asked for; see ``stunet merge-datasets --help``."""

    datasets: Sequence[str]
    dataset_id: int
    name: str
    classes: Sequence[str] | None = None
    not_shown: Sequence[str] = ()
    train_only: Sequence[str] = ()
    channel_names: Sequence[str] | None = None
    copy: bool = False
    seed: int = 0

    @classmethod
    def from_arguments(cls, given: Any) -> MergeOptions:
        return cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Part:
    """A dataset that is merged.

    Attributes:
        raw: the dataset.
        system: what its labels mean.
        not_shown: joint classes that its images do not show.
        train_only: its cases are validated on in no fold.
    """

    raw: RawDataset
    system: LabelSystem
    not_shown: tuple[str, ...]
    train_only: bool

    @property
    def name(self) -> str:
        return self.raw.name

    def new_name(self, case: Case) -> str:
        return f"{self.name.removeprefix('Dataset')}_{case.name}"


class Merge:
    """What a merge comes to; nothing is written before :meth:`write`.

    Raises:
        PluginError: the datasets cannot be merged.
    """

    def __init__(self, options: MergeOptions) -> None:
        self.options = options
        self.target = NewDataset(options.dataset_id, options.name)
        self.parts = _find_parts(options)
        self.channels = _common_channels(self.parts, options.channel_names)
        self.ending = _same(self.parts, "file ending", lambda part: part.raw.file_ending)
        self.reader_name = _same(
            self.parts, "image reader", lambda part: part.raw.description.get(READER)
        )
        systems = [part.system for part in self.parts]
        self.joint = joint_system(systems, options.classes, [part.not_shown for part in self.parts])
        self.joined = [
            join_labels(part.system, self.joint, part.not_shown, systems) for part in self.parts
        ]
        if all(joined.background_ignored for joined in self.joined):
            lacking = "; ".join(
                f"{part.name}: {', '.join(one.missing)}"
                for part, one in zip(self.parts, self.joined, strict=True)
            )
            raise PluginError(
                f"Each dataset lacks a class ({lacking}), so the background of all would become"
                " ignore, and a network that is never shown background finds classes everywhere."
                " Learn only what one of them has as a whole (--classes), or say which classes its"
                " images do not show (--not-shown)."
            )
        for part, joined in zip(self.parts, self.joined, strict=True):
            if joined.background_ignored and set(joined.missing) == set(self.joint.classes):
                raise PluginError(
                    f"{part.name} annotates none of the classes {', '.join(self.joint.classes)}, so"
                    " all of its voxels would become ignore. Leave it out, or say which of them"
                    " its images do not show (--not-shown)."
                )
            unknown = [name for name in part.not_shown if name not in self.joint.classes]
            if unknown:
                raise PluginError(
                    f"--not-shown: {unknown[0]!r} is none of the classes"
                    f" {', '.join(self.joint.classes)}."
                )
            for case in part.raw.cases:
                odd = [
                    file
                    for file in (*case.images, case.label)
                    if file is not None and not file.name.endswith(self.ending)
                ]
                if odd:
                    raise PluginError(
                        f"{odd[0]} of {part.name} does not end in {self.ending}, as its"
                        " dataset.json says."
                    )

    def describe(self) -> Iterator[str]:
        """Say in lines what will become of each dataset."""
        yield (
            "Classes:"
            f" {', '.join(self.joint.classes)}{'' if self.joint.ignore is None else ', and ignore'}"
        )
        for part, joined in zip(self.parts, self.joined, strict=True):
            yield (
                f"{part.name} ({part.system.name}): {len(part.raw.cases)}"
                f" cases{', training only' if part.train_only else ''}"
            )
            if joined.missing:
                yield f"  does not annotate: {', '.join(joined.missing)}"
            if joined.hidden_in:
                yield (
                    f"  become ignore, as they may hold one of these: {', '.join(joined.hidden_in)}"
                )
            if joined.background_ignored:
                yield (
                    "  becomes ignore, as they may be anywhere in it: the background, and every"
                    " class that is left out"
                )
            if joined.left_out:
                yield f"  left out: {', '.join(joined.left_out)}"
        if any(joined.background_ignored for joined in self.joined) and any(
            name.casefold() == CT for name in self.channels
        ):
            yield (
                "Note: nnU-Net counts ignored voxels as foreground when it plans how to normalise"
                " CT, air included. See docs/datasets.md for a way round."
            )

    def write(self) -> None:
        """Make the dataset, or complete one that an interrupted run began."""
        names = [part.new_name(case) for part in self.parts for case in part.raw.cases]
        settings = {
            "command": "merge-datasets",
            "datasets": {str(part.raw.folder): part.raw.description for part in self.parts},
            "cases": sorted(names),
            "tables": [joined.table.tolist() for joined in self.joined],
            "copy": self.options.copy,
        }
        with self.target.begun(settings):
            progress = Progress(len(names))
            for part, joined in zip(self.parts, self.joined, strict=True):
                for case in part.raw.cases:
                    self._write_case(part, joined, case)
                    progress.add(True)
            progress.end()
            splits = balanced_folds(
                {
                    part.name: [part.new_name(case) for case in part.raw.cases]
                    for part in self.parts
                },
                [part.name for part in self.parts if part.train_only],
                self.options.seed,
            )
            others: dict[str, Any] = {PROVENANCE: self._provenance(splits)}
            self.target.finish(
                self._description(len(names)), {**others, **({SPLITS: splits} if splits else {})}
            )
        if not splits:
            print(
                f"Fewer than {FOLDS} cases to validate on cannot be split into folds: train with"
                " fold 'all'."
            )
        print(self.target.closing_lines(f"    # takes {SPLITS} over"))

    def _write_case(self, part: Part, joined: Joined, case: Case) -> None:
        name = part.new_name(case)
        label = self.target.label_of(name, self.ending)
        if case.label is None or os.path.lexists(label):
            return
        self.target.add_images(name, case.images, self.ending, self.options.copy)
        if joined.changes_nothing:
            place_file(case.label, label, self.options.copy)
            return
        reader = self._reader
        labels, properties = read_labels(reader, case.label)
        write_labels(
            reader, joined.translate(labels, part.system, str(case.label)), properties, label
        )

    @cached_property
    def _reader(self) -> Any:
        """The reader that nnU-Net will take for the dataset."""
        from nnunetv2.imageio.reader_writer_registry import (
            determine_reader_writer_from_dataset_json,
        )

        example = str(self.parts[0].raw.cases[0].images[0])
        return determine_reader_writer_from_dataset_json(
            self._description(0), example, verbose=False
        )()

    def _description(self, cases: int) -> dict[str, Any]:
        labels = {
            "background": 0,
            **{name: values[0] for name, values in self.joint.classes.items()},
        }
        return {
            "channel_names": {str(channel): name for channel, name in enumerate(self.channels)},
            "labels": (
                labels if self.joint.ignore is None else {**labels, "ignore": self.joint.ignore}
            ),
            "numTraining": cases,
            "file_ending": self.ending,
            **({READER: self.reader_name} if self.reader_name else {}),
            "name": self.target.folder.name,
            "description": (
                f"Merged by `stunet merge-datasets`: {', '.join(part.name for part in self.parts)}."
                f" See {PROVENANCE}."
            ),
        }

    def _provenance(self, splits: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, Any]:
        fold_of = {name: fold for fold, split in enumerate(splits) for name in split["val"]}
        return {
            "command": "stunet merge-datasets",
            "datasets": [
                {
                    "name": part.name,
                    "folder": str(part.raw.folder),
                    "label_system": part.system.name,
                    "labels": describe_table(joined, part.system, self.joint),
                    "not_annotated": joined.missing,
                    "stated_as_not_shown": part.not_shown,
                    "train_only": part.train_only,
                    "cases": {
                        part.new_name(case): {
                            "case": case.name,
                            "validated_in_fold": fold_of.get(part.new_name(case)),
                        }
                        for case in part.raw.cases
                    },
                }
                for part, joined in zip(self.parts, self.joined, strict=True)
            ],
        }


def run_merge(options: MergeOptions) -> int:
    """Merge, say what was done, and return 0.

    Raises:
        PluginError: wrong input; nothing was written, or the same command goes on once the input is
            mended.
    """
    merge = Merge(options)
    print("\n".join(merge.describe()), flush=True)
    merge.write()
    return 0


def _find_parts(options: MergeOptions) -> list[Part]:
    """Find the datasets with their label systems; options that name a dataset do so as on the
    command line."""
    if len(options.datasets) < 2:
        raise PluginError("Name at least two datasets to merge.")
    given = [text.partition("=") for text in options.datasets]
    folders = {name: find_raw(name) for name, _, _ in given}
    by_text = {
        text: folder.name for name, folder in folders.items() for text in (name, folder.name)
    }

    def named(text: str, option: str) -> str:
        if text not in by_text:
            raise PluginError(f"{option} {text} is none of the datasets {', '.join(folders)}.")
        return by_text[text]

    not_shown: dict[str, list[str]] = {}
    for text in options.not_shown:
        dataset, separator, classes = text.partition("=")
        if not separator or not classes:
            raise PluginError(f"--not-shown must be DATASET=CLASS[,CLASS], not {text!r}.")
        not_shown.setdefault(named(dataset, "--not-shown"), []).extend(
            map(canonical_name, classes.split(","))
        )
    train_only = [named(text, "--train-only") for text in options.train_only]
    names = [folder.name for folder in folders.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or len(folders) < len(given):
        raise PluginError(
            f"{(twice or list(folders))[0]} is given twice. The names of the datasets tell their"
            " cases apart."
        )
    parts = []
    for name, _, system in given:
        raw = read_raw(folders[name])
        known = (
            load_label_system(system)
            if system
            else LabelSystem.from_table(raw.description, raw.name)
        )
        if not system and "regions_class_order" in raw.description and options.classes is None:
            raise PluginError(
                f"{raw.name} has regions, which overlap. Say which classes to learn: --classes"
            )
        parts.append(Part(raw, known, tuple(not_shown.get(raw.name, ())), raw.name in train_only))
    return parts


def _common_channels(parts: Sequence[Part], given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the channels, which decide how nnU-Net normalises them."""
    counts = {part.name: len(part.raw.channels) for part in parts}
    if len(set(counts.values())) > 1:
        raise PluginError(
            "The datasets differ in their channels:"
            f" {', '.join(f'{name} has {n}' for name, n in counts.items())}."
        )
    if given is not None:
        if len(given) != len(parts[0].raw.channels):
            raise PluginError(
                f"--channel-names names {len(given)} channel(s), the datasets have"
                f" {len(parts[0].raw.channels)}."
            )
        return tuple(given)
    first = parts[0].raw.channels
    for part in parts[1:]:
        if [name.casefold() for name in part.raw.channels] != [name.casefold() for name in first]:
            raise PluginError(
                f"The channels of {parts[0].name} are {', '.join(first)}, those of {part.name}"
                f" {', '.join(part.raw.channels)}. If they are of one kind, say how to call them:"
                " --channel-names (nnU-Net normalises by it: 'CT', or any other)."
            )
    return first


def _same(parts: Sequence[Part], what: str, read: Any) -> Any:
    """A property that all datasets must have in common."""
    found = {part.name: read(part) for part in parts}
    if len(set(found.values())) > 1:
        raise PluginError(
            f"The datasets differ in their {what}:"
            f" {', '.join(f'{name} has {value}' for name, value in found.items())}. nnU-Net takes"
            " one per dataset: convert one of them first."
        )
    return next(iter(found.values()))
