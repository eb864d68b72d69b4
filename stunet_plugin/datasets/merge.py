"""Merging of several datasets with different label systems to one, in nnUNet_raw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stunet_plugin.datasets.folds import SPLITS, balanced_folds, own_folds
from stunet_plugin.datasets.label_systems import LabelSystem, canonical_name, load_label_system
from stunet_plugin.datasets.label_union import LabelMapping, joint_system, map_to_union
from stunet_plugin.datasets.new_dataset import NewDataset, write_labels
from stunet_plugin.datasets.raw_dataset import Case, RawDataset, find_raw, read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CONFIGURATION, FOLDS
from stunet_plugin.utils.image_files import PICTURES, ImageError, place_image
from stunet_plugin.utils.images import read_images, read_label_array
from stunet_plugin.utils.progress import Progress

if TYPE_CHECKING:
    from stunet_plugin.commands.merge_datasets import MergeDatasets

PROVENANCE = "merged_from.json"
READER = "overwrite_image_reader_writer"
CT = "ct"
"""The channel, in small letters, that nnU-Net normalises by the foreground's intensities."""
SHOWN_PROBLEMS = 10


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

    def new_name(self, case: str) -> str:
        return f"{self.name.removeprefix('Dataset')}_{case}"


class Merge:
    """What a merge comes to; nothing is written before :meth:`write`.

    Raises:
        PluginError: the datasets cannot be merged.
    """

    def __init__(self, options: MergeDatasets) -> None:
        self.options = options
        self.target = NewDataset(options.dataset_id, options.name, PROVENANCE, options.copy)
        self.parts = _find_parts(options)
        self.channels = _common_channels(self.parts, options.channel_names)
        self.ending = _common(self.parts, "file ending", [x.raw.file_ending for x in self.parts])
        readers = [x.raw.description.get(READER) for x in self.parts]
        self.reader_name = _common(self.parts, "image reader", readers)
        systems = [part.system for part in self.parts]
        self.joint = joint_system(systems, options.classes, [part.not_shown for part in self.parts])
        self.mappings = [
            map_to_union(part.system, self.joint, part.not_shown, systems) for part in self.parts
        ]
        self._check()

    def _check(self) -> None:
        pairs = list(zip(self.parts, self.mappings, strict=True))
        classes = ", ".join(self.joint.classes)
        if all(mapping.background_ignored for mapping in self.mappings):
            lacking = "; ".join(f"{part.name}: {', '.join(x.missing)}" for part, x in pairs)
            raise PluginError(
                f"Each dataset lacks a class ({lacking}), so the background of all would become"
                " ignore, and a network that is never shown background finds classes everywhere."
                " Learn only what one of them has as a whole (--classes), or say which classes its"
                " images do not show (--not-shown)."
            )
        for part, mapping in pairs:
            if mapping.background_ignored and set(mapping.missing) == set(self.joint.classes):
                raise PluginError(
                    f"{part.name} annotates none of the classes {classes}, so all of its voxels"
                    " would become ignore. Leave it out, or say which of them its images do not"
                    " show (--not-shown)."
                )
            unknown = [name for name in part.not_shown if name not in self.joint.classes]
            if unknown:
                raise PluginError(f"--not-shown: {unknown[0]!r} is none of the classes {classes}.")
            files = [file for case in part.raw.cases for file in (*case.images, case.label)]
            odd = [file for file in files if not file.name.endswith(self.ending)]
            if odd:
                raise PluginError(
                    f"{odd[0]} of {part.name} does not end in {self.ending}, as its dataset.json"
                    " says."
                )

    def describe(self) -> Iterator[str]:
        """Say in lines what will become of each dataset."""
        ignore = "" if self.joint.ignore is None else ", and ignore"
        yield f"Classes: {', '.join(self.joint.classes)}{ignore}"
        for part, mapping in zip(self.parts, self.mappings, strict=True):
            training = ", training only" if part.train_only else ""
            yield f"{part.name} ({part.system.name}): {len(part.raw.cases)} cases{training}"
            if mapping.missing:
                yield f"  does not annotate: {', '.join(mapping.missing)}"
            if mapping.hidden_in:
                hidden = ", ".join(mapping.hidden_in)
                yield f"  become ignore, as they may hold one of these: {hidden}"
            if mapping.background_ignored:
                yield (
                    "  becomes ignore, as they may be anywhere in it: the background, and every"
                    " class that is left out"
                )
            if mapping.left_out:
                yield f"  left out: {', '.join(mapping.left_out)}"
            folds, what = self._own_folds[part.name]
            if what and not part.train_only:
                why = "" if folds else ", so its cases are split at random"
                yield f"  {what}{why}"
        ct = any(name.casefold() == CT for name in self.channels)
        if ct and any(mapping.background_ignored for mapping in self.mappings):
            yield (
                "Note: nnU-Net counts ignored voxels as foreground when it plans how to normalise"
                " CT, air included. See docs/datasets.md for a way round."
            )

    @cached_property
    def _own_folds(self) -> dict[str, tuple[list[list[str]] | None, str]]:
        return {
            part.name: own_folds(part.raw.folder, [case.name for case in part.raw.cases])
            for part in self.parts
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What a run must have in common with one that it resumes."""
        names = [part.new_name(case.name) for part in self.parts for case in part.raw.cases]
        return {
            "command": "merge-datasets",
            "datasets": {str(part.raw.folder): part.raw.description for part in self.parts},
            "cases": sorted(names),
            "tables": [mapping.table.tolist() for mapping in self.mappings],
            "copy": self.options.copy,
        }

    def write(self) -> None:
        """Make the dataset, or complete one that an interrupted run began.

        Raises:
            PluginError: images or label maps that cannot be used, all of them named; the others
                stay finished.
        """
        tasks = [
            (part, mapping, case)
            for part, mapping in zip(self.parts, self.mappings, strict=True)
            for case in part.raw.cases
        ]
        with self.target.begun(self.settings):
            progress, problems = Progress(len(tasks)), []
            for part, mapping, case in tasks:
                try:
                    self._write_case(part, mapping, case)
                except ImageError as error:
                    problems.append(str(error))
                progress.add(True)
            progress.end()
            if problems:
                more = len(problems) - SHOWN_PROBLEMS
                listed = problems[:SHOWN_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
                raise PluginError("\n".join([f"{len(problems)} cases cannot be used.", *listed]))
            cases = {
                part.name: [part.new_name(case.name) for case in part.raw.cases]
                for part in self.parts
            }
            own = {
                part.name: [[part.new_name(name) for name in fold] for fold in folds]
                for part in self.parts
                if (folds := self._own_folds[part.name][0])
            }
            alone = [part.name for part in self.parts if part.train_only]
            splits = balanced_folds(cases, alone, self.options.seed, own)
            others = {SPLITS.removesuffix(".json"): splits} if splits else {}
            self.target.finish(self._description(len(tasks)), self._provenance(splits), **others)
        if not splits:
            print(
                f"Fewer than {FOLDS} cases to validate on cannot be split into folds: train with"
                " fold 'all'."
            )
        configuration = "2d" if self.ending in PICTURES else CONFIGURATION
        self.target.say_written(configuration, f"    # takes {SPLITS} over" if splits else "")

    def _write_case(self, part: Part, mapping: LabelMapping, case: Case) -> None:
        name = part.new_name(case.name)
        target = self.target.label_of(name, self.ending)
        if target.is_file():
            return
        array, _ = read_images(case.images, self._reader, len(self.channels))
        found = read_label_array(case.label, self._reader, part.system.values)
        if array.shape[1:] != found.labels.shape:
            size = f"{found.labels.shape}, its image {array.shape[1:]}"
            raise ImageError(case.label, "not of its image's size", size)
        self.target.add_images(name, case.images, self.ending)
        if mapping.changes_nothing and not found.rounded:
            place_image(case.label, target, self.target.how)
        else:
            labels = mapping.translate(found.labels)
            write_labels(self._reader, labels, found.properties, target)

    @cached_property
    def _reader(self) -> Any:
        """The reader that nnU-Net will take for the dataset."""
        from nnunetv2.imageio.reader_writer_registry import (
            determine_reader_writer_from_dataset_json as determine,
        )

        example = str(self.parts[0].raw.cases[0].images[0])
        try:
            # It prints the traceback of every reader that it tries.
            with contextlib.redirect_stderr(None), contextlib.redirect_stdout(None):
                return determine(self._description(0), example, verbose=False)()
        except RuntimeError as error:
            raise ImageError(example, "nnU-Net has no reader for it", self.ending) from error

    def _description(self, cases: int) -> dict[str, Any]:
        labels = {name: values[0] for name, values in self.joint.classes.items()}
        ignore = {} if self.joint.ignore is None else {"ignore": self.joint.ignore}
        names = ", ".join(part.name for part in self.parts)
        return {
            "channel_names": {str(channel): name for channel, name in enumerate(self.channels)},
            "labels": {"background": 0, **labels, **ignore},
            "numTraining": cases,
            "file_ending": self.ending,
            **({READER: self.reader_name} if self.reader_name else {}),
            "name": self.target.folder.name,
            "description": f"Merged by `stunet merge-datasets`: {names}. See {PROVENANCE}.",
        }

    def _provenance(self, splits: Sequence[dict[str, list[str]]]) -> dict[str, Any]:
        fold_of = {name: fold for fold, split in enumerate(splits) for name in split["val"]}
        return {
            "command": "stunet merge-datasets",
            "datasets": [
                {
                    "name": part.name,
                    "folder": str(part.raw.folder),
                    "label_system": part.system.name,
                    "labels": mapping.describe(part.system, self.joint),
                    "not_annotated": mapping.missing,
                    "stated_as_not_shown": part.not_shown,
                    "train_only": part.train_only,
                    "cases": {
                        name: {"case": case.name, "validated_in_fold": fold_of.get(name)}
                        for case in part.raw.cases
                        for name in [part.new_name(case.name)]
                    },
                }
                for part, mapping in zip(self.parts, self.mappings, strict=True)
            ],
        }


def run_merge(options: MergeDatasets) -> int:
    """Merge, say what was done, and return 0.

    Raises:
        PluginError: wrong input; nothing was written, or the same command resumes once the input
            is fixed.
    """
    merge = Merge(options)
    if merge.target.is_there(merge.settings):
        return 0
    print("\n".join(merge.describe()), flush=True)
    merge.write()
    return 0


def _find_parts(options: MergeDatasets) -> list[Part]:
    """Find the datasets with their label systems; options that name a dataset do so as on the
    command line."""
    given = [text.partition("=") for text in options.datasets]
    if len(given) < 2:
        raise PluginError("Name at least two datasets to merge.")
    folders = {name: find_raw(name) for name, _, _ in given}
    by_text = {x: path.name for name, path in folders.items() for x in (name, path.name)}

    def named(text: str, option: str) -> str:
        if text not in by_text:
            raise PluginError(f"{option} {text} is none of the datasets {', '.join(folders)}.")
        return by_text[text]

    not_shown: dict[str, list[str]] = {}
    for text in options.not_shown:
        dataset, _, classes = text.partition("=")
        if not classes:
            raise PluginError(f"--not-shown must be DATASET=CLASS[,CLASS], not {text!r}.")
        absent = map(canonical_name, classes.split(","))
        not_shown.setdefault(named(dataset, "--not-shown"), []).extend(absent)
    train_only = [named(text, "--train-only") for text in options.train_only]
    names = [path.name for path in folders.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or len(folders) < len(given):
        raise PluginError(
            f"{(twice or names)[0]} is given twice. The names of the datasets tell their cases"
            " apart."
        )
    parts = []
    for name, _, labels in given:
        raw = read_raw(folders[name])
        if labels:
            system = load_label_system(labels)
        elif "regions_class_order" in raw.description and options.classes is None:
            raise PluginError(
                f"{raw.name} has regions, which overlap. Say which classes to learn: --classes"
            )
        else:
            system = LabelSystem.from_table(raw.description, raw.name)
        hidden = tuple(not_shown.get(raw.name, ()))
        parts.append(Part(raw, system, hidden, raw.name in train_only))
    return parts


def _common_channels(parts: Sequence[Part], given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the channels, which decide how nnU-Net normalises them."""
    counts = {part.name: len(part.raw.channels) for part in parts}
    first = parts[0].raw.channels
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise PluginError(f"The datasets differ in their channels: {listed}.")
    if given is not None and len(given) != len(first):
        raise PluginError(
            f"--channel-names names {len(given)} channel(s), the datasets have {len(first)}."
        )
    for part in parts[1:] if given is None else ():
        if [name.casefold() for name in part.raw.channels] != [name.casefold() for name in first]:
            raise PluginError(
                f"The channels of {parts[0].name} are {', '.join(first)}, those of {part.name}"
                f" {', '.join(part.raw.channels)}. If they are of one kind, say how to call them:"
                " --channel-names (nnU-Net normalises by it: 'CT', or any other)."
            )
    return first if given is None else tuple(given)


def _common(parts: Sequence[Part], what: str, values: Sequence[Any]) -> Any:
    """Return a property that all datasets must have in common."""
    if len(set(values)) > 1:
        pairs = zip(parts, values, strict=True)
        listed = ", ".join(f"{part.name} has {value}" for part, value in pairs)
        raise PluginError(
            f"The datasets differ in their {what}: {listed}. nnU-Net takes one per dataset: convert"
            " one of them first."
        )
    return values[0]
