"""Means, their uncertainty, and whether two models differ.

A model's score on a dataset is the mean over classes of the mean over cases, as in A-Eval. What is
not defined (a distance to an empty mask) takes no part in a mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


def estimate(values: np.ndarray, seed: int = SEED, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean over classes of the mean over cases, with a percentile bootstrap interval
    over cases.

    Args:
        values: with axes (case, class), NaN where not defined.
        seed: of the resampling.
        resamples: how many.
    """
    defined = np.isfinite(values)
    if not defined.any():
        return Estimate(np.nan, np.nan, np.nan)
    number = len(values)
    # How often each case is drawn, so that a resample's class means are two products of matrices.
    drawn = (
        np.random.default_rng(seed)
        .multinomial(number, np.full(number, 1 / number), size=resamples)
        .astype(float)
    )
    resampled = _means(drawn, values, defined)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(resampled, (tail, 100 - tail))
    return Estimate(
        float(_means(np.ones((1, number)), values, defined)[0]), float(low), float(high)
    )


def _means(weights: np.ndarray, values: np.ndarray, defined: np.ndarray) -> np.ndarray:
    """Return for every row of case weights the mean over classes of the weighted mean over
    cases."""
    with np.errstate(invalid="ignore"):
        by_class = (weights @ np.where(defined, values, 0.0)) / (weights @ defined)
    with warnings.catch_warnings():
        # A resample may hold no case with any class defined.
        warnings.simplefilter("ignore", RuntimeWarning)
        means: np.ndarray = np.nanmean(by_class, axis=1)
    return means


def mean_by_case(values: np.ndarray) -> np.ndarray:
    """Return the mean over classes for each case, NaN where none is defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        means: np.ndarray = np.nanmean(values, axis=1)
    return means


def wilcoxon(one: np.ndarray, other: np.ndarray) -> float:
    """Return the two-sided p of the paired Wilcoxon test; 1 if no pair differs, NaN with fewer than
    :data:`MIN_CASES` pairs.

    Args:
        one, other: a value per case, in the same order; pairs with NaN take no part.
    """
    from scipy import stats

    both = np.isfinite(one) & np.isfinite(other)
    differences = one[both] - other[both]
    if len(differences) < MIN_CASES:
        return float("nan")
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method; NaN stays and is not counted."""
    corrected = [float("nan")] * len(values)
    order = sorted(
        (index for index, value in enumerate(values) if np.isfinite(value)),
        key=lambda index: values[index],
    )
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * values[index]))
        corrected[index] = highest
    return corrected
