"""Preprocessed cases of a pretraining: checks, and what a user should know of them."""

from __future__ import annotations

import json
from pathlib import Path

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import FOLDS, SPLITS


def check_cases(folder: Path, fold: int | str, train_on_all: str) -> None:
    """Raise if a preprocessed case lacks a file (nnU-Net opens labels too), or if nnU-Net cannot
    make or fill a fold; ``train_on_all`` is the command that needs none."""
    cases, found = _cases_in(folder), {path.name for path in folder.iterdir()}
    endings = (".pkl", "_seg.b2nd") if any(name.endswith(".b2nd") for name in found) else (".pkl",)
    lacking = sorted({f"{case}{ending}" for case in cases for ending in endings} - found)
    if lacking:
        raise PluginError(
            f"{len(lacking)} file(s) of preprocessed cases are missing in {folder}, for example"
            f" {lacking[0]}. Run nnUNetv2_preprocess again."
        )
    splits = folder.parent / SPLITS
    if fold != "all" and not splits.is_file() and len(cases) < FOLDS:
        raise PluginError(
            f"{folder} has {len(cases)} case(s), too few for nnU-Net's {FOLDS} folds. Pretrain on"
            f" all of them: {train_on_all}"
        )
    absent = sorted(_in_split(splits, fold) - cases)
    if absent:
        raise PluginError(
            f"{splits} names {len(absent)} case(s) for fold {fold} that are not preprocessed in"
            f" {folder}, for example {absent[0]}. Preprocess them, or move that file away."
        )


def describe_cases(folder: Path, fold: int | str, expected: object) -> list[str]:
    """Return lines for the log about cases that a training does not use; ``expected`` is their
    number in ``dataset.json``."""
    cases, splits = _cases_in(folder), folder.parent / SPLITS
    lines = []
    if isinstance(expected, int) and len(cases) < expected:
        lines.append(
            f"Only {len(cases)} of the {expected} cases of dataset.json are preprocessed. Were"
            " scans moved? Then run `stunet unlabeled` and nnUNetv2_plan_and_preprocess again."
        )
    named = _in_split(splits, fold)
    if named and cases - named:
        lines.append(
            f"{len(cases - named)} preprocessed case(s) are not used: {splits} does not name them."
            " Move it away to have all cases split again."
        )
    return lines


def _cases_in(folder: Path) -> set[str]:
    return set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))


def _in_split(splits: Path, fold: int | str) -> set[str]:
    """Return the cases of a fold; none if nnU-Net draws it, or takes all cases."""
    if fold == "all" or not splits.is_file():
        return set()
    try:
        folds = json.loads(splits.read_text(encoding="utf-8"))
        if int(fold) >= len(folds):
            return set()
        return {case for part in ("train", "val") for case in folds[int(fold)][part]}
    except (ValueError, KeyError, TypeError) as error:
        raise PluginError(f"{splits} is damaged ({error}). Move it away.") from error
