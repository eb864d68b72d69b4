"""Cross-validation folds in which every one of several datasets has its share."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.model_selection import KFold, StratifiedKFold

from stunet_plugin.nnunet.names import FOLDS, PREPROCESSED, SPLITS


def balanced_folds(
    cases: Mapping[str, Sequence[str]],
    train_only: Collection[str],
    seed: int,
    own: Mapping[str, Sequence[Collection[str]]],
) -> list[dict[str, list[str]]]:
    """Return nnU-Net's ``splits_final.json``, which its planners copy from the raw dataset: folds
    of as equal a size as can be, for each dataset and altogether; none where there are fewer cases
    to validate on than folds.

    Args:
        cases: dataset to its cases.
        train_only: datasets whose cases are validated on in no fold.
        seed: of the shuffling.
        own: dataset to the cases that each fold validates on by its own splits; kept.
    """
    kept = [folds for dataset, folds in own.items() if dataset not in train_only]
    validation = [[x for folds in kept for x in folds[fold]] for fold in range(FOLDS)]
    dealt = {x: names for x, names in cases.items() if x not in train_only and x not in own}
    origins = [dataset for dataset, names in dealt.items() for _ in names]
    names = [name for names in dealt.values() for name in names]
    if len(names) + sum(map(len, validation)) < FOLDS:
        return []
    if len(names) < FOLDS:
        for name in names:
            min(validation, key=len).append(name)
    else:
        # Without a dataset of as many cases as folds there are no shares to keep.
        kind = StratifiedKFold if max(map(len, dealt.values())) >= FOLDS else KFold
        splitter = kind(FOLDS, shuffle=True, random_state=seed)
        with warnings.catch_warnings():  # of datasets with fewer cases than folds
            warnings.simplefilter("ignore", UserWarning)
            dealt_out = list(splitter.split(names, origins))
        for val, (_, indices) in zip(validation, dealt_out, strict=True):
            val += [names[index] for index in indices]
    everything = {name for names in cases.values() for name in names}
    return [{"train": sorted(everything - set(val)), "val": sorted(val)} for val in validation]


def own_folds(folder: Path, cases: Collection[str]) -> tuple[list[list[str]] | None, str]:
    """Return the cases that each fold of a dataset's own ``splits_final.json`` validates on (that
    in nnUNet_preprocessed, which training reads, comes first), and what to say of it: None and ""
    where there is none, None and why where it cannot be kept."""
    root = os.environ.get(PREPROCESSED)
    places = [Path(root, folder.name, SPLITS)] if root else []
    file = next((x for x in (*places, folder / SPLITS) if x.is_file()), None)
    if file is None:
        return None, ""
    try:
        splits: Any = json.loads(file.read_text(encoding="utf-8"))
        folds = [list(map(str, split["val"])) for split in splits]
    except (OSError, ValueError, TypeError, KeyError):
        return None, f"{file} is not as nnU-Net has it"
    names = [name for fold in folds for name in fold]
    if len(folds) != FOLDS:
        return None, f"{file} has {len(folds)} folds, not {FOLDS}"
    if len(set(names)) != len(names) or not set(names) <= set(cases) or not all(folds):
        return None, f"the folds of {file} share cases, or name some that are not there"
    return folds, f"its own folds are kept ({file})"
