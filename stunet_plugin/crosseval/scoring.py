"""Scoring one case after the other, in worker processes, with one case in memory for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.crosseval.comparison import ScoredClass
from stunet_plugin.crosseval.measures import between_first_and_last, score
from stunet_plugin.datasets.label_systems import LabelSystem
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.geometry import Grid, on_grid_of, resampled
from stunet_plugin.utils.images import read_label_map
from stunet_plugin.utils.workers import run_ordered


@dataclass(frozen=True)
class CaseTask:
    """A prediction and its reference.

    Attributes:
        key: names the task among all.
        classes: what is scored.
        reference_labels, prediction_labels: what the values of both files may be.
        resample: put the prediction on the reference's grid where they differ.
    """

    key: tuple[str, str, str]
    reference: Path
    prediction: Path
    classes: tuple[ScoredClass, ...]
    reference_labels: LabelSystem
    prediction_labels: LabelSystem
    resample: bool


@dataclass(frozen=True)
class CaseScores:
    """What came out of a task.

    Attributes:
        values: measures by class.
        warnings: what was done to the case.
        problem: why there are no values.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    problem: str = ""


def score_case(task: CaseTask) -> CaseScores:
    """Score all classes of a case; wrong input becomes the result's ``problem``."""
    try:
        reference, prediction, warnings = _read_both(task)
    except PluginError as error:
        return CaseScores(problem=str(error))
    grid = Grid.of(reference)
    truth, predicted = sitk.GetArrayViewFromImage(reference), sitk.GetArrayViewFromImage(prediction)
    heard = None if task.reference_labels.ignore is None else truth != task.reference_labels.ignore
    values: dict[str, dict[str, float]] = {}
    for scored in task.classes:
        masks = [
            np.isin(array, of)
            for array, of in ((truth, scored.in_reference), (predicted, scored.in_prediction))
        ]
        if heard is not None:
            masks = [mask & heard for mask in masks]
        if scored.sliced and len(grid.size) == 3:
            part = between_first_and_last(masks[0], grid.axial)
            masks = [mask[part] for mask in masks]
        values[scored.name] = score(masks[0], masks[1], grid.spacing[::-1], scored.tolerance)
    return CaseScores(values, tuple(warnings))


def score_all(tasks: Sequence[CaseTask], processes: int) -> Iterator[tuple[CaseTask, CaseScores]]:
    """Score cases and yield them in their order; in this process if there is one to have."""
    if processes <= 1:
        yield from ((task, score_case(task)) for task in tasks)
        return
    for finished in run_ordered(iter(tasks), score_case, processes):
        yield finished.task, finished.value or CaseScores(problem=finished.failure)


def read_known_labels(path: Path, labels: LabelSystem) -> Any:
    """Read a label map whose values its label system has.

    Raises:
        PluginError: it cannot be read, is no label map, or holds other values.
    """
    return read_label_map(path, labels.values)


def _read_both(task: CaseTask) -> tuple[Any, Any, list[str]]:
    reference = read_known_labels(task.reference, task.reference_labels)
    prediction = read_known_labels(task.prediction, task.prediction_labels)
    warnings: list[str] = []
    turned = on_grid_of(prediction, reference)
    if turned is None:
        both = f"reference {Grid.of(reference)}; prediction {Grid.of(prediction)}"
        if not task.resample or reference.GetDimension() != prediction.GetDimension():
            raise PluginError(
                f"{task.reference} and {task.prediction} do not have the same voxels: {both}. Mend"
                " the files, or have the prediction resampled to the reference's grid with"
                " --resample."
            )
        turned = resampled(prediction, reference)
        warnings.append(f"The prediction was resampled to the reference's grid: {both}.")
    return reference, turned, warnings
