"""Results: one tidy table of scores, and what follows from it: means, intervals, tests, files.

A model's score on a dataset is the mean over classes of the mean over cases, as in A-Eval. What is
not defined (a distance to an empty mask) takes no part in a mean.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stunet_plugin.crosseval.comparison import Pair
from stunet_plugin.crosseval.measures import DSC, HD95, LARGER_IS_BETTER, MEASURES, NSD
from stunet_plugin.utils.files import write_atomically

TESTED = (DSC, NSD)
SIGNIFICANT = 0.05
COLUMNS = ("model", "dataset", "case", "class")
WORST = 12

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 20230811
MIN_CASES = 6
"""With fewer pairs no Wilcoxon test can reach p < 0.05: 2 / 2^5 is 0.0625."""


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "n/a"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class PairedTest:
    """Two models on a dataset.

    Attributes:
        difference: mean over cases of the first one's score less the second one's.
        p, corrected: of the paired Wilcoxon test, and corrected for all tests of the measure.
    """

    measure: str
    dataset: str
    first: str
    second: str
    cases: int
    difference: float
    p: float
    corrected: float

    @property
    def better(self) -> str | None:
        """The model that is better, None where the test does not say so."""
        if not self.corrected < SIGNIFICANT:
            return None
        return self.first if self.difference > 0 else self.second


class Results:
    """Scores of all pairs.

    Attributes:
        pairs: models and datasets, with their classes.
        warnings: by model, dataset and case, what was done to it.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = tuple(pairs)
        self.models = list(dict.fromkeys(pair.model.name for pair in pairs))
        self.datasets = list(dict.fromkeys(pair.dataset.name for pair in pairs))
        self.warnings: dict[tuple[str, str, str], list[str]] = {}
        self._values: dict[tuple[str, str, str], Mapping[str, Mapping[str, float | None]]] = {}

    def add(
        self,
        key: tuple[str, str, str],
        values: Mapping[str, Mapping[str, float | None]],
        warnings: Sequence[str] = (),
    ) -> None:
        """Enter the measures of a case (model, dataset, case) by class; before any table."""
        self._values[key] = values
        if warnings:
            self.warnings[key] = list(warnings)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per model, dataset, case and class; a column per measure, NaN where undefined."""
        rows = [
            (*key, scored.name, *(self._values[key][scored.name][name] for name in MEASURES))
            for pair in self.pairs
            for key in map(pair.key, pair.scored_cases)
            for scored in pair.classes
        ]
        table = pd.DataFrame(rows, columns=[*COLUMNS, *MEASURES])
        return table.astype(dict.fromkeys(MEASURES, float))

    def part(self, model: str, dataset: str) -> pd.DataFrame:
        """Return the rows of a model on a dataset."""
        table = self.table
        return table[(table["model"] == model) & (table["dataset"] == dataset)]

    def by_class(self, pair: Pair) -> pd.DataFrame:
        """Return the means over cases, a row per class, and how many distances are undefined."""
        grouped = self.part(pair.model.name, pair.dataset.name).groupby("class", sort=False)
        undefined = grouped[HD95].agg(lambda values: int(values.isna().sum()))
        return grouped[list(MEASURES)].mean().assign(undefined=undefined)

    def cell(self, model: str, dataset: str, measure: str) -> Estimate:
        values = self.part(model, dataset).pivot(index="case", columns="class", values=measure)
        return estimate(values.to_numpy())

    def matrix(self, measure: str) -> pd.DataFrame:
        """Return the means, models by datasets."""
        by_class = self.table.groupby(["model", "dataset", "class"], sort=False)[measure].mean()
        means = by_class.groupby(["model", "dataset"], sort=False).mean().unstack()
        return means.reindex(index=self.models, columns=self.datasets)

    def undefined(self, measure: str) -> pd.DataFrame:
        """Return how many values of cases and classes are undefined, models by datasets."""
        table = self.table
        counts = table[measure].isna().groupby([table["model"], table["dataset"]]).sum().unstack()
        return counts.reindex(index=self.models, columns=self.datasets).fillna(0).astype(int)

    def by_case(self) -> pd.DataFrame:
        """Return the means over classes of each model, dataset and case."""
        return self.table.groupby(list(COLUMNS[:3]), sort=False)[list(MEASURES)].mean()

    def worst(self, number: int = WORST) -> pd.DataFrame:
        """Return the cases with the lowest mean DSC, the lowest first.

        Each model has an equal share of the places, so that a bad one does not hide where the
        others fail; what a model has no cases for goes to the next ones.
        """
        found = self.by_case().dropna(subset=[DSC]).sort_values(DSC, kind="stable").reset_index()
        share = -(-number // max(found["model"].nunique(), 1))
        beyond = found.groupby("model").cumcount() >= share
        chosen = pd.concat([found[~beyond], found[beyond]])[:number]
        return chosen.sort_values(DSC, kind="stable")

    @cached_property
    def tests(self) -> list[PairedTest]:
        """The models two by two on each dataset, on the classes that both were scored on."""
        found: list[PairedTest] = []
        for measure in TESTED:
            rows = []
            for dataset, both in product(self.datasets, combinations(self.models, 2)):
                parts = [self.part(model, dataset) for model in both]
                if common := set(parts[0]["class"]) & set(parts[1]["class"]):
                    means = (
                        part[part["class"].isin(common)].groupby("case")[measure].mean()
                        for part in parts
                    )
                    scores = pd.concat(means, axis=1).dropna().to_numpy()
                    differences = scores[:, 0] - scores[:, 1]
                    difference = float(differences.mean()) if len(scores) else math.nan
                    p = wilcoxon(differences)
                    rows.append((measure, dataset, *both, len(scores), difference, p))
            corrected = holm([row[-1] for row in rows])
            found += [PairedTest(*row, p) for row, p in zip(rows, corrected, strict=True)]
        return found


# --- statistics


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


def wilcoxon(differences: np.ndarray) -> float:
    """Return the two-sided p of the paired Wilcoxon test on a difference per case; 1 if all are 0,
    NaN with fewer than :data:`MIN_CASES`."""
    from scipy import stats

    if len(differences) < MIN_CASES:
        return math.nan
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method; NaN stays and is not counted."""
    p = pd.Series(list(values), dtype=float)
    ordered = p.dropna().sort_values()
    factors = np.arange(len(ordered), 0, -1)
    corrected: list[float] = (ordered * factors).cummax().clip(upper=1).reindex(p.index).tolist()
    return corrected


# --- files


def write_csv(results: Results, path: Path) -> None:
    """Write one row per model, dataset, case, class and measure; no value where undefined."""
    long = results.table.set_index(list(COLUMNS)).rename_axis(columns="measure").stack()
    partial = path.with_name(f".{path.name}.partial")
    long.rename("value").reset_index().to_csv(partial, index=False, float_format="%.6g")
    os.replace(partial, path)


def write_summary(results: Results, about: dict[str, Any], path: Path) -> None:
    """Write the means, intervals, tests and what was left out as JSON."""
    pairs = []
    for pair in results.pairs:
        both = (pair.model.name, pair.dataset.name)
        by_class = results.by_class(pair)
        warnings = {key[2]: x for key, x in results.warnings.items() if key[:2] == both}
        pairs.append(
            {
                "model": pair.model.name,
                "dataset": pair.dataset.name,
                "cases": len(pair.dataset.cases),
                "classes": [scored.name for scored in pair.classes],
                "mean": {name: asdict(results.cell(*both, name)) for name in LARGER_IS_BETTER},
                "by_class": by_class[list(MEASURES)].to_dict("index"),
                "undefined_distances": by_class["undefined"].to_dict(),
                "only_in_dataset": list(pair.only_in_dataset),
                "only_in_model": list(pair.only_in_model),
                "warnings": warnings,
            }
        )
    content = {**about, "pairs": pairs, "tests": [asdict(test) for test in results.tests]}
    write_atomically(path, json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n")


def write_matrix(results: Results, path: Path) -> None:
    """Write the models x datasets matrix of each measure as Markdown."""
    note = "Mean over classes of the mean over cases, with the 95 % bootstrap interval over cases."
    blocks = ["# Models and datasets", note]
    for measure, larger in LARGER_IS_BETTER.items():
        rows = [["model", *results.datasets], ["---", *("---:" for _ in results.datasets)]]
        for model in results.models:
            cells = [str(results.cell(model, name, measure)) for name in results.datasets]
            rows.append([model, *cells])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        better = "larger" if larger else "smaller"
        blocks.append(f"## {measure} ({better} is better)\n\n{table}")
    write_atomically(path, "\n\n".join(blocks) + "\n")


def without_nan(value: Any) -> Any:
    """Return tables and lists with None for numbers that are not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
