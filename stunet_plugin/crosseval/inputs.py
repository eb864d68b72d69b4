"""Inputs of a comparison: models and datasets, from a file or from options, strictly checked.

A model is any model folder of nnU-Net v2. A dataset is a raw dataset of nnU-Net, or a folder of
images and one of references.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stunet_plugin.crosseval.measures import DEFAULT_TOLERANCE
from stunet_plugin.datasets.label_systems import (
    LabelSystem,
    canonical_name,
    check_entries,
    check_regions,
    load_label_system,
    read_table,
)
from stunet_plugin.datasets.raw_dataset import find_raw, read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import is_list, is_number

if TYPE_CHECKING:
    from stunet_plugin.commands.crosseval import Crosseval

SHARED, PAIR = "shared", "pair"
ALL_FOLDS = "all"
DEFAULT_STEP_SIZE = 0.5
TRAINING, TEST = PARTS = ("Tr", "Ts")
"""Of a raw dataset: imagesTr with labelsTr, imagesTs with labelsTs."""
KINDS = ("images", "labels")
"""A raw dataset's folders are named by kind and part."""
LISTED = "listed in dataset.json"
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
"""Of images and references; SimpleITK reads them."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.+-]*")
SETUP_ENTRIES = (
    "models",
    "datasets",
    "classes",
    "tolerances",
    "default_tolerance",
    "sliced",
    "resample",
    "output",
)
_MODEL_ENTRIES = ("name", "folder", "fold", "checkpoint", "mirroring", "step_size", "labels")
_ORIGIN = ("folder", "part", "images", "references")
_DATASET_ENTRIES = ("name", *_ORIGIN, "labels")
OWN_LABELS = "dataset.json"
"""Where labels come from that nobody names."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model folder of nnU-Net and how it predicts.

    Attributes:
        name: in tables and folders.
        folder: with ``plans.json``, ``dataset.json`` and ``fold_*``.
        folds: numbers, or ("all",); the outputs of several are averaged, as nnU-Net does.
        checkpoint: file name in each fold.
        mirroring: average over mirrored inputs, on the axes that the model allows.
        step_size: of the sliding window, in patches.
        labels: what its outputs mean.
        channels: names of its inputs.
        labels_from: the label system's name or file as the user gave it, or :data:`OWN_LABELS`.
    """

    name: str
    folder: Path
    folds: tuple[str, ...]
    checkpoint: str
    mirroring: bool
    step_size: float
    labels: LabelSystem
    channels: tuple[str, ...]
    labels_from: str = OWN_LABELS
    kind: ClassVar = "model"

    @property
    def checkpoints(self) -> list[Path]:
        return [self.folder / f"fold_{fold}" / self.checkpoint for fold in self.folds]

    def describe(self) -> dict[str, Any]:
        """Return where it is, what trained it, how it predicts and what it knows, as JSON has it.

        Trainer and configuration are those of the checkpoint: a folder may have been renamed.
        """
        from stunet_plugin.weights.safe_loading import load_checkpoint

        checkpoint = load_checkpoint(self.checkpoints[0])
        arguments = checkpoint.get("init_args") or {}
        axes = checkpoint.get("inference_allowed_mirroring_axes") or ()
        return {
            "folder": str(self.folder),
            "trainer": str(checkpoint.get("trainer_name", "")),
            "plans": str(read_json(self.folder / "plans.json").get("plans_name", "")),
            "configuration": str(arguments.get("configuration", "")),
            "folds": list(self.folds),
            "checkpoint": self.checkpoint,
            "mirroring": self.mirroring,
            "mirroring_axes": [int(axis) for axis in axes] if self.mirroring else [],
            "step_size": self.step_size,
            "labels": self.labels.name,
            "labels_from": self.labels_from,
            "classes": list(self.labels.classes),
        }


@dataclass(frozen=True)
class Case:
    """An image, as one file per channel, and its reference segmentation."""

    name: str
    images: tuple[Path, ...]
    reference: Path


@dataclass(frozen=True, eq=False)
class Dataset:
    """Cases with references in one label system.

    Attributes:
        origin: folder, part, images, references: where the cases come from, as the user gave it;
            the folder in full.
        labels_from: as in :class:`Model`.
    """

    name: str
    labels: LabelSystem
    ending: str
    cases: tuple[Case, ...] = field(repr=False)
    origin: Mapping[str, str] = field(default_factory=dict, repr=False)
    labels_from: str = OWN_LABELS
    kind: ClassVar = "dataset"

    def describe(self) -> dict[str, Any]:
        """Return where its cases are, how many, and what their labels mean, as JSON has it."""
        return {
            **self.origin,
            "cases": len(self.cases),
            "labels": self.labels.name,
            "labels_from": self.labels_from,
            "classes": list(self.labels.classes),
        }


@dataclass(frozen=True)
class Rules:
    """How pairs are scored.

    Attributes:
        classes: :data:`SHARED` (by all models and datasets), :data:`PAIR` (by each pair), or
            canonical names.
        tolerances: of the NSD in mm by class or organ, where they differ from FLARE22's protocol.
        default_tolerance: of classes that neither knows.
        sliced: score tubular organs between the first and the last slice of the reference alone.
        resample: put predictions on the grid of their reference where they differ.
    """

    classes: str | tuple[str, ...] = SHARED
    tolerances: Mapping[str, float] = field(default_factory=dict)
    default_tolerance: float = DEFAULT_TOLERANCE
    sliced: bool = False
    resample: bool = False

    @classmethod
    def from_table(cls, content: Mapping[str, Any]) -> Rules:
        """Check the entries of a file (or what options put in their place).

        Raises:
            PluginError: values out of range.
        """
        classes = content.get("classes", SHARED)
        if classes not in (SHARED, PAIR):
            names = is_list(classes) and all(isinstance(name, str) for name in classes)
            if not names or not classes:
                raise PluginError(
                    f"classes must be {SHARED!r}, {PAIR!r} or a list of names, not {classes!r}."
                )
            classes = tuple(dict.fromkeys(map(canonical_name, classes)))
        tolerances = content.get("tolerances", {})
        default = content.get("default_tolerance", DEFAULT_TOLERANCE)
        checked = tolerances if isinstance(tolerances, Mapping) else {"tolerances": None}
        for name, value in {**checked, "default_tolerance": default}.items():
            if not is_number(value) or value < 0:
                raise PluginError(
                    f"Tolerances must be a table of classes and millimetres; {name} is {value!r}."
                )
        for key in ("sliced", "resample"):
            if not isinstance(content.get(key, False), bool):
                raise PluginError(f"{key} must be true or false, not {content[key]!r}.")
        own = {canonical_name(name): float(value) for name, value in tolerances.items()}
        switches = (bool(content.get(key, False)) for key in ("sliced", "resample"))
        return cls(classes, own, float(default), *switches)


@dataclass(frozen=True)
class Setup:
    """A comparison: what is compared, by which rules, and where the results go."""

    models: tuple[Model, ...]
    datasets: tuple[Dataset, ...]
    rules: Rules
    out: Path


def read_setup(options: Crosseval) -> Setup:
    """Read the file and the options; options win.

    Raises:
        PluginError: anything in them is wrong.
    """
    table = _read_tables(options)
    given: dict[str, Any] = {
        "output": options.out,
        "classes": options.classes,
        "default_tolerance": options.tolerance,
        "sliced": options.sliced or None,
        "resample": options.resample or None,
    }
    table |= {name: value for name, value in given.items() if value is not None}
    if not table.get("output"):
        raise PluginError("Say where the results go: -o FOLDER (or output in the file).")
    rules = Rules.from_table(table)
    models = tuple(map(read_model, table["models"]))
    datasets = tuple(map(read_dataset, table["datasets"]))
    return Setup(models, datasets, rules, Path(table["output"]).expanduser())


def folder_name(name: str) -> str:
    """Return the name of a model or dataset as that of a folder."""
    return name.replace(" ", "_")


def read_model(entry: Mapping[str, Any]) -> Model:
    """Check a model's entry (of a file or of ``--model``) and the folder that it names.

    Raises:
        PluginError: unknown entries, no such folder, fold or checkpoint, a cascade, or values out
            of range.
    """
    name = _name(entry, "model", _MODEL_ENTRIES)
    folder = Path(str(entry.get("folder", ""))).expanduser()
    if not (folder / "plans.json").is_file() or not (folder / "dataset.json").is_file():
        raise PluginError(
            f"Model {name}: {folder} is no model folder of nnU-Net v2, which holds plans.json,"
            " dataset.json and fold_0. Give the folder whose name ends like"
            " __nnUNetPlans__3d_fullres."
        )
    checkpoint = str(entry.get("checkpoint", CHECKPOINT))
    step_size = entry.get("step_size", DEFAULT_STEP_SIZE)
    if not is_number(step_size) or not 0 < step_size <= 1:
        raise PluginError(
            f"Model {name}: step_size must be a number above 0 and up to 1, not {step_size!r}."
        )
    if not isinstance(entry.get("mirroring", True), bool):
        raise PluginError(
            f"Model {name}: mirroring must be true or false, not {entry['mirroring']!r}."
        )
    dataset = read_json(folder / "dataset.json")
    if "labels" in entry:
        labels = load_label_system(entry["labels"])
    else:
        labels = LabelSystem.from_table(dataset, f"model {name}")
        check_regions(dataset, f"Model {name}")
    channels = dataset.get("channel_names", dataset.get("modality", {}))
    model = Model(
        name,
        folder,
        _folds(entry.get("fold"), folder, checkpoint, name),
        checkpoint,
        bool(entry.get("mirroring", True)),
        float(step_size),
        labels,
        tuple(str(channel) for channel in channels.values()),
        str(entry.get("labels", OWN_LABELS)),
    )
    missing = [str(file) for file in model.checkpoints if not file.is_file()]
    if missing:
        raise PluginError(
            f"Model {name}: {missing[0]} is not there. In {folder} there are:"
            f" {_checkpoints_in(folder)}."
        )
    return model


def _folds(given: Any, folder: Path, checkpoint: str, name: str) -> tuple[str, ...]:
    if given is None:
        found = sorted(
            path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")
        )
        numbered = [fold for fold in found if fold.isdigit()]
        if not found:
            raise PluginError(
                f"Model {name}: no fold in {folder} has {checkpoint}. There are:"
                f" {_checkpoints_in(folder)}."
            )
        return tuple(numbered or found[:1])
    folds = tuple(str(fold) for fold in (given if is_list(given) else [given]))
    if not folds or not all(fold.isdigit() or fold == ALL_FOLDS for fold in folds):
        raise PluginError(
            f"Model {name}: fold must be a number, a list of numbers, or {ALL_FOLDS!r}, not"
            f" {given!r}."
        )
    return folds


def _checkpoints_in(folder: Path) -> str:
    return (
        ", ".join(sorted(str(path.relative_to(folder)) for path in folder.glob("fold_*/*.pth")))
        or "no checkpoints"
    )


def read_dataset(entry: Mapping[str, Any]) -> Dataset:
    """Check a dataset's entry (of a file or of ``--dataset``) and list its cases.

    A raw dataset of nnU-Net is given by ``folder`` (a path, or an ID or name in nnUNet_raw;
    ``part``: Tr or Ts), anything else by ``images`` and ``references``. Images are named
    ``CASE_0000.nii.gz``, one per channel, or, with one channel, ``CASE.nii.gz``; references
    ``CASE.nii.gz``.

    Raises:
        PluginError: unknown entries, no such folders, no references, or images without one.
    """
    name = _name(entry, "dataset", _DATASET_ENTRIES)
    images, references, labels = _folders(entry, name)
    listed = _listed_cases(entry)
    cases = listed or _cases_in(images, references, name)
    for case in cases:
        if len(case.images) != len(cases[0].images):
            raise PluginError(
                f"Dataset {name}: {case.name} has {len(case.images)} channels, {cases[0].name} has"
                f" {len(cases[0].images)}."
            )
    ending = next((one for one in ENDINGS if cases[0].reference.name.endswith(one)), None)
    if ending is None:
        raise PluginError(
            f"Dataset {name}: {cases[0].reference} ends in none of {', '.join(ENDINGS)}."
        )
    origin = {key: str(entry[key]) for key in _ORIGIN if key in entry}
    if "folder" in origin:
        # An ID says nothing to somebody who reads the report elsewhere.
        origin["folder"] = str(find_raw(os.path.expanduser(origin["folder"])))
    if not {"images", "references"} <= set(entry):
        origin.setdefault("part", LISTED if listed else TRAINING)
    return Dataset(name, labels, ending, cases, origin, str(entry.get("labels", OWN_LABELS)))


def _folders(entry: Mapping[str, Any], name: str) -> tuple[Path, Path, LabelSystem]:
    """Return the folders of images and references, and the label system."""
    if "folder" not in entry:
        if not {"images", "references", "labels"} <= set(entry):
            raise PluginError(
                f"Dataset {name}: give folder (a raw dataset of nnU-Net), or images, references and"
                " labels."
            )
        images, references = (Path(str(entry[key])) for key in ("images", "references"))
        return images.expanduser(), references.expanduser(), load_label_system(entry["labels"])
    folder = find_raw(os.path.expanduser(str(entry["folder"])))
    part = str(entry.get("part", TRAINING))
    if part not in PARTS:
        raise PluginError(
            f"Dataset {name}: part must be Tr (imagesTr, labelsTr) or Ts (imagesTs, labelsTs), not"
            f" {part!r}."
        )
    if "labels" not in entry and not (folder / "dataset.json").is_file():
        raise PluginError(
            f"Dataset {name}: {folder} has no dataset.json that says what its labels mean. Give"
            " labels."
        )
    images = Path(str(entry.get("images", folder / f"images{part}"))).expanduser()
    references = Path(str(entry.get("references", folder / f"labels{part}"))).expanduser()
    return images, references, load_label_system(entry.get("labels", folder))


def _listed_cases(entry: Mapping[str, Any]) -> tuple[Case, ...]:
    """Return the cases of a raw dataset whose ``dataset.json`` lists their files, as nnU-Net
    allows; none if it does not."""
    if "folder" not in entry or {"part", "images", "references"} & set(entry):
        return ()
    folder = find_raw(os.path.expanduser(str(entry["folder"])))
    file = folder / "dataset.json"
    if not file.is_file() or "dataset" not in read_table(file):
        return ()
    cases = read_raw(folder).cases
    return tuple(Case(case.name, case.images, case.label) for case in cases if case.label)


def _cases_in(images: Path, references: Path, name: str) -> tuple[Case, ...]:
    """Return the cases of two folders."""
    for folder, kind in ((images, "images"), (references, "references")):
        if not folder.is_dir():
            raise PluginError(
                f"Dataset {name}: there is no folder of {kind} {folder}{_parts_beside(folder)}."
                " Without references nothing can be scored."
            )
    known = {stem: file for stem, (file,) in _files_by_name(references, name).items()}
    if not known:
        raise PluginError(
            f"Dataset {name}: no references in {references}; looked for files ending in"
            f" {', '.join(ENDINGS)}."
        )
    cases: dict[str, list[Path]] = {}
    for stem, files in _files_by_name(images, name).items():
        channel = re.fullmatch(r"(.+)_\d{4}", stem)
        cases.setdefault(channel[1] if channel and stem not in known else stem, []).extend(files)
    alone = [case for case in cases if case not in known]
    if alone:
        raise PluginError(
            f"Dataset {name}: {len(alone)} of {len(cases)} images have no reference in"
            f" {references}, such as {alone[0]}. References have the name of the case without the"
            " channel's number."
        )
    if not cases:
        raise PluginError(
            f"Dataset {name}: no images in {images} whose names go with the references in"
            f" {references}."
        )
    return tuple(Case(case, tuple(files), known[case]) for case, files in sorted(cases.items()))


def _files_by_name(folder: Path, name: str) -> dict[str, list[Path]]:
    """Return the one file of each name without its ending."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        ending = next((one for one in ENDINGS if path.name.endswith(one)), None)
        if ending is not None and not path.name.startswith("."):
            found.setdefault(path.name.removesuffix(ending), []).append(path)
    for files in found.values():
        if len(files) > 1:
            raise PluginError(
                f"Dataset {name}: {files[0]} and {files[1].name} are the same case twice. Remove"
                " one."
            )
    return found


def _parts_beside(folder: Path) -> str:
    """Return which parts of a raw dataset there are, as text; "" if it is no such folder."""
    names = [f"{kind}{part}" for kind in KINDS for part in PARTS]
    if folder.name not in names or not folder.parent.is_dir():
        return ""
    whole = [
        f"part={part}"
        for part in PARTS
        if all((folder.parent / f"{kind}{part}").is_dir() for kind in KINDS)
    ]
    there = f"whole parts there are: {', '.join(whole)}" if whole else "no part there has both"
    return f" (a part has images and references; {there})"


def _read_tables(options: Crosseval) -> dict[str, Any]:
    """Return the table of the file, with what ``--model`` and ``--dataset`` add to it."""
    table = read_table(Path(options.file)) if options.file else {}
    check_entries(table, SETUP_ENTRIES, str(options.file))
    for key, given in (("models", options.models), ("datasets", options.datasets)):
        flag = f"--{key.removesuffix('s')}"
        listed = table.get(key, [])
        if not is_list(listed) or not all(isinstance(entry, Mapping) for entry in listed):
            raise PluginError(
                f"{options.file}: {key} must be a list of tables, each with name and folder."
            )
        table[key] = [*listed, *(_entry_from_option(option, flag) for option in given)]
        if not table[key]:
            raise PluginError(
                f"No {key} are given. Name them in a file, or with {flag} NAME=FOLDER."
            )
        names = [str(entry.get("name")) for entry in table[key]]
        folders = [folder_name(name).casefold() for name in names]
        both = zip(names, folders, strict=True)
        twice = [name for name, folder in both if folders.count(folder) > 1]
        if twice:
            raise PluginError(
                f"Two {key} are called {twice[0]!r} and {twice[1]!r}. Give each a name of its own;"
                " capitals do not count, nor a space for an underscore, as their results would go"
                " into one folder."
            )
    return table


def _entry_from_option(option: str, flag: str) -> dict[str, Any]:
    """Read ``NAME=FOLDER,key=value,...``; values are true, false, numbers or text. A dataset of two
    folders has no FOLDER."""
    first, *others = option.split(",")
    name, equals, folder = first.partition("=")
    entry: dict[str, Any] = {"name": name, "folder": folder} if equals else {"name": name}
    for other in others:
        key, sign, value = other.partition("=")
        if not sign:
            raise PluginError(f"{flag} {option}: {other!r} is not KEY=VALUE.")
        entry[key] = _value(value)
    whole = folder if equals else "images" in entry
    if not name or not whole:
        raise PluginError(f"{flag} {option}: expected NAME=FOLDER, and after commas KEY=VALUE.")
    return entry


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if "+" in text and all(part.isdigit() for part in text.split("+")):
        return text.split("+")
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def _name(entry: Mapping[str, Any], kind: str, allowed: Sequence[str]) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(
            f"A {kind} has the name {name!r}; use letters, digits, spaces and _.+-, a letter or"
            " digit first."
        )
    check_entries(entry, allowed, f"{kind.capitalize()} {name}")
    return name
