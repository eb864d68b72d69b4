"""Inputs of ``stunet few-shot``: weights, dataset, cases to test and to train on, checked without
torch as far as that goes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stunet_plugin.datasets.draws import Draw, draw_labelled, hold_out
from stunet_plugin.datasets.raw_dataset import RawDataset, find_raw, read_raw
from stunet_plugin.errors import PluginError, did_you_mean, few, setting
from stunet_plugin.nnunet.names import PREPROCESSED, RAW
from stunet_plugin.weights.named import RANDOM, Named, check_named

if TYPE_CHECKING:
    from stunet_plugin.commands.few_shot import FewShot

EPOCHS = 10
"""Of each training: the learning rate falls from epoch to epoch."""


@dataclass(frozen=True)
class Inputs:
    """What the options name; ``plans_file`` is that of ``-p``."""

    candidates: tuple[Named, ...]
    raw: RawDataset
    plans_file: Path | None


@dataclass(frozen=True)
class Cases:
    """Cases to test on, and the labelled ones of every draw."""

    test: list[str]
    draws: dict[Draw, list[str]]

    @property
    def labelled(self) -> set[str]:
        return {case for cases in self.draws.values() for case in cases}


def find_inputs(options: FewShot) -> Inputs:
    """Check the options and find what they name; raise PluginError for the first slip."""
    numbers = [("--shots", min(options.shots), 1), ("--draws", options.draws, 1)]
    numbers += [("--test", options.test, 1), ("--seed", options.seed, 0)]
    numbers += [("-np", options.processes, 1)]
    for name, value, least in numbers:
        if value < least:
            raise PluginError(f"{name} must be at least {least}, not {value}.")
    if options.iterations < EPOCHS or options.iterations % EPOCHS:
        raise PluginError(
            f"--iterations must be a multiple of {EPOCHS} (epochs), not {options.iterations}."
        )
    if options.rank and max(options.shots) < 2:
        raise PluginError("--rank compares pairs of labelled cases: it needs --shots 2 or more.")
    if Path(options.out).is_file():
        raise PluginError(f"-o {options.out} is a file. Name a folder.")
    candidates = tuple(map(Named.read, options.weights))
    _check_candidates(candidates)
    raw = read_raw(find_raw(options.dataset))
    if not re.match(r"Dataset\d{3}_", raw.name):
        raise PluginError(f"-d must be a dataset in {RAW} (DatasetXXX_NAME), not {raw.name}.")
    # Here, too, so that more draws than cases are told before weights are read.
    choose_cases(options, raw, ())
    return Inputs(candidates, raw, _find_plans(options, raw))


def _check_candidates(candidates: Sequence[Named]) -> None:
    for one in candidates:
        if one.trainer:
            raise PluginError(
                f"{RANDOM}:{one.trainer} cannot be taken here. '{RANDOM}' is a training from"
                " scratch of each network among the weights."
            )
    check_named(candidates)
    if len(candidates) < 2 or not any(one.path for one in candidates):
        raise PluginError(
            f"A comparison needs at least two candidates. Name other weights, or add '{RANDOM}' to"
            " some."
        )


def _find_plans(options: FewShot, raw: RawDataset) -> Path | None:
    if options.plans is None:
        return None
    root = os.environ.get(PREPROCESSED)
    if not root:
        raise PluginError(f"-p needs {PREPROCESSED}: {setting(PREPROCESSED, '/path/to/it')}")
    file = Path(root, raw.name, f"{options.plans}.json")
    if not file.is_file():
        others = sorted(path.stem for path in file.parent.glob("*lans*.json"))
        there = f" It has: {few(others)}." if others else ""
        raise PluginError(f"-p {options.plans}: there is no {file}.{there}")
    return file


def choose_cases(options: FewShot, raw: RawDataset, known: Collection[str]) -> Cases:
    """Return the cases to test on and the draws; raise PluginError if there are too few, or one is
    for both.

    Args:
        known: cases that weights among the candidates were trained on, which prove nothing.
    """
    names = [case.name for case in raw.cases]
    lists = {"--test-names": options.test_names, "--train-names": options.train_names}
    for flag, given in lists.items():
        for name in given or ():
            if name not in names:
                hint = did_you_mean(name, names)
                raise PluginError(f"{flag}: {raw.name} has no case {name}.{hint}")
            if name in known:
                raise PluginError(
                    f"{flag}: {name} is a case that some of the weights were trained on. Take"
                    " others, or weights of a fold that validates it."
                )
    left = [name for name in names if name not in known]
    if options.test_names is not None:
        test = sorted(set(options.test_names))
        pool = [name for name in left if name not in test]
    else:
        kept = set(options.train_names or ())
        others = [name for name in left if name not in kept]
        if len(others) < options.test:
            raise PluginError(
                f"{len(others)} cases of {raw.name} can be tested on (of {len(names)};"
                f" {len(known)} were trained on, {len(kept)} are in --train-names), fewer than"
                f" --test {options.test}. Lower it."
            )
        test, pool = hold_out(others, options.test, options.seed)
    if options.train_names is not None:
        pool = sorted(set(options.train_names))
    if both := sorted(set(test) & set(pool)):
        raise PluginError(f"{few(both)}: to test on and to train on. Take them out of one list.")
    return Cases(test, draw_labelled(pool, options.shots, options.draws, options.seed))
