"""Checks of what a user asked ``stunet rank`` for, as far as they go without torch, so that a slip
is told at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stunet_plugin.datasets.raw_dataset import RawDataset, find_raw, read_raw
from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.nnunet.names import PREPROCESSED
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights.named import RANDOM, Named, check_named

if TYPE_CHECKING:
    from stunet_plugin.commands.rank import Rank

FEWEST_CASES = 2
"""Pairs of cases are compared."""


@dataclass(frozen=True)
class Inputs:
    """What the options name: weights, the labelled dataset and its folder in nnUNet_preprocessed
    (if it has one), the cases to look at in their order, and the plans given with -p."""

    candidates: tuple[Named, ...]
    raw: RawDataset
    preprocessed: Path | None
    cases: tuple[str, ...]
    plans: dict[str, Any] | None


def find_inputs(options: Rank) -> Inputs:
    """Check the options and find what they name; raise PluginError for the first slip."""
    if not 0 < options.step_size <= 1:
        raise PluginError(f"--step-size must be above 0 and at most 1, not {options.step_size:g}.")
    for name, least in (("seed", 0), ("levels", 1), ("cases", FEWEST_CASES)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise PluginError(f"--{name} must be at least {least}, not {value}.")
    for name, file in (("--json", options.json), ("--figure", options.figure)):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise PluginError(f"{name} {file}: there is no folder {Path(file).parent}.")
    candidates = tuple(map(Named.read, options.weights))
    _check_candidates(candidates, options)
    raw = read_raw(find_raw(options.dataset))
    root = os.environ.get(PREPROCESSED)
    preprocessed = Path(root, raw.name) if root and Path(root, raw.name).is_dir() else None
    plans = _read_plans(raw, preprocessed, options)
    return Inputs(candidates, raw, preprocessed, _choose_cases(raw, options), plans)


def _check_candidates(candidates: tuple[Named, ...], options: Rank) -> None:
    for one in candidates:
        if one.trainer and options.plans is None:
            raise PluginError(f"{RANDOM}:{one.trainer} has no plan of its own. Give one: -p PLANS")
    check_named(candidates)
    if len(candidates) < 2 or not any(one.path or one.trainer for one in candidates):
        raise PluginError(
            f"A ranking needs at least two candidates. Name other weights, or add '{RANDOM}' to"
            f" some, or '{RANDOM}:TRAINER' with -p PLANS."
        )


def _choose_cases(raw: RawDataset, options: Rank) -> tuple[str, ...]:
    """Return the cases that are named, or drawn with the seed."""
    known = [case.name for case in raw.cases]
    names = options.names
    if names is None:
        names = np.random.default_rng(options.seed).permutation(known)[: options.cases].tolist()
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise PluginError(f"--names: {raw.name} has no case {name}.{hint}")
    chosen = tuple(sorted(set(names)))
    if len(chosen) < FEWEST_CASES:
        raise PluginError(f"{len(chosen)} labelled case(s) make no pair. Take two, better ten.")
    return chosen


def _read_plans(raw: RawDataset, folder: Path | None, options: Rank) -> dict[str, Any] | None:
    if options.plans is None:
        return None
    file = folder / f"{options.plans}.json" if folder else None
    if file is None or not file.is_file():
        others = sorted(path.stem for path in folder.glob("*lans*.json")) if folder else []
        there = f" It has: {', '.join(others)}." if others else ""
        raise PluginError(
            f"-p {options.plans}: {raw.name} has no such plans in {PREPROCESSED}.{there} Plan it"
            " (`stunet plan`), or leave -p out: each model then takes its own."
        )
    plans = read_json(file)
    check_configuration(plans, options.configuration, f"-p {options.plans}")
    return plans


def check_configuration(plans: Mapping[str, Any], configuration: str, where: str) -> None:
    """Raise a PluginError unless plans have a configuration."""
    available = plans.get("configurations", {})
    if configuration not in available:
        hint = did_you_mean(configuration, available)
        raise PluginError(
            f"{where} has no configuration {configuration!r}. Available: {', '.join(available)}."
            f" Set it: -c{hint}"
        )
