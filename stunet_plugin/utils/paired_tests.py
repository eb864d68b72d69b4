"""Paired tests of two methods on the same cases, and Holm's correction for several tests."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

SIGNIFICANT = 0.05
MIN_CASES = 6
"""With fewer pairs no Wilcoxon test can reach p < 0.05: 2 / 2^5 is 0.0625."""


def wilcoxon(differences: np.ndarray) -> float:
    """Return the two-sided p of the paired Wilcoxon test on a difference per case; 1 if all are 0,
    NaN with fewer than :data:`MIN_CASES`."""
    from scipy import stats

    if len(differences) < MIN_CASES:
        return math.nan
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(p: pd.Series) -> pd.Series:
    """Return p values corrected for their number by Holm's method; NaN stays and is not counted."""
    ordered = p.dropna().sort_values()
    factors = np.arange(len(ordered), 0, -1)
    return (ordered * factors).cummax().clip(upper=1).reindex(p.index)
