"""Preprocessed cases of a pretraining: checks, and what a user should know of them."""

from __future__ import annotations

import json
from pathlib import Path

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import FOLDS

SPLITS = "splits_final.json"
"""nnU-Net's record of its folds, beside the plans."""


def cases_in(folder: Path) -> list[str]:
    """Return the names of the cases in a folder of preprocessed data, in any of its formats."""
    cases: list[str] = infer_dataset_class(str(folder)).get_identifiers(str(folder))
    return cases


def check_cases_complete(folder: Path) -> None:
    """Raise if a preprocessed case lacks a file, at which a background worker would fail.

    Volume Fusion does not read labels, but nnU-Net opens them with every case.
    """
    found = {path.name for path in folder.iterdir()}
    endings = (".pkl", "_seg.b2nd") if any(name.endswith(".b2nd") for name in found) else (".pkl",)
    lacking = sorted({f"{case}{ending}" for case in cases_in(folder) for ending in endings} - found)
    if lacking:
        raise PluginError(
            f"{len(lacking)} file(s) of preprocessed cases are missing in {folder}, for example"
            f" {lacking[0]}. Was preprocessing interrupted, or were files removed? Run"
            " nnUNetv2_preprocess again."
        )


def check_fold(folder: Path, fold: int | str, train_on_all: str) -> None:
    """Raise if nnU-Net cannot make or fill a fold.

    Args:
        folder: of the preprocessed cases; the splits are beside it.
        fold: its number, or ``all``, which is always possible.
        train_on_all: the command that trains on all cases.

    Raises:
        PluginError: fewer cases than folds, or splits that name cases which are not there.
    """
    if fold == "all":
        return
    cases, splits = cases_in(folder), folder.parent / SPLITS
    if not splits.is_file():
        if len(cases) < FOLDS:
            raise PluginError(
                f"{folder} has {len(cases)} case(s), too few for nnU-Net's {FOLDS} folds. Pretrain"
                f" on all of them: {train_on_all}"
            )
        return
    absent = sorted(_in_split(splits, fold) - set(cases))
    if absent:
        raise PluginError(
            f"{splits} names {len(absent)} case(s) for fold {fold} that are not preprocessed in"
            f" {folder}, for example {absent[0]}. Preprocess them, or move that file away: nnU-Net"
            " then splits the cases that are there."
        )


def describe_cases(folder: Path, fold: int | str, expected: object) -> list[str]:
    """Return lines for the log about cases that a training does not use.

    Args:
        folder: of the preprocessed cases.
        fold: its number, or ``all``.
        expected: cases according to ``dataset.json``; ignored unless it is an integer.
    """
    cases, splits = cases_in(folder), folder.parent / SPLITS
    lines = []
    if isinstance(expected, int) and len(cases) < expected:
        lines.append(
            f"Only {len(cases)} of the {expected} cases of dataset.json are preprocessed. Were"
            " scans moved that the dataset links to? Then run `stunet unlabeled` and"
            " nnUNetv2_plan_and_preprocess again."
        )
    named = _in_split(splits, fold) if fold != "all" and splits.is_file() else set()
    unused = len(set(cases) - named) if named else 0
    if unused:
        lines.append(
            f"{unused} preprocessed case(s) are not used: {splits} does not name them. Move it away"
            " to have all cases split again."
        )
    return lines


def _in_split(splits: Path, fold: int | str) -> set[str]:
    """Return the cases of a fold; none if the file has no such fold, for nnU-Net then draws one."""
    try:
        folds = json.loads(splits.read_text())
        if int(fold) >= len(folds):
            return set()
        return {case for part in ("train", "val") for case in folds[int(fold)][part]}
    except (ValueError, KeyError, TypeError) as error:
        raise PluginError(
            f"{splits} is damaged ({error}). Move it away: nnU-Net then splits the cases again."
        ) from error
