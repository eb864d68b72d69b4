"""Inputs of a comparison: models and datasets, from a file or from options, strictly checked.

A model is any model folder of nnU-Net v2. A dataset is a raw dataset of nnU-Net, or a folder of
images and one of references.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stunet_plugin.crosseval.measures import DEFAULT_TOLERANCE, TOLERANCES
from stunet_plugin.datasets.raw_dataset import Case, find_raw, read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.utils import label_systems
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.label_systems import LabelSystem, canonical_name, load_label_system
from stunet_plugin.utils.validation import channel_names, is_list, is_number

if TYPE_CHECKING:
    from stunet_plugin.commands.crosseval import Crosseval

SHARED, PAIR = "shared", "pair"
PARTS = ("Tr", "Ts")
"""Of a raw dataset: imagesTr with labelsTr, imagesTs with labelsTs."""
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
"""Of images and references; SimpleITK reads them."""
OWN_LABELS = "dataset.json"
"""Where labels come from that nobody names."""
ORIGIN = ("folder", "part", "images", "references")


@dataclass(frozen=True, eq=False)
class Model:
    """A model folder of nnU-Net and how it predicts.

    Attributes:
        folds: numbers, or ("all",); the outputs of several are averaged, as nnU-Net does.
        step_size: of the sliding window, in patches.
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
        """Return where it is, what trained it (as the checkpoint says: a folder may have been
        renamed), how it predicts and what it knows, as JSON has it."""
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
            **_describe_labels(self),
        }


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
        return {**self.origin, "cases": len(self.cases), **_describe_labels(self)}


def _describe_labels(one: Model | Dataset) -> dict[str, Any]:
    classes = list(one.labels.classes)
    return {"labels": one.labels.name, "labels_from": one.labels_from, "classes": classes}


@dataclass(frozen=True)
class Setup:
    """What is compared, how it is scored, and where the results go.

    Attributes:
        classes: :data:`SHARED` (by all models and datasets), :data:`PAIR` (by each pair), or
            canonical names.
        tolerances: of the NSD in mm by class or organ; ``default_tolerance`` of all others.
        sliced: score tubular organs between the first and the last slice of the reference alone.
        resample: put predictions on the grid of their reference where they differ.
    """

    models: tuple[Model, ...]
    datasets: tuple[Dataset, ...]
    output: Path
    classes: str | tuple[str, ...] = SHARED
    tolerances: Mapping[str, float] = field(default_factory=lambda: TOLERANCES)
    default_tolerance: float = DEFAULT_TOLERANCE
    sliced: bool = False
    resample: bool = False
    device: str = "cpu"
    processes: int = 1


def read_setup(options: Crosseval) -> Setup:
    """Read the file and the options, which win; raise PluginError if anything in them is wrong."""
    half = max((os.cpu_count() or 1) // 2, 1)
    processes = half if options.processes is None else options.processes
    if processes < 1:
        raise PluginError(f"-np must be at least 1, not {processes}.")
    table = label_systems.read_table(Path(options.file)) if options.file else {}
    _check(table, SETUP_ENTRIES, str(options.file))
    given = {
        "output": options.out,
        "classes": options.classes,
        "default_tolerance": options.tolerance,
        "sliced": options.sliced or None,
        "resample": options.resample or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    _check(given, SETUP_ENTRIES, "Options")
    table |= given
    models = _entries(table.get("models", ()), options.models, "model")
    datasets = _entries(table.get("datasets", ()), options.datasets, "dataset")
    if not table.get("output"):
        raise PluginError("Say where the results go: -o FOLDER (or output in the file).")
    if table.get("classes", SHARED) not in (SHARED, PAIR):
        table["classes"] = tuple(dict.fromkeys(map(canonical_name, table["classes"])))
    own = {canonical_name(name): mm for name, mm in table.get("tolerances", {}).items()}
    table |= {
        "models": tuple(map(read_model, models)),
        "datasets": tuple(map(read_dataset, datasets)),
        "output": Path(table["output"]).expanduser(),
        "tolerances": {**TOLERANCES, **own},
    }
    return Setup(**table, device=choose_device(options.device), processes=processes)


def read_model(entry: Mapping[str, Any]) -> Model:
    """Read a model's entry (of a file or of ``--model``); raise PluginError for unknown entries,
    values out of range, or no such folder, fold or checkpoint."""
    where = f"Model {entry.get('name')}"
    _check({"name": None, **entry}, MODEL_ENTRIES, where)
    folder = Path(str(entry.get("folder", ""))).expanduser()
    if not (folder / "plans.json").is_file() or not (folder / "dataset.json").is_file():
        raise PluginError(
            f"{where}: {folder} is no model folder of nnU-Net v2, which holds plans.json,"
            " dataset.json and fold_0; its name ends like __nnUNetPlans__3d_fullres."
        )
    dataset = read_json(folder / "dataset.json")
    if "labels" in entry:
        labels = load_label_system(entry["labels"])
    else:
        labels = LabelSystem.from_table(dataset, f"model {entry['name']}")
        label_systems.check_regions(dataset, where)
    checkpoint = str(entry.get("checkpoint", CHECKPOINT))
    found = sorted(x.parent.name.removeprefix("fold_") for x in folder.glob(f"fold_*/{checkpoint}"))
    # That of all cases only where there are no others, as nnU-Net does.
    trained = [fold for fold in found if fold.isdigit()] or found[:1]
    model = Model(
        entry["name"],
        folder,
        tuple(map(str, _listed(entry.get("fold", trained)))),
        checkpoint,
        entry.get("mirroring", True),
        float(entry.get("step_size", 0.5)),
        labels,
        tuple(map(str, channel_names(dataset, f"{where}: dataset.json").values())),
        str(entry.get("labels", OWN_LABELS)),
    )
    lacking = [x for x in model.checkpoints or [Path(f"fold_*/{checkpoint}")] if not x.is_file()]
    if lacking:
        there = sorted(str(path.relative_to(folder)) for path in folder.glob("fold_*/*.pth"))
        known = ", ".join(there) or "no checkpoints"
        raise PluginError(f"{where}: {lacking[0]} is not there. {folder} has {known}.")
    return model


def read_dataset(entry: Mapping[str, Any]) -> Dataset:
    """Read a dataset's entry (of a file or of ``--dataset``) and list its cases; raise PluginError
    for unknown entries, no such folders, no references, or images without one.

    A raw dataset of nnU-Net is given by ``folder`` (a path, or an ID or name in nnUNet_raw;
    ``part``: Tr or Ts), anything else by ``images`` and ``references``. Images are named
    ``CASE_0000.nii.gz``, one per channel, or, with one channel, ``CASE.nii.gz``; references
    ``CASE.nii.gz``.
    """
    where = f"Dataset {entry.get('name')}"
    _check({"name": None, **entry}, ("name", *ORIGIN, "labels"), where)
    part = entry.get("part", PARTS[0])
    origin = {key: str(entry[key]) for key in ORIGIN if key in entry}
    folder = Path()
    if "folder" in entry:
        # In full: an ID says nothing to somebody who reads the report elsewhere.
        folder = find_raw(os.path.expanduser(origin["folder"]))
        origin["folder"] = str(folder)
        if "labels" not in entry and not (folder / "dataset.json").is_file():
            raise PluginError(
                f"{where}: {folder} has no dataset.json, which says what labels mean. Give labels."
            )
    elif not {"images", "references", "labels"} <= set(entry):
        raise PluginError(
            f"{where}: give folder (a raw dataset of nnU-Net), or images, references and labels."
        )
    labels = load_label_system(entry.get("labels", folder))
    cases: tuple[Case, ...] = ()
    description = folder / "dataset.json"
    if set(origin) == {"folder"} and description.is_file() and "dataset" in read_json(description):
        cases = read_raw(folder).cases  # that dataset.json lists, as nnU-Net allows
    if not {"images", "references"} <= set(entry):
        origin.setdefault("part", "listed in dataset.json" if cases else part)
    if not cases:
        images = Path(origin.get("images", folder / f"images{part}")).expanduser()
        references = Path(origin.get("references", folder / f"labels{part}")).expanduser()
        cases = _cases_in(images, references, where)
    channels = {len(case.images): case.name for case in cases}
    if len(channels) > 1:
        found = " and ".join(f"{name} has {count}" for count, name in channels.items())
        raise PluginError(f"{where}: cases differ in their number of channels: {found}.")
    ending = _ending(cases[0].label)
    if not ending:
        raise PluginError(f"{where}: {cases[0].label} ends in none of {', '.join(ENDINGS)}.")
    return Dataset(
        entry["name"], labels, ending, cases, origin, str(entry.get("labels", OWN_LABELS))
    )


def _cases_in(images: Path, references: Path, where: str) -> tuple[Case, ...]:
    for folder, kind in ((images, "images"), (references, "references")):
        if not folder.is_dir():
            both = {x: [folder.parent / f"{y}{x}" for y in ("images", "labels")] for x in PARTS}
            parts = [f"part={part}" for part in PARTS if all(map(Path.is_dir, both[part]))]
            hint = f" Parts with images and references: {', '.join(parts)}." if parts else ""
            raise PluginError(f"{where}: there is no folder of {kind} {folder}.{hint}")
    known = _files_by_name(references, where)
    cases: dict[str, list[Path]] = {}
    for stem, file in _files_by_name(images, where).items():
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


def _files_by_name(folder: Path, where: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("[!.]*")):
        if ending := _ending(path):
            stem = path.name.removesuffix(ending)
            if stem in found:
                raise PluginError(
                    f"{where}: {found[stem]} and {path.name} are the same case twice. Remove one."
                )
            found[stem] = path
    return found


def _ending(path: Path) -> str:
    return next((one for one in ENDINGS if path.name.endswith(one)), "")


def _entries(
    listed: Sequence[Mapping[str, Any]], given: Sequence[str], kind: str
) -> list[Mapping[str, Any]]:
    """Return those of the file and of the options; none may be called like another."""
    entries = [*listed, *(_entry_from_option(option, f"--{kind}") for option in given)]
    if not entries:
        raise PluginError(f"No {kind}s are given. Name them in a file, or by --{kind} NAME=FOLDER.")
    names = [str(entry.get("name")) for entry in entries]
    folders = [name.replace(" ", "_").casefold() for name in names]
    twice = [name for name, x in zip(names, folders, strict=True) if folders.count(x) > 1]
    if twice:
        raise PluginError(
            f"Two {kind}s are called {twice[0]!r} and {twice[1]!r}, and their results would go"
            " into one folder. Give each a name of its own; capitals do not count, nor a space"
            " for an underscore."
        )
    return entries


def _entry_from_option(option: str, flag: str) -> dict[str, Any]:
    """Read ``NAME=FOLDER,key=value,...``; values are true, false, numbers or text. A dataset of two
    folders has no FOLDER."""
    first, *others = (part.partition("=") for part in option.split(","))
    name, equals, folder = first
    entry = {"name": name, **({"folder": folder} if equals else {})}
    entry |= {key: _value(value) for key, _, value in others}
    whole = folder if equals else "images" in entry
    if not name or not whole or not all(sign for _, sign, _ in others):
        raise PluginError(f"{flag} {option}: expected NAME=FOLDER, and after commas KEY=VALUE.")
    return entry


def _value(text: str) -> Any:
    if re.fullmatch(r"\d+(\+\d+)+", text):
        return text.split("+")
    try:
        return json.loads(text)
    except ValueError:
        return text


# --- what entries there are, and what fits in them


def _is_tolerance(value: Any) -> bool:
    return is_number(value) and value >= 0


SETUP_ENTRIES = (
    *("models", "datasets", "output"),
    *("classes", "tolerances", "default_tolerance", "sliced", "resample"),
)
MODEL_ENTRIES = ("name", "folder", "fold", "checkpoint", "mirroring", "step_size", "labels")
_TABLES = (
    lambda x: _are(x, lambda entry: isinstance(entry, Mapping)),
    "a list of tables, each with name and folder",
)
_SWITCH = (lambda x: isinstance(x, bool), "true or false")
FITS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "models": _TABLES,
    "datasets": _TABLES,
    "classes": (
        lambda x: x in (SHARED, PAIR) or (_are(x, lambda name: isinstance(name, str)) and x),
        f"{SHARED!r}, {PAIR!r} or a list of names",
    ),
    "tolerances": (
        lambda x: isinstance(x, Mapping) and all(map(_is_tolerance, x.values())),
        "a table of classes and millimetres",
    ),
    "default_tolerance": (_is_tolerance, "a number of millimetres of at least 0"),
    "sliced": _SWITCH,
    "resample": _SWITCH,
    "name": (
        lambda x: isinstance(x, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.+-]*", x),
        "letters, digits, spaces and _.+-, a letter or digit first",
    ),
    "fold": (
        lambda x: _are(_listed(x), lambda fold: re.fullmatch(r"\d+|all", str(fold))) and x != [],
        "a number, a list of them, or 'all'",
    ),
    "mirroring": _SWITCH,
    "step_size": (lambda x: is_number(x) and 0 < x <= 1, "a number above 0 and at most 1"),
    "part": (lambda x: x in PARTS, "Tr or Ts, as in imagesTs"),
}
"""By entry, what tells that a value fits, and what a message says that it must be."""


def _check(table: Mapping[str, Any], entries: Sequence[str], where: str) -> None:
    """Raise PluginError if a table has an entry that there is not, or a value that does not fit."""
    label_systems.check_entries(table, entries, where)
    for key, value in table.items():
        fits, wanted = FITS.get(key, (lambda _: True, ""))
        if not fits(value):
            raise PluginError(f"{where}: {key} must be {wanted}, not {value!r}.")


def _are(values: Any, fits: Callable[[Any], Any]) -> bool:
    return is_list(values) and all(map(fits, values))


def _listed(value: Any) -> Any:
    return value if is_list(value) else [value]
