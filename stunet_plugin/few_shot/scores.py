"""Scores of a training's predictions of the test cases, by the measures of ``stunet crosseval``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk

from stunet_plugin.datasets.raw_dataset import RawDataset
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import read_json, without_nan, write_atomically
from stunet_plugin.utils.geometry import Grid, on_grid_of
from stunet_plugin.utils.images import read_label_map
from stunet_plugin.utils.label_systems import LabelSystem
from stunet_plugin.utils.measures import (
    ASSD,
    DEFAULT_TOLERANCE,
    DSC,
    HD95,
    NSD,
    TOLERANCES,
    score,
    tolerance_of,
)

SHOWN = (DSC, NSD, HD95, ASSD)
KEYS = ["candidate", "shots", "draw", "case", "class"]


def score_cases(raw: RawDataset, predictions: Path, cases: Sequence[str]) -> dict[str, Any]:
    """Return the measures of each case and class."""
    labels = LabelSystem.from_table(raw.description, raw.name)
    references = {case.name: case.label for case in raw.cases}
    found = {}
    for case in cases:
        reference = read_label_map(references[case], labels.values)
        file = predictions / f"{case}{raw.file_ending}"
        predicted = on_grid_of(read_label_map(file, labels.values), reference)
        if predicted is None:
            raise PluginError(f"{file} does not have the voxels of {references[case]}.")
        truth, guess = map(sitk.GetArrayViewFromImage, (reference, predicted))
        counted = truth != labels.ignore if labels.ignore is not None else np.ones_like(truth, bool)
        spacing = Grid.of(reference).spacing[::-1]
        found[case] = {
            name: _measures(
                np.isin(truth, values) & counted,
                np.isin(guess, values) & counted,
                spacing,
                tolerance_of(name, TOLERANCES, DEFAULT_TOLERANCE),
            )
            for name, values in labels.classes.items()
        }
    return found


def _measures(*masks_and_rules: Any) -> dict[str, float]:
    found = score(*masks_and_rules)
    return {name: found[name] for name in SHOWN}


def write_scores(file: Path, cases: Mapping[str, Any], **facts: Any) -> None:
    """Write what a finished training reached; that this file is there means that it is done."""
    content = {**facts, "cases": without_nan(dict(cases))}
    write_atomically(file, json.dumps(content, indent=1) + "\n")


def mean_dice(file: Path) -> float:
    """Return the mean over cases and classes."""
    return float(
        np.mean([x[DSC] for case in read_json(file)["cases"].values() for x in case.values()])
    )


def collect(files: Mapping[tuple[str, int, int], Path]) -> pd.DataFrame:
    """Return a row for each candidate, number of labelled cases, draw, case and class of the
    trainings that are done."""
    rows = [
        dict(zip(KEYS, (*key, case, name), strict=True)) | measures
        for key, file in files.items()
        if file.is_file()
        for case, classes in read_json(file)["cases"].items()
        for name, measures in classes.items()
    ]
    table = pd.DataFrame(rows, columns=[*KEYS, *SHOWN])
    return table.astype(dict.fromkeys(SHOWN, float))
