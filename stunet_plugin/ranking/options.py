"""What a user asked ``stunet rank`` for, checked as far as that goes without torch, so that a slip
is told at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.datasets.raw_dataset import RawDataset, find_raw, read_raw
from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.nnunet.names import PREPROCESSED
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights.file_formats import recognise
from stunet_plugin.weights.locate import HUB_PREFIX, find_model

RANDOM = "random"
FEWEST_CASES = 2
"""Pairs of cases are compared."""


@dataclass(frozen=True)
class Named:
    """Weights as the user gave them: a path (a folder, a file, or on the hub), or the trainer of a
    network with random ones.

    Attributes:
        name: in the ranking.
        path, trainer: one of them is empty, both are for ``random``: random weights for every
            network among the others.
    """

    name: str
    path: str = ""
    trainer: str = ""

    @classmethod
    def read(cls, text: str) -> Named:
        name, separator, path = text.partition("=")
        # A path may hold that sign itself.
        if not separator or Path(text).exists():
            name, path = "", text
        if path == RANDOM:
            return cls(name or RANDOM)
        if path.startswith(f"{RANDOM}:"):
            return cls(name or path, trainer=path.partition(":")[2])
        return cls(name or path.rstrip("/"), path)

    @property
    def file(self) -> Path:
        """The checkpoint.

        Raises:
            PluginError: there is none.
        """
        file = find_model(self.path).checkpoint
        if not file.is_file():
            raise PluginError(
                f"{file}: there is no such file. Name a model folder of nnU-Net, or a checkpoint."
            )
        return file


@dataclass(frozen=True)
class RankOptions:
    """See ``stunet rank --help``."""

    weights: Sequence[str]
    dataset: str
    plans: str | None = None
    configuration: str = "3d_fullres"
    cases: int = 10
    names: Sequence[str] | None = None
    levels: int | None = None
    seed: int = 0
    step_size: float = 0.5
    published_sums: bool = False
    variety: str = "energy"
    device: str = "auto"
    json: str | None = None
    figure: str | None = None

    @classmethod
    def from_arguments(cls, given: Any) -> RankOptions:
        """Take the options and check them.

        Raises:
            PluginError: anything in them is wrong, or a file, dataset, case or plan that they name
                is not there.
        """
        options = cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})
        options._check_numbers_and_files()
        options._check_candidates()
        # Each looks for what it names.
        _ = options.raw, options.chosen_cases, options.plan_content
        return options

    @cached_property
    def candidates(self) -> tuple[Named, ...]:
        return tuple(map(Named.read, self.weights))

    @cached_property
    def raw(self) -> RawDataset:
        return read_raw(find_raw(self.dataset))

    @cached_property
    def preprocessed(self) -> Path | None:
        """The dataset's folder in nnUNet_preprocessed, None if it has none."""
        root = os.environ.get(PREPROCESSED)
        folder = Path(root, self.raw.name) if root else None
        return folder if folder and folder.is_dir() else None

    @cached_property
    def chosen_cases(self) -> tuple[str, ...]:
        """The cases to look at, in the order of their names: those that are named, or drawn with
        the seed.

        Raises:
            PluginError: the dataset lacks one, or they are fewer than two.
        """
        known = [case.name for case in self.raw.cases]
        if self.names is not None:
            unknown = sorted(set(self.names) - set(known))
            if unknown or len(set(self.names)) < FEWEST_CASES:
                wrong = (
                    f"{self.raw.name} has no case {unknown[0]}"
                    if unknown
                    else f"{len(set(self.names))} case(s) make no pair"
                )
                hint = did_you_mean(unknown[0], known) if unknown else ""
                raise PluginError(
                    f"--names: {wrong}. Name at least {FEWEST_CASES} of its {len(known)}"
                    f" cases.{hint}"
                )
            return tuple(sorted(set(self.names)))
        if self.cases < FEWEST_CASES:
            raise PluginError(
                f"--cases must be at least {FEWEST_CASES}, as pairs of cases are compared, not"
                f" {self.cases}."
            )
        if len(known) < FEWEST_CASES:
            raise PluginError(
                f"{self.raw.name} has {len(known)} labelled case(s); at least {FEWEST_CASES} are"
                " needed, better ten."
            )
        drawn = np.random.default_rng(self.seed).permutation(len(known))[: self.cases]
        return tuple(known[index] for index in sorted(drawn))

    @cached_property
    def plan_content(self) -> dict[str, Any] | None:
        """The plans given with -p, which have the configuration; None where none are given.

        Raises:
            PluginError: the dataset has no such plans or configuration.
        """
        if self.plans is None:
            return None
        file = self.preprocessed / f"{self.plans}.json" if self.preprocessed else None
        if file is None or not file.is_file():
            others = (
                sorted(path.stem for path in self.preprocessed.glob("*lans*.json"))
                if self.preprocessed
                else []
            )
            there = f" It has: {', '.join(others)}." if others else ""
            raise PluginError(
                f"-p {self.plans}: {self.raw.name} has no such plans in {PREPROCESSED}.{there} Plan"
                " it (nnUNetv2_plan_and_preprocess, `stunet plan` or `stunet plan-like`), or leave"
                " -p out: each model then sees the images as in its own training."
            )
        plans = read_json(file)
        check_configuration(plans, self.configuration, f"-p {self.plans}")
        return plans

    def _check_numbers_and_files(self) -> None:
        if not 0 < self.step_size <= 1:
            raise PluginError(
                f"--step-size must be above 0 and at most 1 patch, not {self.step_size:g}."
            )
        if self.seed < 0:
            raise PluginError(f"--seed must be at least 0, not {self.seed}.")
        if self.levels is not None and self.levels < 1:
            raise PluginError(f"--levels must be at least 1, not {self.levels}.")
        for name, file in (("--json", self.json), ("--figure", self.figure)):
            if file is not None and not Path(file).absolute().parent.is_dir():
                raise PluginError(f"{name} {file}: there is no folder {Path(file).parent}.")

    def _check_candidates(self) -> None:
        for candidate in self.candidates:
            if candidate.trainer and self.plans is None:
                raise PluginError(
                    f"{RANDOM}:{candidate.trainer} has no plan of its own. Give one: -p PLANS"
                    " (those of the dataset)"
                )
            if candidate.path and not candidate.path.startswith(HUB_PREFIX):
                recognise(candidate.file)
        alone = any(not candidate.path and not candidate.trainer for candidate in self.candidates)
        if alone and not any(candidate.path for candidate in self.candidates):
            raise PluginError(
                f"'{RANDOM}' is to compare other weights with. Name some, or a network:"
                f" {RANDOM}:TRAINER -p PLANS"
            )
        names = [candidate.name for candidate in self.candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PluginError(
                f"Two candidates are called {twice[0]}. Give them names of their own: NAME=PATH"
            )
        if len(names) < 2:
            raise PluginError(
                f"A ranking needs at least two candidates. Name another, or add '{RANDOM}'."
            )


def check_configuration(plans: Mapping[str, Any], configuration: str, where: str) -> None:
    """Raise a PluginError unless plans have a configuration."""
    available = plans.get("configurations", {})
    if configuration not in available:
        hint = did_you_mean(configuration, available)
        raise PluginError(
            f"{where} has no configuration {configuration!r}. Available: {', '.join(available)}."
            f" Set it: -c{hint}"
        )
