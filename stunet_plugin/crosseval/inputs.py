"""Inputs of a comparison: models, finished predictions and datasets, from a file or from options,
strictly checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stunet_plugin.crosseval.entries import (
    PAIR,
    SETUP_ENTRIES,
    SHARED,
    Entry,
    check,
    check_names,
    entries_of,
)
from stunet_plugin.crosseval.models import (
    Compared,
    Model,
    Predictions,
    predicted_only,
    read_model,
    read_predictions,
)
from stunet_plugin.crosseval.references import Dataset, read_dataset
from stunet_plugin.errors import PluginError
from stunet_plugin.utils import label_systems
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.label_systems import canonical_name
from stunet_plugin.utils.measures import DEFAULT_TOLERANCE, TOLERANCES
from stunet_plugin.utils.parts import check_part

if TYPE_CHECKING:
    from stunet_plugin.commands.crosseval import Crosseval


@dataclass(frozen=True)
class Setup:
    """What is compared, how it is scored, and where the results go.

    Attributes:
        models: those that predict, then finished predictions.
        classes: :data:`SHARED` (by all models and datasets), :data:`PAIR` (by each pair), or
            canonical names.
        tolerances: of the NSD in mm by class or organ; ``default_tolerance`` of all others.
        sliced: score tubular organs between the first and the last slice of the reference alone.
        lesions: classes of lesions, beside those whose name says so.
        num_parts, part_id: this run predicts and scores every num_parts-th case.
        resample: put predictions on the grid of their reference where they differ.
        calibration: keep the confidence of models' predictions, too.
    """

    models: tuple[Compared, ...]
    datasets: tuple[Dataset, ...]
    output: Path
    classes: str | tuple[str, ...] = SHARED
    tolerances: Mapping[str, float] = field(default_factory=lambda: TOLERANCES)
    default_tolerance: float = DEFAULT_TOLERANCE
    sliced: bool = False
    lesions: tuple[str, ...] = ()
    resample: bool = False
    calibration: bool = False
    device: str = "cpu"
    processes: int = 1
    num_parts: int = 1
    part_id: int = 0

    @property
    def trained(self) -> list[Model]:
        """The models that predict."""
        return [model for model in self.models if isinstance(model, Model)]

    @property
    def finished(self) -> list[Predictions]:
        """The tools whose predictions are there."""
        return [model for model in self.models if isinstance(model, Predictions)]


def read_setup(options: Crosseval) -> Setup:
    """Read the file and the options, which win; raise PluginError if anything in them is wrong."""
    half = max((os.cpu_count() or 1) // 2, 1)
    processes = half if options.processes is None else options.processes
    if processes < 1:
        raise PluginError(f"-np must be at least 1, not {processes}.")
    check_part(options.num_parts, options.part_id)
    table = label_systems.read_table(Path(options.file)) if options.file else {}
    check(table, SETUP_ENTRIES, str(options.file))
    given = {
        "output": options.out,
        "classes": options.classes,
        "default_tolerance": options.tolerance,
        "sliced": options.sliced or None,
        "lesions": options.lesions,
        "resample": options.resample or None,
        "calibration": options.calibration or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    check(given, SETUP_ENTRIES, "Options")
    table |= given
    models = entries_of(table.pop("models", ()), options.models, "--model")
    finished = entries_of(table.pop("predictions", ()), options.predictions, "--predictions")
    references = entries_of((), options.references, "--references")
    datasets = [*entries_of(table.pop("datasets", ()), options.datasets, "--dataset"), *references]
    _check_entries(models, finished, datasets)
    if not table.get("output"):
        raise PluginError("Say where the results go: -o FOLDER (or output in the file).")
    if table.get("classes", SHARED) not in (SHARED, PAIR):
        table["classes"] = tuple(dict.fromkeys(map(canonical_name, table["classes"])))
    table["lesions"] = tuple(map(canonical_name, table.get("lesions", ())))
    own = {canonical_name(name): mm for name, mm in table.get("tolerances", {}).items()}
    table["tolerances"] = {**TOLERANCES, **own}
    table["output"] = Path(table["output"]).expanduser()
    compared = tuple(map(read_dataset, datasets))
    if options.predicted_only:
        compared = tuple(predicted_only(dataset, finished) for dataset in compared)
    setup = Setup(
        models=(
            *map(read_model, models),
            *(read_predictions(entry, compared) for entry in finished),
        ),
        datasets=compared,
        **table,
        device=choose_device(options.device),
        processes=processes,
        num_parts=options.num_parts,
        part_id=options.part_id,
    )
    for dataset in setup.datasets:
        if setup.trained and not dataset.cases[0].images:
            raise PluginError(
                f"Dataset {dataset.name} has no images, which model {setup.trained[0].name} needs."
                " Name their folder: images=FOLDER, beside references=FOLDER in --dataset."
            )
    return setup


def _check_entries(
    models: Sequence[Entry], finished: Sequence[Entry], datasets: Sequence[Entry]
) -> None:
    """Refuse a comparison of nothing, and names that clash."""
    if not models and not finished:
        raise PluginError(
            "No models are given. Name them in a file, or by --model NAME=FOLDER; finished"
            " predictions by --predictions NAME=FOLDER."
        )
    if not datasets:
        raise PluginError(
            "No datasets are given. Name them in a file, or by --dataset NAME=FOLDER; references of"
            " finished predictions by --references FOLDER."
        )
    check_names([*models, *finished], "model")
    check_names(datasets, "dataset")
