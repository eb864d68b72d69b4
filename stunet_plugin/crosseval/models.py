"""Models of a comparison: model folders of nnU-Net, which predict, and finished predictions:
folders of label maps that any tool has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from stunet_plugin.crosseval.entries import (
    MODEL_ENTRIES,
    OWN_LABELS,
    PREDICTIONS_ENTRIES,
    Entry,
    check,
    folder_of,
    listed,
)
from stunet_plugin.crosseval.references import Dataset, describe_labels, files_by_name
from stunet_plugin.errors import PluginError, few
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.utils import label_systems
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.label_systems import LabelSystem, load_label_system
from stunet_plugin.utils.validation import channel_names

AS_IN = "as in "
"""Before the dataset whose labels finished predictions are taken to have."""


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
            **describe_labels(self.labels, self.labels_from),
        }


def read_model(entry: Entry) -> Model:
    """Read a model's entry (of a file or of ``--model``); raise PluginError for unknown entries,
    values out of range, or no such folder, fold or checkpoint."""
    where = f"Model {entry.get('name')}"
    check({"name": None, **entry}, MODEL_ENTRIES, where)
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
        tuple(map(str, listed(entry.get("fold", trained)))),
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


@dataclass(frozen=True, eq=False)
class Predictions:
    """Finished predictions of any tool.

    Attributes:
        files: by the names of dataset and case.
        unused: names of files that belong to no case.
        labels_from: as in :class:`Model`, or the dataset whose labels they are taken to have.
    """

    name: str
    folder: Path
    labels: LabelSystem
    files: Mapping[tuple[str, str], Path] = field(repr=False)
    unused: tuple[str, ...] = ()
    labels_from: str = OWN_LABELS
    kind: ClassVar = "tool"

    @property
    def notes(self) -> list[str]:
        """What a reader should know: labels that nobody has named, files that are not used."""
        notes = []
        if self.labels_from.startswith(AS_IN):
            notes.append(f"Label values of {self.name}: taken to be {self.labels_from}.")
        if self.unused:
            notes.append(f"Files of {self.name} that have no reference: {few(self.unused)}.")
        return notes

    def describe(self) -> dict[str, Any]:
        """Return where they are and what their values mean, as JSON has it."""
        return {"folder": str(self.folder), **describe_labels(self.labels, self.labels_from)}


Compared: TypeAlias = Model | Predictions
"""What is compared: a row in every table."""


def predicted_only(dataset: Dataset, entries: Sequence[Entry]) -> Dataset:
    """Return the dataset with the cases that all folders of finished predictions have; raise
    PluginError if there are none."""
    cases = dataset.cases
    for entry in entries:
        folder = Path(str(entry.get("folder", ""))).expanduser()
        within = folder / folder_of(dataset.name)
        found = files_by_name(within if within.is_dir() else folder, f"Predictions {entry['name']}")
        cases = tuple(case for case in cases if case.name in found)
    if not cases:
        raise PluginError(f"No case of dataset {dataset.name} has a prediction in all folders.")
    return replace(dataset, cases=cases, left_out=len(dataset.cases) - len(cases))


def read_predictions(entry: Entry, datasets: Sequence[Dataset]) -> Predictions:
    """Read an entry of finished predictions and find a file for each case of the datasets:
    ``FOLDER/DATASET/CASE.nii.gz``, or ``FOLDER/CASE.nii.gz`` if there is one dataset; raise
    PluginError for unknown entries, no such folder, or cases without a prediction."""
    where = f"Predictions {entry.get('name')}"
    check({"name": None, **entry}, PREDICTIONS_ENTRIES, where)
    folder = Path(str(entry.get("folder", ""))).expanduser()
    if not folder.is_dir():
        raise PluginError(f"{where}: {folder} is not a folder.")
    files: dict[tuple[str, str], Path] = {}
    unused: list[str] = []
    for dataset in datasets:
        within = folder / folder_of(dataset.name)
        if not within.is_dir():
            if len(datasets) > 1:
                raise PluginError(
                    f"{where}: {folder} has no folder {within.name}. With several datasets each has"
                    f" a folder of its own: {within / f'CASE{dataset.ending}'}."
                )
            within = folder
        found = files_by_name(within, where)
        lacking = [case.name for case in dataset.cases if case.name not in found]
        if lacking:
            raise PluginError(
                f"{where}: {len(lacking)} of {len(dataset.cases)} cases of dataset {dataset.name}"
                f" have no prediction in {within}, such as {lacking[0]}{dataset.ending}. It holds"
                f" {few(list(found), 4) or 'no label maps'}. Files are called as references are;"
                " where a tool found nothing, give it a map of zeros, or leave cases out:"
                " --predicted-only."
            )
        if found[dataset.cases[0].name].samefile(dataset.cases[0].label):
            raise PluginError(
                f"{where}: {within} holds the references of {dataset.name} themselves."
            )
        files |= {(dataset.name, case.name): found.pop(case.name) for case in dataset.cases}
        unused += found
    labels, labels_from = _labels_of_predictions(entry, folder, datasets, where)
    return Predictions(entry["name"], folder, labels, files, tuple(unused), labels_from)


def _labels_of_predictions(
    entry: Entry, folder: Path, datasets: Sequence[Dataset], where: str
) -> tuple[LabelSystem, str]:
    """Return what the values mean, and who says so: the user, a dataset.json (which
    nnUNetv2_predict leaves beside its predictions), or the datasets, if all have the same."""
    if "labels" in entry:
        return load_label_system(entry["labels"]), str(entry["labels"])
    if (folder / OWN_LABELS).is_file():
        description = read_json(folder / OWN_LABELS)
        labels = LabelSystem.from_table(description, f"predictions {entry['name']}")
        label_systems.check_regions(description, where)
        return labels, OWN_LABELS
    first, *others = (dataset.labels for dataset in datasets)
    if any(other.classes != first.classes for other in others):
        raise PluginError(
            f"{where}: what its values mean is not known, as the datasets have different labels."
            " Give labels: a published label system, or a file."
        )
    return first, f"{AS_IN}{datasets[0].name}"
