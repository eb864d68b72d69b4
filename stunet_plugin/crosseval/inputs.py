"""Inputs of a comparison: models and datasets, from a file or from options, strictly checked.

A model is any model folder of nnU-Net v2. A dataset is a raw dataset of nnU-Net, or a folder of
images and one of references.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stunet_plugin.crosseval.measures import DEFAULT_TOLERANCE
from stunet_plugin.datasets import label_systems
from stunet_plugin.datasets.label_systems import LabelSystem, canonical_name, load_label_system
from stunet_plugin.datasets.raw_dataset import find_raw, read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import channel_names, is_list, is_number

if TYPE_CHECKING:
    from stunet_plugin.commands.crosseval import Crosseval

SHARED, PAIR = "shared", "pair"
TRAINING, TEST = PARTS = ("Tr", "Ts")
"""Of a raw dataset: imagesTr with labelsTr, imagesTs with labelsTs."""
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
"""Of images and references; SimpleITK reads them."""
OWN_LABELS = "dataset.json"
"""Where labels come from that nobody names."""
SETUP_ENTRIES = (
    *("models", "datasets", "output"),
    *("classes", "tolerances", "default_tolerance", "sliced", "resample"),
)
MODEL_ENTRIES = ("name", "folder", "fold", "checkpoint", "mirroring", "step_size", "labels")
ORIGIN = ("folder", "part", "images", "references")


@dataclass(frozen=True, eq=False)
class Model:
    """A model folder of nnU-Net and how it predicts.

    Attributes:
        folds: numbers, or ("all",); the outputs of several are averaged, as nnU-Net does.
        checkpoint: file name in each fold.
        mirroring: average over mirrored inputs, on the axes that the model allows.
        step_size: of the sliding window, in patches.
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
        axes = checkpoint.get("inference_allowed_mirroring_axes") or ()
        return {
            "folder": str(self.folder),
            "trainer": str(checkpoint.get("trainer_name", "")),
            "plans": str(read_json(self.folder / "plans.json").get("plans_name", "")),
            "configuration": str((checkpoint.get("init_args") or {}).get("configuration", "")),
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
        ending: of the references and predictions.
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
class Setup:
    """A comparison: what is compared, how it is scored, and where the results go.

    Attributes:
        classes: :data:`SHARED` (by all models and datasets), :data:`PAIR` (by each pair), or
            canonical names.
        tolerances: of the NSD in mm by class or organ, where they differ from FLARE22's protocol.
        default_tolerance: of classes that neither knows.
        sliced: score tubular organs between the first and the last slice of the reference alone.
        resample: put predictions on the grid of their reference where they differ.
    """

    models: tuple[Model, ...]
    datasets: tuple[Dataset, ...]
    out: Path
    classes: str | tuple[str, ...] = SHARED
    tolerances: Mapping[str, float] = field(default_factory=dict)
    default_tolerance: float = DEFAULT_TOLERANCE
    sliced: bool = False
    resample: bool = False


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
    classes = _take(
        table, "classes", SHARED, _are_classes, f"{SHARED!r}, {PAIR!r} or a list of names"
    )
    if classes not in (SHARED, PAIR):
        classes = tuple(dict.fromkeys(map(canonical_name, classes)))
    own = _take(table, "tolerances", {}, _are_tolerances, "a table of classes and millimetres")
    wanted = "a number of millimetres of at least 0"
    default = _take(table, "default_tolerance", DEFAULT_TOLERANCE, _is_tolerance, wanted)
    switches = (_take(table, key, False, _is_bool, "true or false") for key in SETUP_ENTRIES[-2:])
    return Setup(
        tuple(map(read_model, table["models"])),
        tuple(map(read_dataset, table["datasets"])),
        Path(table["output"]).expanduser(),
        classes,
        {canonical_name(name): float(value) for name, value in own.items()},
        float(default),
        *switches,
    )


def folder_name(name: str) -> str:
    """Return the name of a model or dataset as that of a folder."""
    return name.replace(" ", "_")


def read_model(entry: Mapping[str, Any]) -> Model:
    """Check a model's entry (of a file or of ``--model``) and the folder that it names.

    Raises:
        PluginError: unknown entries, no such folder, fold or checkpoint, or values out of range.
    """
    name = _name(entry, "model", MODEL_ENTRIES)
    where = f"Model {name}: "
    folder = Path(str(entry.get("folder", ""))).expanduser()
    if not (folder / "plans.json").is_file() or not (folder / "dataset.json").is_file():
        raise PluginError(
            f"{where}{folder} is no model folder of nnU-Net v2, which holds plans.json,"
            " dataset.json and fold_0; its name ends like __nnUNetPlans__3d_fullres."
        )
    dataset = read_json(folder / "dataset.json")
    if "labels" in entry:
        labels = load_label_system(entry["labels"])
    else:
        labels = LabelSystem.from_table(dataset, f"model {name}")
        label_systems.check_regions(dataset, f"Model {name}")
    checkpoint = str(entry.get("checkpoint", CHECKPOINT))
    found = sorted(x.parent.name.removeprefix("fold_") for x in folder.glob(f"fold_*/{checkpoint}"))
    # That of all cases only where there are no others, as nnU-Net does.
    trained = [fold for fold in found if fold.isdigit()] or found[:1]
    folds = _take(entry, "fold", trained, _are_folds, "a number, a list of them, or 'all'", where)
    channels = channel_names(dataset, f"{where}dataset.json")
    step_size = _take(
        entry, "step_size", 0.5, _is_step_size, "a number above 0 and at most 1", where
    )
    model = Model(
        name,
        folder,
        tuple(map(str, folds if is_list(folds) else [folds])),
        checkpoint,
        _take(entry, "mirroring", True, _is_bool, "true or false", where),
        float(step_size),
        labels,
        tuple(str(channel) for channel in channels.values()),
        str(entry.get("labels", OWN_LABELS)),
    )
    missing = [file for file in model.checkpoints if not file.is_file()]
    if missing or not folds:
        there = sorted(str(path.relative_to(folder)) for path in folder.glob("fold_*/*.pth"))
        lacking = missing[0] if missing else f"fold_*/{checkpoint}"
        raise PluginError(
            f"{where}{lacking} is not there. {folder} has {', '.join(there) or 'no checkpoints'}."
        )
    return model


def read_dataset(entry: Mapping[str, Any]) -> Dataset:
    """Check a dataset's entry (of a file or of ``--dataset``) and list its cases.

    A raw dataset of nnU-Net is given by ``folder`` (a path, or an ID or name in nnUNet_raw;
    ``part``: Tr or Ts), anything else by ``images`` and ``references``. Images are named
    ``CASE_0000.nii.gz``, one per channel, or, with one channel, ``CASE.nii.gz``; references
    ``CASE.nii.gz``.

    Raises:
        PluginError: unknown entries, no such folders, no references, or images without one.
    """
    name = _name(entry, "dataset", ("name", *ORIGIN, "labels"))
    where = f"Dataset {name}: "
    part = _take(entry, "part", TRAINING, PARTS.__contains__, "Tr or Ts, as in imagesTs", where)
    origin = {key: str(entry[key]) for key in ORIGIN if key in entry}
    folder = Path()
    if "folder" in entry:
        # In full: an ID says nothing to somebody who reads the report elsewhere.
        folder = find_raw(os.path.expanduser(origin["folder"]))
        origin["folder"] = str(folder)
        if "labels" not in entry and not (folder / "dataset.json").is_file():
            raise PluginError(
                f"{where}{folder} has no dataset.json that says what its labels mean. Give labels."
            )
    elif not {"images", "references", "labels"} <= set(entry):
        raise PluginError(
            f"{where}give folder (a raw dataset of nnU-Net), or images, references and labels."
        )
    labels = load_label_system(entry.get("labels", folder))
    cases = _listed_cases(folder) if set(origin) == {"folder"} else ()
    if not {"images", "references"} <= set(entry):
        origin.setdefault("part", "listed in dataset.json" if cases else TRAINING)
    if not cases:
        images = Path(origin.get("images", folder / f"images{part}")).expanduser()
        references = Path(origin.get("references", folder / f"labels{part}")).expanduser()
        cases = _cases_in(images, references, where)
    for case in cases:
        if len(case.images) != len(cases[0].images):
            raise PluginError(
                f"{where}{case.name} has {len(case.images)} channels, {cases[0].name} has"
                f" {len(cases[0].images)}."
            )
    ending = _ending(cases[0].reference)
    if not ending:
        raise PluginError(f"{where}{cases[0].reference} ends in none of {', '.join(ENDINGS)}.")
    return Dataset(name, labels, ending, cases, origin, str(entry.get("labels", OWN_LABELS)))


def _listed_cases(folder: Path) -> tuple[Case, ...]:
    """Return the cases whose files ``dataset.json`` lists, as nnU-Net allows; none if it does
    not."""
    file = folder / "dataset.json"
    if not file.is_file() or "dataset" not in label_systems.read_table(file):
        return ()
    return tuple(Case(case.name, case.images, case.label) for case in read_raw(folder).cases)


def _cases_in(images: Path, references: Path, where: str) -> tuple[Case, ...]:
    for folder, kind in ((images, "images"), (references, "references")):
        if not folder.is_dir():
            beside = folder.parent
            parts = [
                f"part={part}"
                for part in PARTS
                if (beside / f"images{part}").is_dir() and (beside / f"labels{part}").is_dir()
            ]
            hint = f" Parts with images and references: {', '.join(parts)}." if parts else ""
            raise PluginError(f"{where}there is no folder of {kind} {folder}.{hint}")
    known = _files_by_name(references, where)
    cases: dict[str, list[Path]] = {}
    for stem, file in _files_by_name(images, where).items():
        channel = re.fullmatch(r"(.+)_\d{4}", stem)
        cases.setdefault(channel[1] if channel and stem not in known else stem, []).append(file)
    alone = [case for case in cases if case not in known]
    if alone:
        raise PluginError(
            f"{where}{len(alone)} of {len(cases)} images have no reference in {references}, such"
            f" as {alone[0]}. References have the name of the case without the channel's number."
        )
    if not cases:
        raise PluginError(f"{where}no images in {images} that end in {', '.join(ENDINGS)}.")
    return tuple(Case(case, tuple(files), known[case]) for case, files in sorted(cases.items()))


def _files_by_name(folder: Path, where: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if _ending(path) and not path.name.startswith("."):
            stem = path.name.removesuffix(_ending(path))
            if stem in found:
                raise PluginError(
                    f"{where}{found[stem]} and {path.name} are the same case twice. Remove one."
                )
            found[stem] = path
    return found


def _ending(path: Path) -> str:
    return next((one for one in ENDINGS if path.name.endswith(one)), "")


def _read_tables(options: Crosseval) -> dict[str, Any]:
    """Return the table of the file, with what ``--model`` and ``--dataset`` add to it."""
    table = label_systems.read_table(Path(options.file)) if options.file else {}
    label_systems.check_entries(table, SETUP_ENTRIES, str(options.file))
    for key, given in (("models", options.models), ("datasets", options.datasets)):
        flag = f"--{key.removesuffix('s')}"
        wanted = "a list of tables, each with name and folder"
        listed = _take(table, key, [], _are_tables, wanted, f"{options.file}: ")
        table[key] = [*listed, *(_entry_from_option(option, flag) for option in given)]
        if not table[key]:
            raise PluginError(f"No {key} are given. Name them in a file, or by {flag} NAME=FOLDER.")
        names = [str(entry.get("name")) for entry in table[key]]
        folders = [folder_name(name).casefold() for name in names]
        twice = [name for name, x in zip(names, folders, strict=True) if folders.count(x) > 1]
        if twice:
            raise PluginError(
                f"Two {key} are called {twice[0]!r} and {twice[1]!r}, and their results would go"
                " into one folder. Give each a name of its own; capitals do not count, nor a space"
                " for an underscore."
            )
    return table


def _entry_from_option(option: str, flag: str) -> dict[str, Any]:
    """Read ``NAME=FOLDER,key=value,...``; values are true, false, numbers or text. A dataset of two
    folders has no FOLDER."""
    first, *others = option.split(",")
    name, equals, folder = first.partition("=")
    entry: dict[str, Any] = {"name": name, "folder": folder} if equals else {"name": name}
    for other in others:
        key, _, value = other.partition("=")
        entry[key] = _value(value)
    whole = folder if equals else "images" in entry
    if not name or not whole or not all("=" in other for other in others):
        raise PluginError(f"{flag} {option}: expected NAME=FOLDER, and after commas KEY=VALUE.")
    return entry


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"\d+(\+\d+)+", text):
        return text.split("+")
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


# --- values that people give


def _name(entry: Mapping[str, Any], kind: str, allowed: tuple[str, ...]) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.+-]*", name):
        raise PluginError(
            f"A {kind} has the name {name!r}; use letters, digits, spaces and _.+-, a letter or"
            " digit first."
        )
    label_systems.check_entries(entry, allowed, f"{kind.capitalize()} {name}")
    return name


def _take(
    table: Mapping[str, Any],
    key: str,
    default: Any,
    fits: Callable[[Any], bool],
    wanted: str,
    where: str = "",
) -> Any:
    """Return an entry, or the default; raise PluginError if it does not fit."""
    if key in table and not fits(table[key]):
        raise PluginError(f"{where}{key} must be {wanted}, not {table[key]!r}.")
    return table.get(key, default)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_step_size(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1


def _is_tolerance(value: Any) -> bool:
    return is_number(value) and value >= 0


def _are_tolerances(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_tolerance, value.values()))


def _are_classes(value: Any) -> bool:
    names = is_list(value) and all(isinstance(name, str) for name in value)
    return value in (SHARED, PAIR) or (names and len(value) > 0)


def _are_folds(value: Any) -> bool:
    folds = [str(fold) for fold in (value if is_list(value) else [value])]
    return bool(folds) and all(fold.isdigit() or fold == "all" for fold in folds)


def _are_tables(value: Any) -> bool:
    return is_list(value) and all(isinstance(entry, Mapping) for entry in value)
