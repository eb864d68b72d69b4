"""Scoring of predictions against references, in worker processes, one case in memory for each.

The scores of a case are kept in a file with a hash of all that they depend on, so that a run that
is started again scores only what has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.crosseval.calibration import count, probabilities_beside, read_confidence
from stunet_plugin.crosseval.comparison import PREDICTIONS, Comparison, Pair, ScoredClass
from stunet_plugin.crosseval.lesions import match_lesions
from stunet_plugin.crosseval.models import Predictions
from stunet_plugin.crosseval.predictions import find_missing, read_record
from stunet_plugin.crosseval.references import ending_of_map
from stunet_plugin.crosseval.statistics import Results
from stunet_plugin.datasets.raw_dataset import Case
from stunet_plugin.errors import PluginError, few_lines
from stunet_plugin.utils.files import without_nan, write_atomically
from stunet_plugin.utils.geometry import Grid, on_grid_of, resampled
from stunet_plugin.utils.image_files import hash_of_image
from stunet_plugin.utils.images import read_label_map
from stunet_plugin.utils.label_systems import LabelSystem
from stunet_plugin.utils.measures import bounding_box, score
from stunet_plugin.utils.workers import run_ordered

SCORES = "scores"
SCORING_VERSION = 1
"""Goes up when the same files would be scored otherwise, so that kept scores no longer count."""


@dataclass(frozen=True)
class CaseTask:
    """A prediction and its reference, with what their values may mean; ``names`` are those of
    model, dataset and case."""

    names: tuple[str, str, str]
    reference: Path
    prediction: Path
    classes: tuple[ScoredClass, ...]
    reference_labels: LabelSystem
    prediction_labels: LabelSystem
    resample: bool
    confidence: Path | None = None
    """nnU-Net's probabilities, or a map of the confidence."""

    @classmethod
    def of(cls, comparison: Comparison, pair: Pair, case: Case) -> CaseTask:
        files = (case.label, pair.prediction(comparison.setup.output, case))
        labels = (pair.dataset.labels, pair.model.labels)
        names = (*pair.names, case.name)
        confidence = None
        if isinstance(pair.model, Predictions):
            confidence = probabilities_beside(files[1], ending_of_map(files[1]))
        elif comparison.setup.calibration:
            confidence = pair.confidence(comparison.setup.output, case)
        return cls(names, *files, pair.classes, *labels, comparison.setup.resample, confidence)


@dataclass(frozen=True)
class CaseScores:
    """Result of a task: measures by class, what was done to the case, instance
    measures of classes of lesions, counts of voxels by confidence, why there are no values."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    lesions: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: list[list[float]] | None = None
    problem: str = ""


Names = tuple[str, str, str]
Record = dict[str, Any]


def score_all(comparison: Comparison) -> Results | None:
    """Score what has not been scored of this part; return the results of all parts, None while
    others are not done. Raise PluginError for cases that cannot be scored, when all others are, and
    kept."""
    kept = _Kept(comparison)
    missing = kept.find(comparison.own_cases)
    print(
        f"Scores: {len(kept.records) - len(missing)} of {len(kept.records)} are there.", flush=True
    )
    problems = []
    tasks = [task for task, *_ in missing.values()]
    for task, found in _score(tasks, min(comparison.setup.processes, len(tasks))):
        where = "{} on {}, {}".format(*task.names)
        if found.problem:
            problems.append(f"{where}: {found.problem}")
            continue
        for warning in found.warnings:
            print(f"  {where}: {warning}", flush=True)
        _, file, made_from = missing[task.names]
        file.parent.mkdir(parents=True, exist_ok=True)
        record: Record = {"made_from": made_from, "values": without_nan(found.values)}
        record |= {"lesions": without_nan(found.lesions), "calibration": found.calibration}
        kept.records[task.names] = {**record, "warnings": list(found.warnings)}
        write_atomically(file, json.dumps(kept.records[task.names]))
    if problems:
        told = f"{len(problems)} cases cannot be scored; all others are, and kept."
        raise PluginError(f"{told}\n{few_lines(problems)}")
    if comparison.setup.num_parts > 1:
        left = kept.left_to_others()
        if left:
            print(f"{left} cases are left to other parts; the last one writes the report.")
            return None
    return Results(comparison, kept.records)


class _Kept:
    """Scores that are kept in files, by the names of model, dataset and case."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.out = comparison, comparison.setup.output
        self.records: dict[Names, Record] = {}
        self.hash_once = cache(hash_of_image)

    def find(self, cases: Sequence[tuple[Pair, Case]]) -> dict[Names, tuple[CaseTask, Path, str]]:
        """Read the records of cases; return those that are missing or of other files or rules."""
        missing = {}
        for pair, case in cases:
            task = CaseTask.of(self.comparison, pair, case)
            prediction = (
                self.hash_once(task.prediction)
                if isinstance(pair.model, Predictions)
                else read_record(pair.file(self.out / PREDICTIONS, case)).get("prediction")
            )
            rules = [SCORING_VERSION, pair.classes, pair.dataset.labels.ignore, task.resample]
            content = [*rules, prediction, self.hash_once(case.label)]
            content += [self.hash_once(task.confidence)] if task.confidence else []
            text = json.dumps(content, sort_keys=True, default=str)
            made_from = hashlib.sha256(text.encode()).hexdigest()
            file = pair.file(self.out / SCORES, case)
            self.records[task.names] = read_record(file)
            if self.records[task.names].get("made_from") != made_from:
                missing[task.names] = task, file, made_from
        return missing

    def left_to_others(self) -> int:
        """Return how many cases other parts have not predicted and scored; if none, all records are
        read."""
        cases = self.comparison.cases
        if left := [x for pair, x in cases if not pair.file(self.out / SCORES, x).is_file()]:
            return len(left)
        # Scores of predictions that a changed model makes anew do not count.
        predicted = sum(map(len, find_missing(self.comparison, cases).values()))
        return predicted or len(self.find(cases))


def _score(tasks: Sequence[CaseTask], processes: int) -> Iterator[tuple[CaseTask, CaseScores]]:
    if processes <= 1:
        yield from ((task, score_case(task)) for task in tasks)
        return
    for finished in run_ordered(iter(tasks), score_case, processes):
        yield finished.task, finished.value or CaseScores(problem=finished.failure)


def score_case(task: CaseTask) -> CaseScores:
    """Score all classes of a case; wrong input becomes the result's ``problem``."""
    try:
        reference, prediction, warnings = read_both(task)
    except PluginError as error:
        return CaseScores(problem=str(error))
    grid = Grid.of(reference)
    truth, predicted = (sitk.GetArrayViewFromImage(one) for one in (reference, prediction))
    values, lesions = {}, {}
    for scored, both in zip(task.classes, _masks(task, truth, predicted), strict=True):
        masks = list(both)
        if scored.sliced and len(grid.size) == 3:
            part = bounding_box(masks[0])[grid.axial]
            masks = [mask[(slice(None),) * grid.axial + (part,)] for mask in masks]
        if scored.lesions:
            lesions[scored.name] = match_lesions(masks[0], masks[1], grid.spacing[::-1])
        values[scored.name] = score(masks[0], masks[1], grid.spacing[::-1], scored.tolerance)
    calibration = None
    if task.confidence:
        try:
            confidence = read_confidence(task.confidence, task.prediction, reference)
            calibration = count(confidence, _masks(task, truth, predicted))
        except PluginError as error:
            warnings = (*warnings, str(error))
    return CaseScores(values, warnings, lesions, calibration)


def _masks(
    task: CaseTask, truth: np.ndarray, predicted: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield where reference and prediction show each class, but for voxels to be ignored."""
    ignore = task.reference_labels.ignore
    kept = True if ignore is None else truth != ignore
    for scored in task.classes:
        one, other = np.isin(truth, scored.in_reference), np.isin(predicted, scored.in_prediction)
        yield one & kept, other & kept


def read_both(task: CaseTask) -> tuple[Any, Any, tuple[str, ...]]:
    """Return the reference and the prediction on its voxels, as images, and what was done to it;
    raise PluginError where a file is wrong, or voxels differ and may not be resampled."""
    reference = read_label_map(task.reference, task.reference_labels.values)
    prediction = read_label_map(task.prediction, task.prediction_labels.values)
    turned = on_grid_of(prediction, reference)
    if turned is not None:
        return reference, turned, ()
    both = f"reference {Grid.of(reference)}; prediction {Grid.of(prediction)}"
    if not task.resample or reference.GetDimension() != prediction.GetDimension():
        raise PluginError(
            f"{task.reference} and {task.prediction} do not have the same voxels: {both}. Fix the"
            " files, or have the prediction resampled to the reference's grid with --resample."
        )
    warning = f"The prediction was resampled to the reference's grid: {both}."
    return reference, resampled(prediction, reference), (warning,)
