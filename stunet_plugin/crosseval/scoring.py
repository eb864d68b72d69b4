"""Scoring of predictions against references, in worker processes, one case in memory for each.

The scores of a case are kept in a file with a hash of all that they depend on, so that a run that
is started again scores only what has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.crosseval.comparison import Pair, ScoredClass
from stunet_plugin.crosseval.inputs import Setup, folder_name
from stunet_plugin.crosseval.measures import bounding_box, score
from stunet_plugin.crosseval.predictions import prediction_file, read_record, record_file
from stunet_plugin.crosseval.results import Results, without_nan
from stunet_plugin.datasets.label_systems import LabelSystem
from stunet_plugin.errors import PluginError, few_lines
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.utils.geometry import Grid, on_grid_of, resampled
from stunet_plugin.utils.image_files import hash_of_image
from stunet_plugin.utils.images import read_label_map
from stunet_plugin.utils.workers import run_ordered

SCORES = "scores"
SCORING_VERSION = 1
"""Goes up when the same files would be scored otherwise, so that kept scores no longer count."""


@dataclass(frozen=True)
class CaseTask:
    """A prediction and its reference.

    Attributes:
        key: model, dataset and case.
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
    """Result of a task: measures by class, what was done to the case, why there are no values."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    problem: str = ""


def score_pairs(pairs: Sequence[Pair], setup: Setup, processes: int) -> Results:
    """Score what has not been scored.

    Raises:
        PluginError: cases that cannot be scored; all others are, and kept.
    """
    results = Results(pairs)
    tasks: list[CaseTask] = []
    records: dict[tuple[str, str, str], tuple[Path, str]] = {}
    references = {case.reference for data in setup.datasets for case in data.cases}
    hashes = {file: hash_of_image(file) for file in references}
    for pair in pairs:
        rules = [SCORING_VERSION, pair.classes, pair.dataset.labels.ignore, setup.resample]
        folder = setup.out.joinpath(
            SCORES, folder_name(pair.model.name), folder_name(pair.dataset.name)
        )
        for case in pair.scored_cases:
            prediction = read_record(record_file(setup.out, pair, case)).get("prediction")
            content = [*rules, prediction, hashes[case.reference]]
            text = json.dumps(content, sort_keys=True, default=str)
            made_from = hashlib.sha256(text.encode()).hexdigest()
            file = folder / f"{case.name}.json"
            kept = read_record(file)
            if kept.get("made_from") == made_from:
                results.add(pair.key(case), kept["values"], kept["warnings"])
            else:
                files = (case.reference, prediction_file(setup.out, pair, case))
                labels = (pair.dataset.labels, pair.model.labels)
                key = pair.key(case)
                tasks.append(CaseTask(key, *files, pair.classes, *labels, setup.resample))
                records[key] = file, made_from
    total = sum(len(pair.scored_cases) for pair in pairs)
    print(f"Scores: {total - len(tasks)} of {total} are there.", flush=True)
    problems = []
    for task, found in _score_all(tasks, min(processes, len(tasks))):
        where = "{} on {}, {}".format(*task.key)
        if found.problem:
            problems.append(f"{where}: {found.problem}")
            continue
        for warning in found.warnings:
            print(f"  {where}: {warning}", flush=True)
        values, warnings = without_nan(found.values), list(found.warnings)
        results.add(task.key, values, warnings)
        file, made_from = records[task.key]
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {"made_from": made_from, "values": values, "warnings": warnings}
        write_atomically(file, json.dumps(record))
    if problems:
        raise PluginError(
            f"{len(problems)} cases cannot be scored; all others are, and kept.\n"
            f"{few_lines(problems)}"
        )
    return results


def score_case(task: CaseTask) -> CaseScores:
    """Score all classes of a case; wrong input becomes the result's ``problem``."""
    try:
        reference, prediction, warnings = _read_both(task)
    except PluginError as error:
        return CaseScores(problem=str(error))
    grid = Grid.of(reference)
    truth, predicted = (sitk.GetArrayViewFromImage(one) for one in (reference, prediction))
    ignore = task.reference_labels.ignore
    values: dict[str, dict[str, float]] = {}
    for scored in task.classes:
        masks = [np.isin(truth, scored.in_reference), np.isin(predicted, scored.in_prediction)]
        if ignore is not None:
            masks = [mask & (truth != ignore) for mask in masks]
        if scored.sliced and len(grid.size) == 3:
            part = bounding_box(masks[0])[grid.axial]
            masks = [mask[(slice(None),) * grid.axial + (part,)] for mask in masks]
        values[scored.name] = score(masks[0], masks[1], grid.spacing[::-1], scored.tolerance)
    return CaseScores(values, tuple(warnings))


def _score_all(tasks: Sequence[CaseTask], processes: int) -> Iterator[tuple[CaseTask, CaseScores]]:
    if processes <= 1:
        yield from ((task, score_case(task)) for task in tasks)
        return
    for finished in run_ordered(iter(tasks), score_case, processes):
        yield finished.task, finished.value or CaseScores(problem=finished.failure)


def _read_both(task: CaseTask) -> tuple[Any, Any, list[str]]:
    reference = read_label_map(task.reference, task.reference_labels.values)
    prediction = read_label_map(task.prediction, task.prediction_labels.values)
    turned = on_grid_of(prediction, reference)
    if turned is not None:
        return reference, turned, []
    both = f"reference {Grid.of(reference)}; prediction {Grid.of(prediction)}"
    if not task.resample or reference.GetDimension() != prediction.GetDimension():
        raise PluginError(
            f"{task.reference} and {task.prediction} do not have the same voxels: {both}. Fix the"
            " files, or have the prediction resampled to the reference's grid with --resample."
        )
    warning = f"The prediction was resampled to the reference's grid: {both}."
    return reference, resampled(prediction, reference), [warning]
