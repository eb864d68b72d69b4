"""Agreement of the scores of ``stunet rank`` with what fine-tuning reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import weightedtau

from stunet_plugin.few_shot.candidates import Candidate
from stunet_plugin.utils.files import read_json

FEWEST = 3
"""Candidates; two are in the right order by chance once in two."""


def rank_arguments(
    candidates: Sequence[Candidate], number: str, cases: Sequence[str], seed: int, file: Path
) -> list[str]:
    """Return the command that scores candidates with the same plans on labelled cases."""
    given = [f"{x.name}={x.file or f'random:{x.trainer}'}" for x in candidates]
    where = ["-d", number, "-p", candidates[0].plans, "--seed", str(seed), "--json", str(file)]
    return ["stunet", "rank", *given, *where, "--names", *cases]


def scores_of(files: Sequence[Path]) -> pd.DataFrame:
    """Return the mean over rankings of each score: a row per candidate, a column per score; NaN
    where a ranking has none."""
    rows = [
        {"candidate": entry["name"], **entry["scores"]}
        for file in files
        for entry in read_json(file)["candidates"]
    ]
    table = pd.DataFrame(rows).set_index("candidate").astype(float)
    return table.groupby(level=0, sort=False).agg(lambda values: values.mean(skipna=False))


def agreement(scores: pd.DataFrame, dice: Mapping[str, float]) -> dict[str, float]:
    """Return Kendall's tau of each score with the Dice, in which the best candidates weigh most;
    NaN with too few candidates."""
    found = {}
    for name in scores:
        both = scores[name].dropna()
        reached = [dice[candidate] for candidate in both.index]
        enough = len(both) >= FEWEST
        found[str(name)] = float(weightedtau(both, reached).statistic) if enough else np.nan
    return found
