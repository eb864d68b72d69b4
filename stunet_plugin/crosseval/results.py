"""Scores of all pairs, and what follows from them: means with intervals, tests between models, the
worst cases."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.crosseval.comparison import Pair
from stunet_plugin.crosseval.measures import DSC, HD95, LARGER_IS_BETTER, MEASURES, NSD
from stunet_plugin.crosseval.statistics import Estimate, estimate, holm, mean_by_case, wilcoxon
from stunet_plugin.utils.files import write_atomically

TESTED = (DSC, NSD)
COLUMNS = ("model", "dataset", "case", "class", "measure", "value")
WORST = 12


@dataclass
class PairScores:
    """The scores of a model on a dataset.

    Attributes:
        values: by measure, arrays with axes (case, class); NaN where not defined.
        warnings: by case, what was done to it.
    """

    pair: Pair
    values: dict[str, np.ndarray] = field(init=False)
    warnings: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.cases), len(self.classes))
        self.values = {measure: np.full(shape, np.nan) for measure in MEASURES}

    @property
    def cases(self) -> list[str]:
        return [case.name for case in self.pair.dataset.cases]

    @property
    def classes(self) -> list[str]:
        return [scored.name for scored in self.pair.classes]

    def add(
        self, case: str, scores: dict[str, dict[str, float | None]], warnings: Sequence[str]
    ) -> None:
        """Enter the measures of a case by class, and what was done to it."""
        row = self.cases.index(case)
        if warnings:
            self.warnings[case] = tuple(warnings)
        for column, name in enumerate(self.classes):
            for measure in MEASURES:
                value = scores[name][measure]
                self.values[measure][row, column] = math.nan if value is None else value


@dataclass(frozen=True)
class PairedTest:
    """Two models on a dataset.

    Attributes:
        difference: mean over cases of the first one's score less the second one's.
        p, corrected: of the paired Wilcoxon test, as it is and corrected for all tests of the
            measure.
    """

    measure: str
    dataset: str
    first: str
    second: str
    cases: int
    difference: float
    p: float
    corrected: float


@dataclass(frozen=True)
class Results:
    """Everything that the tables, pictures and the report show."""

    scores: tuple[PairScores, ...]
    tests: tuple[PairedTest, ...]

    @classmethod
    def of(cls, scores: Sequence[PairScores]) -> Results:
        return cls(tuple(scores), tuple(_tests(scores)))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(one.pair.model.name for one in self.scores))

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(one.pair.dataset.name for one in self.scores))

    def find(self, model: str, dataset: str) -> PairScores:
        return next(
            one
            for one in self.scores
            if (one.pair.model.name, one.pair.dataset.name) == (model, dataset)
        )

    def cell(self, model: str, dataset: str, measure: str) -> Estimate:
        return estimate(self.find(model, dataset).values[measure])

    def matrix(self, measure: str) -> np.ndarray:
        """Return the means with axes (model, dataset)."""
        return np.array(
            [
                [self.cell(model, dataset, measure).mean for dataset in self.datasets]
                for model in self.models
            ]
        )

    def undefined(self, measure: str) -> np.ndarray:
        """Return how many values of cases and classes are not defined, with axes (model,
        dataset)."""
        counts = [
            [np.isnan(self.find(model, dataset).values[measure]).sum() for dataset in self.datasets]
            for model in self.models
        ]
        return np.array(counts)

    def worst(self, number: int = WORST) -> list[tuple[PairScores, int]]:
        """Return the pairs and rows of the cases with the lowest mean DSC, the lowest first.

        Each model has an equal share of the places, so that a bad one does not hide where the
        others fail; what a model has no cases for goes to the next ones.
        """
        found = [
            (float(value), one, row)
            for one in self.scores
            if one.classes
            for row, value in enumerate(mean_by_case(one.values[DSC]))
            if np.isfinite(value)
        ]
        found.sort(key=lambda entry: entry[0])
        share = -(-number // max(len({one.pair.model.name for _, one, _ in found}), 1))
        taken: Counter[str] = Counter()
        first: list[tuple[float, PairScores, int]] = []
        later: list[tuple[float, PairScores, int]] = []
        for entry in found:
            name = entry[1].pair.model.name
            (first if taken[name] < share else later).append(entry)
            taken[name] += 1
        chosen = sorted([*first, *later][:number], key=lambda entry: entry[0])
        return [(one, row) for _, one, row in chosen]


def _tests(scores: Sequence[PairScores]) -> Iterator[PairedTest]:
    """Compare the models two by two on each dataset, on the classes that both were scored on."""
    for measure in TESTED:
        found: list[tuple[PairScores, PairScores, int, float, float]] = []
        for first, second in combinations(scores, 2):
            common = [name for name in first.classes if name in second.classes]
            if first.pair.dataset is not second.pair.dataset or not common:
                continue
            one, other = (
                mean_by_case(each.values[measure][:, [each.classes.index(name) for name in common]])
                for each in (first, second)
            )
            both = np.isfinite(one) & np.isfinite(other)
            difference = float((one - other)[both].mean()) if both.any() else math.nan
            found.append((first, second, int(both.sum()), difference, wilcoxon(one, other)))
        corrected = holm([entry[-1] for entry in found])
        for (first, second, cases, difference, p), after in zip(found, corrected, strict=True):
            names = (first.pair.dataset.name, first.pair.model.name, second.pair.model.name)
            yield PairedTest(measure, *names, cases, difference, p, after)


# --- files


def write_csv(results: Results, path: Path) -> None:
    """Write one row per model, dataset, case, class and measure; no value where it is not
    defined."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_rows(results))
    os.replace(partial, path)


def _rows(results: Results) -> Iterator[tuple[str, ...]]:
    for one in results.scores:
        for row, case in enumerate(one.cases):
            for column, name in enumerate(one.classes):
                for measure in MEASURES:
                    value = one.values[measure][row, column]
                    shown = f"{value:.6g}" if np.isfinite(value) else ""
                    yield one.pair.model.name, one.pair.dataset.name, case, name, measure, shown


def write_summary(results: Results, about: dict[str, Any], path: Path) -> None:
    """Write the means, intervals, tests and what was left out as JSON."""
    pairs = [
        {
            "model": one.pair.model.name,
            "dataset": one.pair.dataset.name,
            "cases": len(one.cases),
            "classes": one.classes,
            "mean": {
                measure: asdict(estimate(one.values[measure])) for measure in LARGER_IS_BETTER
            },
            "by_class": {
                name: {measure: _mean(one.values[measure][:, column]) for measure in MEASURES}
                for column, name in enumerate(one.classes)
            },
            "undefined_distances": {
                name: int(np.isnan(one.values[HD95][:, column]).sum())
                for column, name in enumerate(one.classes)
            },
            "only_in_dataset": list(one.pair.only_in_dataset),
            "only_in_model": list(one.pair.only_in_model),
            "warnings": {case: list(warnings) for case, warnings in one.warnings.items()},
        }
        for one in results.scores
    ]
    content = {**about, "pairs": pairs, "tests": [asdict(test) for test in results.tests]}
    write_atomically(path, json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n")


def write_matrix(results: Results, path: Path) -> None:
    """Write the models x datasets matrix of each measure as Markdown."""
    blocks = []
    for measure, larger in LARGER_IS_BETTER.items():
        lines = [
            f"## {measure} ({'larger' if larger else 'smaller'} is better)",
            "",
            _row(["model", *results.datasets]),
        ]
        lines.append(_row(["---", *("---:" for _ in results.datasets)]))
        for model in results.models:
            lines.append(
                _row(
                    [
                        model,
                        *(
                            shown(results.cell(model, dataset, measure))
                            for dataset in results.datasets
                        ),
                    ]
                )
            )
        blocks.append("\n".join(lines))
    note = "Mean over classes of the mean over cases, with the 95 % bootstrap interval over cases."
    write_atomically(path, "\n\n".join(["# Models and datasets", note, *blocks]) + "\n")


def shown(cell: Estimate) -> str:
    """An estimate for people."""
    return (
        f"{cell.mean:.3f} ({cell.low:.3f} to {cell.high:.3f})" if np.isfinite(cell.mean) else "n/a"
    )


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(values: np.ndarray) -> float:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else math.nan


def without_nan(value: Any) -> Any:
    """Return tables and lists with None for numbers that are not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
