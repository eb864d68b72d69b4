"""Statistics: one tidy table of scores, and what follows from it: means, intervals, tests.

A model's score on a dataset is the mean over classes of the mean over cases, as in A-Eval. What is
not defined (a distance to an empty mask) takes no part in a mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

from stunet_plugin.crosseval import lesions
from stunet_plugin.crosseval.calibration import Calibration
from stunet_plugin.crosseval.comparison import Comparison, Pair
from stunet_plugin.utils.measures import DSC, HD95, MEASURES, NSD
from stunet_plugin.utils.paired_tests import SIGNIFICANT, holm, wilcoxon

TESTED = (DSC, NSD)
COLUMNS = ["model", "dataset", "case", "class"]
TEST_COLUMNS = ["measure", "dataset", "first", "second", "cases", "difference", "p"]
WORST = 12

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 20230811


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = f" ({self.low:.3f} to {self.high:.3f})" if math.isfinite(self.mean) else ""
        return number(self.mean) + interval


class Results:
    """Scores of all pairs: the ``table`` has a row per model, dataset, case and class and a column
    per measure, NaN where undefined.

    Args:
        records: ``values`` (measures by class, None if undefined), ``warnings`` (what was done to
            it) and ``lesions`` (of classes of lesions) of each case, by the names of model, dataset
            and case.
    """

    def __init__(
        self, comparison: Comparison, records: Mapping[tuple[str, str, str], Mapping[str, Any]]
    ) -> None:
        self.comparison = comparison
        self.models = [model.name for model in comparison.setup.models]
        self.datasets = [dataset.name for dataset in comparison.setup.datasets]
        rows = [
            dict(zip(COLUMNS, (*names, scored), strict=True)) | measures
            for names, record in records.items()
            for scored, measures in record["values"].items()
        ]
        table = pd.DataFrame(rows, columns=[*COLUMNS, *MEASURES])
        self.table = table.astype(dict.fromkeys(MEASURES, float))
        self.lesions = {names: record.get("lesions", {}) for names, record in records.items()}
        by_pair = {
            pair.names: Calibration.of(
                [records[(*pair.names, x.name)].get("calibration") for x in pair.dataset.cases]
            )
            for pair in comparison.pairs
            if pair.classes
        }
        self.calibrations = {names: found for names, found in by_pair.items() if found}
        self.warnings = {names: x["warnings"] for names, x in records.items() if x["warnings"]}

    def part(self, model: str, dataset: str) -> pd.DataFrame:
        """Return the rows of a model on a dataset."""
        table = self.table
        return table[(table["model"] == model) & (table["dataset"] == dataset)]

    def by_class(self, pair: Pair) -> pd.DataFrame:
        """Return the means over cases, a row per class, and how many distances are undefined."""
        grouped = self.part(*pair.names).groupby("class", sort=False)
        undefined = grouped[HD95].agg(lambda values: int(values.isna().sum()))
        return grouped[list(MEASURES)].mean().assign(undefined=undefined)

    def lesions_of(self, pair: Pair) -> dict[str, dict[str, Any]]:
        """Return what was found of the lesions of each class that is one of lesions."""
        cases = [self.lesions[(*pair.names, case.name)] for case in pair.dataset.cases]
        names = [scored.name for scored in pair.classes if scored.lesions]
        return {name: lesions.summary(case[name] for case in cases) for name in names}

    @property
    def lesion_rows(self) -> list[dict[str, Any]]:
        """What was found of lesions, a row per model, dataset and class of lesions."""
        return [
            {"model": pair.model.name, "dataset": pair.dataset.name, "class": name, "found": found}
            for pair in self.comparison.pairs
            for name, found in self.lesions_of(pair).items()
        ]

    def by_case(self) -> pd.DataFrame:
        """Return the means over classes, a row per model, dataset and case."""
        by_case = self.table.groupby(COLUMNS[:3], sort=False)
        return by_case[list(MEASURES)].mean().reset_index()

    def cell(self, model: str, dataset: str, measure: str) -> Estimate:
        values = self.part(model, dataset).pivot(index="case", columns="class", values=measure)
        return estimate(values.to_numpy())

    def matrix(self, measure: str) -> pd.DataFrame:
        """Return the estimates, models by datasets."""
        cells = {x: [self.cell(model, x, measure) for model in self.models] for x in self.datasets}
        return pd.DataFrame(cells, index=self.models)

    def worst(self, number: int = WORST) -> pd.DataFrame:
        """Return the cases with the lowest mean DSC, the lowest first.

        Each model has an equal share of the places, so that a bad one does not hide where the
        others fail; what a model has no cases for goes to the next ones.
        """
        found = self.by_case().dropna(subset=[DSC]).sort_values(DSC, kind="stable")
        share = -(-number // max(found["model"].nunique(), 1))
        beyond = found.groupby("model").cumcount() >= share
        chosen = pd.concat([found[~beyond], found[beyond]])[:number]
        return chosen.sort_values(DSC, kind="stable")

    @cached_property
    def tests(self) -> pd.DataFrame:
        """The models two by two on each dataset, on the classes that both were scored on.

        One row per measure, dataset and two models: how many cases, the mean over cases of the
        first one's score less the second one's, p of the paired Wilcoxon test, p corrected for all
        tests of the measure, and the better model ("" where the test does not say so).
        """
        rows = []
        for measure, dataset, both in product(TESTED, self.datasets, combinations(self.models, 2)):
            parts = [self.part(model, dataset) for model in both]
            if common := set(parts[0]["class"]) & set(parts[1]["class"]):
                first, second = (
                    part[part["class"].isin(common)].groupby("case")[measure].mean()
                    for part in parts
                )
                differences = (first - second).dropna()
                p = wilcoxon(differences.to_numpy())
                rows.append((measure, dataset, *both, len(differences), differences.mean(), p))
        tests = pd.DataFrame(rows, columns=TEST_COLUMNS)
        tests["corrected"] = tests.groupby("measure")["p"].transform(holm)
        better = tests["first"].where(tests["difference"] > 0, tests["second"])
        tests["better"] = better.where(tests["corrected"] < SIGNIFICANT, "")
        return tests

    def best(self, measure: str, dataset: str) -> str | None:
        """Return the model that tests find better than every other one, None if there is none."""
        tests = self.tests
        of_both = tests[(tests["measure"] == measure) & (tests["dataset"] == dataset)]
        won = of_both["better"].value_counts()
        others = len(self.models) - 1
        return next((model for model in self.models if won.get(model, 0) == others > 0), None)


def estimate(values: np.ndarray) -> Estimate:
    """Return the mean over classes of the mean over cases, with a percentile bootstrap interval
    over cases.

    Args:
        values: with axes (case, class), NaN where undefined.
    """
    defined = np.isfinite(values)
    if not defined.any():
        return Estimate(math.nan, math.nan, math.nan)
    number = len(values)
    # How often each case is drawn, first each once for the mean itself; so class means are two
    # products of matrices.
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, number)), drawn])
    with np.errstate(invalid="ignore"):
        by_class = (weights @ np.where(defined, values, 0.0)) / (weights @ defined)
    # A resample may hold no case with any class defined.
    means = pd.DataFrame(by_class).mean(axis=1).to_numpy()
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(means[1:], (tail, 100 - tail))
    return Estimate(float(means[0]), float(low), float(high))


def number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "n/a"
