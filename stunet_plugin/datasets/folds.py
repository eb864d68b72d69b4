"""Cross-validation folds in which every one of several datasets has its share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stunet_plugin.nnunet.names import FOLDS


def balanced_folds(
    cases: Mapping[str, Sequence[str]], train_only: Sequence[str], seed: int
) -> list[dict[str, list[str]]]:
    """Return nnU-Net's ``splits_final.json``: folds of as equal a size as can be, for each dataset
    and altogether.

    Args:
        cases: dataset to its cases, in their order.
        train_only: datasets whose cases are trained on in every fold and validated on in none.
        seed: of the shuffling.

    Returns:
        One entry per fold; none where there are fewer cases to validate on than folds.
    """
    dealt: list[list[str]] = [[] for _ in range(FOLDS)]
    turn = 0
    for number, (dataset, names) in enumerate(cases.items()):
        if dataset in train_only:
            continue
        for index in np.random.default_rng([seed, number]).permutation(len(names)):
            dealt[turn % FOLDS].append(names[index])
            turn += 1
    if turn < FOLDS:
        return []
    everything = [name for names in cases.values() for name in names]
    return [
        {"train": sorted(set(everything) - set(validation)), "val": sorted(validation)}
        for validation in dealt
    ]
