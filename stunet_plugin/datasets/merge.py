"""Merging of several datasets with different label systems to one, in nnUNet_raw."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nnunetv2.imageio import reader_writer_registry
from tqdm import tqdm

from stunet_plugin.datasets.folds import balanced_folds, own_folds
from stunet_plugin.datasets.label_union import LabelMapping, unite
from stunet_plugin.datasets.new_dataset import NewDataset, write_labels
from stunet_plugin.datasets.raw_dataset import PSEUDO_LABELS, Case, RawDataset, find_raw, read_raw
from stunet_plugin.errors import PluginError, few_lines
from stunet_plugin.nnunet.names import CONFIGURATION, FOLDS, SPLITS
from stunet_plugin.self_training.domains import PSEUDO_LABELLED
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.utils.image_files import PICTURES, TIFF, ImageError, hash_of_image, place_image
from stunet_plugin.utils.images import read_geometry, read_images, read_label_array
from stunet_plugin.utils.label_systems import LabelSystem, canonical_name, load_label_system

if TYPE_CHECKING:
    from stunet_plugin.commands.merge_datasets import MergeDatasets

PROVENANCE = "merged_from.json"
READER = "overwrite_image_reader_writer"


@dataclass(frozen=True)
class Part:
    """A dataset that is merged, what its labels mean, and the joint classes that its images do not
    show."""

    raw: RawDataset
    system: LabelSystem
    not_shown: tuple[str, ...]
    train_only: bool

    @property
    def name(self) -> str:
        return self.raw.name

    def new_name(self, case: str) -> str:
        return f"{self.name.removeprefix('Dataset')}_{case}"

    @cached_property
    def new_names(self) -> list[str]:
        return [self.new_name(case.name) for case in self.raw.cases]

    @cached_property
    def own_folds(self) -> tuple[list[list[str]] | None, str]:
        return own_folds(self.raw.folder, [case.name for case in self.raw.cases])


def run_merge(options: MergeDatasets) -> int:
    """Merge, say what was done, and return 0; raise PluginError for wrong input, and the same
    command resumes once that is fixed."""
    merge = _Merge(options)
    if not merge.target.is_there(merge.settings):
        print("\n".join(merge.describe()), flush=True)
        merge.write()
    return 0


class _Merge:
    """What a merge comes to; nothing is written before :meth:`write`."""

    def __init__(self, options: MergeDatasets) -> None:
        self.options = options
        self.target = NewDataset(options.dataset_id, options.name, PROVENANCE, options.copy)
        self.parts = _find_parts(options)
        self.channels = self._common_channels()
        self.ending = self._common("file ending", [x.raw.file_ending for x in self.parts])
        readers = [x.raw.description.get(READER) for x in self.parts]
        self.reader_name = self._common("image reader", readers)
        systems, not_shown = zip(*((x.system, x.not_shown) for x in self.parts), strict=True)
        self.joint, mappings = unite(systems, options.classes, not_shown)
        self.pairs = list(zip(self.parts, mappings, strict=True))
        self._check()

    def _common(self, what: str, values: Sequence[Any]) -> Any:
        """Return a property that all datasets must have in common."""
        if any(value != values[0] for value in values):
            listed = ", ".join(f"{x.name} has {y}" for x, y in zip(self.parts, values, strict=True))
            advice = "nnU-Net takes one per dataset: convert one of them first."
            raise PluginError(f"The datasets differ in their {what}: {listed}. {advice}")
        return values[0]

    def _common_channels(self) -> tuple[str, ...]:
        """Return the names of the channels, which decide how nnU-Net normalises them."""
        given, found = self.options.channel_names, [part.raw.channels for part in self.parts]
        count = self._common("number of channels", [len(names) for names in found])
        if given is None:
            what = "channels (if they are of one kind, say how to call them: --channel-names)"
            self._common(what, [tuple(map(str.casefold, names)) for names in found])
        elif len(given) != count:
            raise PluginError(f"--channel-names must name {count} channel(s), not {len(given)}.")
        return tuple(given or found[0])

    def _check(self) -> None:
        classes = ", ".join(self.joint.classes)
        if all(mapping.background_ignored for _, mapping in self.pairs):
            lacking = "; ".join(f"{part.name}: {', '.join(x.missing)}" for part, x in self.pairs)
            raise PluginError(
                f"Each dataset lacks a class ({lacking}), so the background of all would become"
                " ignore, and a network that is never shown background finds classes everywhere."
                " Learn only what one of them has as a whole (--classes), or say which classes its"
                " images do not show (--not-shown)."
            )
        for part, mapping in self.pairs:
            if mapping.background_ignored and set(mapping.missing) == set(self.joint.classes):
                raise PluginError(
                    f"{part.name} annotates none of the classes {classes}, so all of its voxels"
                    " would become ignore. Leave it out, or say which of them its images do not"
                    " show (--not-shown)."
                )
            if unknown := set(part.not_shown) - set(self.joint.classes):
                raise PluginError(f"--not-shown: {unknown.pop()!r} is none of {classes}.")
            for file in (x for case in part.raw.cases for x in (*case.images, case.label)):
                if not file.name.endswith(self.ending):
                    raise PluginError(f"{file} does not end in {self.ending}, as {part.name} says.")
        counts = Counter(name for part in self.parts for name in part.new_names)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise PluginError(
                f"{counts[twice[0]]} cases would be called {twice[0]}, made of the names of dataset"
                " and case. Each needs its own: rename the folder of one of the datasets."
            )

    def describe(self) -> Iterator[str]:
        """Say in lines what will become of each dataset."""
        ignore = "" if self.joint.ignore is None else ", and ignore"
        yield f"Classes: {', '.join(self.joint.classes)}{ignore}"
        for part, mapping in self.pairs:
            training = ", training only" if part.train_only else ""
            system = "" if part.system.name == part.name else f" ({part.system.name})"
            yield f"{part.name}{system}: {len(part.raw.cases)} cases{training}"
            for what, names in (
                ("said to be shown by no image", part.not_shown),
                ("does not annotate", mapping.missing),
                ("become ignore, as they may hold one of these", mapping.hidden_in),
                ("left out", mapping.left_out),
            ):
                if names:
                    yield f"  {what}: {', '.join(names)}"
            if mapping.background_ignored:
                yield "  become ignore, as they may be anywhere there: background, what is left out"
            folds, what = part.own_folds
            if what and not part.train_only:
                yield f"  {what}" if folds else f"  {what}, so its cases are split at random"
        ct = any(name.casefold() == "ct" for name in self.channels)
        if ct and any(mapping.background_ignored for _, mapping in self.pairs):
            yield (
                "Note: nnU-Net counts ignored voxels as foreground when it plans how to normalise"
                " CT, air included. See docs/datasets.md for a way round."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What a run must have in common with one that it resumes."""
        return {
            "command": "merge-datasets",
            "datasets": {str(part.raw.folder): part.raw.description for part in self.parts},
            "cases": sorted(name for part in self.parts for name in part.new_names),
            "tables": [mapping.table.tolist() for _, mapping in self.pairs],
            "copy": self.options.copy,
        }

    def write(self) -> None:
        """Make the dataset, or complete one that an interrupted run began."""
        tasks = [(*pair, case) for pair in self.pairs for case in pair[0].raw.cases]
        with self.target.begun(self.settings):
            problems = []
            for part, mapping, case in tqdm(tasks, unit="case"):
                try:
                    self._write_case(part, mapping, case)
                except ImageError as error:
                    problems.append(str(error))
            if problems:
                listed = few_lines(problems, 10)
                raise PluginError(f"{len(problems)} cases cannot be used.\n{listed}")
            splits = self._split()
            if splits:
                write_atomically(self.target.unfinished / SPLITS, json.dumps(splits, indent=1))
            self.target.finish(self._description(len(tasks)), self._provenance(splits))
        if not splits:
            print(f"Fewer than {FOLDS} cases to validate on: train with fold 'all'.")
        configuration = "2d" if self.ending in PICTURES else CONFIGURATION
        self.target.say_written(configuration, f"    # takes {SPLITS} over" if splits else "")

    def _split(self) -> list[dict[str, list[str]]]:
        own = {
            part.name: [list(map(part.new_name, fold)) for fold in folds]
            for part in self.parts
            if (folds := part.own_folds[0])
        }
        cases = {part.name: part.new_names for part in self.parts}
        alone = [part.name for part in self.parts if part.train_only]
        splits = balanced_folds(cases, alone, self.options.seed, own)
        copies = self._copies() if splits else {}
        for fold in splits:
            seen = {copy for name in fold["val"] for copy in copies.get(name, ())}
            fold["train"] = [name for name in fold["train"] if name not in seen]
        if copies:
            print(f"{len(copies)} cases have the same image: no fold trains on what it validates.")
        return splits

    def _copies(self) -> dict[str, set[str]]:
        """Return the cases whose image several datasets have, with all cases of that image."""
        images = {part.new_name(x.name): x.images[0] for part in self.parts for x in part.raw.cases}
        sizes = Counter(image.stat().st_size for image in images.values())
        same: dict[str, set[str]] = {}
        for name, image in images.items():
            if sizes[image.stat().st_size] > 1:  # hashing all would read them all again
                same.setdefault(hash_of_image(image), set()).add(name)
        return {name: names for names in same.values() if len(names) > 1 for name in names}

    def _write_case(self, part: Part, mapping: LabelMapping, case: Case) -> None:
        name = part.new_name(case.name)
        target = self.target.label_of(name, self.ending)
        if target.is_file():
            return
        array, _ = read_images(case.images, self._reader, len(self.channels))
        values = part.system.values
        labels, properties, rounded = read_label_array(case.label, self._reader, values)
        if array.shape[1:] != labels.shape:
            size = f"{labels.shape}, its image {array.shape[1:]}"
            raise ImageError(case.label, "not of its image's size", size)
        if self.ending not in (*PICTURES, *TIFF):
            grid, own = read_geometry(case.images[0]), read_geometry(case.label)
            if not own.agrees(grid):
                differing = f"{own}; image {grid}"
                raise ImageError(case.label, "not on the voxels of its image", differing)
        self.target.add_images(name, case.images, self.ending)
        if mapping.changes_nothing and not rounded:
            place_image(case.label, target, self.target.how)
        else:
            write_labels(self._reader, mapping.translate(labels), properties, target)

    @cached_property
    def _reader(self) -> Any:
        """The reader that nnU-Net will take for the dataset."""
        example = str(self.parts[0].raw.cases[0].images[0])
        determine = reader_writer_registry.determine_reader_writer_from_dataset_json
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
            **({PSEUDO_LABELLED: predicted} if (predicted := self._pseudo_labelled()) else {}),
            "name": self.target.folder.name,
            "description": f"Merged by `stunet merge-datasets`: {names}. See {PROVENANCE}.",
        }

    def _pseudo_labelled(self) -> list[str]:
        """Return what the names of the cases begin with whose labels a model predicted."""
        return [
            part.new_name(beginning)
            for part in self.parts
            for beginning in (
                [""]
                if (part.raw.folder / PSEUDO_LABELS).is_file()
                else part.raw.description.get(PSEUDO_LABELLED, ())
            )
        ]

    def _provenance(self, splits: Sequence[dict[str, list[str]]]) -> dict[str, Any]:
        fold_of = {name: fold for fold, split in enumerate(splits) for name in split["val"]}
        datasets = [
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
                    for name, case in zip(part.new_names, part.raw.cases, strict=True)
                },
            }
            for part, mapping in self.pairs
        ]
        return {"command": "stunet merge-datasets", "datasets": datasets}


def _find_parts(options: MergeDatasets) -> list[Part]:
    """Find the datasets; options name them as the command line does."""
    given = [text.partition("=") for text in options.datasets]
    folders = [find_raw(name) for name, _, _ in given]
    names = [folder.name for folder in folders]
    if len(names) < 2 or len(set(names)) < len(names):
        raise PluginError(f"Name at least two datasets, each once, not {', '.join(names)}.")
    by_text = dict(zip((text for text, _, _ in given), names, strict=True))
    by_text |= {name: name for name in names}

    def named(text: str, option: str) -> str:
        if text not in by_text:
            raise PluginError(f"{option} {text} is none of the datasets {', '.join(names)}.")
        return by_text[text]

    not_shown: dict[str, list[str]] = {}
    for text in options.not_shown:
        dataset, _, classes = text.partition("=")
        if not classes:
            raise PluginError(f"--not-shown must be DATASET=CLASS[,CLASS], not {text!r}.")
        hidden = not_shown.setdefault(named(dataset, "--not-shown"), [])
        hidden += map(canonical_name, classes.split(","))
    train_only = [named(text, "--train-only") for text in options.train_only]
    parts = []
    for folder, (_, _, labels) in zip(folders, given, strict=True):
        raw = read_raw(folder)
        if labels:
            system = load_label_system(labels)
        elif "regions_class_order" in raw.description and options.classes is None:
            raise PluginError(f"{raw.name} has regions, which overlap. Choose classes: --classes")
        else:
            system = LabelSystem.from_table(raw.description, raw.name)
        absent = tuple(not_shown.get(raw.name, ()))
        parts.append(Part(raw, system, absent, raw.name in train_only))
    return parts
