"""Comparison: the classes that models and datasets share, and what has no counterpart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stunet_plugin.crosseval.inputs import PAIR, SHARED, Case, Dataset, Model, Setup
from stunet_plugin.crosseval.measures import TUBULAR, tolerance_of
from stunet_plugin.datasets import label_systems
from stunet_plugin.errors import PluginError, did_you_mean, few, nearest

NEAR = 0.8
"""Similarity (1: the same) from which a name is taken for another one misspelt."""
FIX_LABELS = (
    "If they mean the same classes under other names, give one of them a labels file with the"
    " other's names (labels=FILE, or labels of its entry in the file): docs/evaluation.md, Label"
    " systems."
)


@dataclass(frozen=True)
class ScoredClass:
    """A class in references and in predictions.

    Attributes:
        name: canonical.
        in_reference, in_prediction: its label values.
        tolerance: of the NSD, in mm.
        sliced: scored between the first and the last slice of the reference alone.
    """

    name: str
    in_reference: tuple[int, ...]
    in_prediction: tuple[int, ...]
    tolerance: float
    sliced: bool


@dataclass(frozen=True, eq=False)
class Pair:
    """A model and a dataset: the classes that are scored, and those that take no part."""

    model: Model
    dataset: Dataset
    classes: tuple[ScoredClass, ...]
    only_in_dataset: tuple[str, ...]
    only_in_model: tuple[str, ...]

    @property
    def scored_cases(self) -> tuple[Case, ...]:
        return self.dataset.cases if self.classes else ()

    def key(self, case: Case) -> tuple[str, str, str]:
        return self.model.name, self.dataset.name, case.name


def pair_up(setup: Setup) -> list[Pair]:
    """Return every model with every dataset and the classes that are scored, the datasets of a
    model together.

    Raises:
        PluginError: classes that were asked for are missing, or none are shared.
    """
    # Datasets first, since their order of classes is kept.
    inputs: tuple[Model | Dataset, ...] = (*setup.datasets, *setup.models)
    names: Sequence[str] | None = None
    if isinstance(setup.classes, tuple):
        names = setup.classes
        _check_asked_for(names, inputs)
    elif setup.classes == SHARED:
        names = label_systems.shared_classes([one.labels for one in inputs])
        if not names and len(inputs) > 2:
            raise PluginError(
                f"There is no class that all models and datasets have. {_what_each_has(inputs)}"
                f" Leave one out, or compare each pair on what those two share: --classes {PAIR}."
            )
    pairs = [_pair(model, data, names, setup) for model in setup.models for data in setup.datasets]
    for one in inputs:
        if not any(pair.classes for pair in pairs if one in (pair.model, pair.dataset)):
            subject = f"{one.kind.capitalize()} {one.name} shares no class with any other."
            if len(inputs) == 2:
                subject = f"Model {inputs[1].name} and dataset {inputs[0].name} share no class."
            raise PluginError(f"{subject} {_what_each_has(inputs)} {FIX_LABELS}")
    return pairs


def describe(pairs: Sequence[Pair]) -> list[str]:
    """Return lines that say what is scored and what is not."""
    scored = dict.fromkeys(one.name for pair in pairs for one in pair.classes)
    lines = [f"Classes ({len(scored)}): {', '.join(scored)}."]
    lines += [
        f"Not scored, as it has no counterpart: {one.kind} {one.name}: {classes}."
        for one, classes in _never_scored(pairs).items()
    ]
    lines += [
        f"Nothing to score: {pair.model.name} on {pair.dataset.name} share no class."
        for pair in pairs
        if not pair.classes
    ]
    return lines


def dropped(pairs: Sequence[Pair]) -> str:
    """Return one line with the classes of the datasets that were never scored, empty if all
    were."""
    left = [
        f"{one.name}: {classes}"
        for one, classes in _never_scored(pairs).items()
        if isinstance(one, Dataset)
    ]
    return f"Dropped, without a counterpart: {'; '.join(left)}." if left else ""


def _never_scored(pairs: Sequence[Pair]) -> dict[Model | Dataset, str]:
    """Return the classes of each dataset and model that no pair scores, as text."""
    inputs: dict[Model | Dataset, list[str]] = {pair.dataset: [] for pair in pairs}
    inputs |= {pair.model: [] for pair in pairs}
    for pair in pairs:
        for one in (pair.model, pair.dataset):
            inputs[one] += [scored.name for scored in pair.classes]
    meant = _misspelt(list(inputs))
    left = {one: one.labels.without_counterpart(scored) for one, scored in inputs.items()}
    return {one: _marked(names, meant) for one, names in left.items() if names}


def _pair(model: Model, dataset: Dataset, names: Sequence[str] | None, setup: Setup) -> Pair:
    if names is None:
        names = label_systems.shared_classes([dataset.labels, model.labels])
    classes = tuple(
        ScoredClass(
            name,
            dataset.labels.values_of(name),
            model.labels.values_of(name),
            tolerance_of(name, setup.tolerances, setup.default_tolerance),
            setup.sliced and name in TUBULAR,
        )
        for name in names
    )
    left = (tuple(one.labels.without_counterpart(names)) for one in (dataset, model))
    return Pair(model, dataset, classes, *left)


def _check_asked_for(names: Sequence[str], inputs: Sequence[Model | Dataset]) -> None:
    for one in inputs:
        missing = [name for name in names if one.labels.find(name) is None]
        if missing:
            raise PluginError(
                f"The {one.kind} {one.name} has no class {', '.join(missing)}; it has"
                f" {few(list(one.labels.classes))}."
                f"{did_you_mean(missing[0], one.labels.classes, NEAR)} Take it off the list of"
                f" classes, or use --classes {PAIR}."
            )


def _what_each_has(inputs: Sequence[Model | Dataset]) -> str:
    """Return what classes there are, and which of them look like another's misspelt."""
    meant = _misspelt(inputs)
    return " ".join(f"{one.name} has: {_marked(one.labels.classes, meant)}." for one in inputs)


def _misspelt(inputs: Sequence[Model | Dataset]) -> dict[str, str]:
    """Return classes that no published system has, each with the near one of another system that is
    meant.

    Neither system has the other's class; names that differ in sides or numbers are not misspelt.
    """
    systems = [one.labels for one in inputs]
    meant: dict[str, str] = {}
    for system in systems:
        for name in set(system.classes) - label_systems.published_classes():
            others = {
                near
                for other in systems
                if other.find(name) is None
                for near in other.classes
                if system.find(near) is None
                and _sides_and_numbers(near) == _sides_and_numbers(name)
            }
            if found := nearest(name, sorted(others), NEAR):
                meant[name] = found
    return meant


def _sides_and_numbers(name: str) -> list[str]:
    words = re.split(r"_|(\d+)", name)
    return [word for word in words if word and (word in label_systems.SIDES or word.isdigit())]


def _marked(names: Iterable[str], meant: Mapping[str, str]) -> str:
    """Return names as a list, first those that seem misspelt, with what is meant."""
    ordered = sorted(names, key=lambda name: name not in meant)
    return few([f"{x} (did you mean {meant[x]}?)" if x in meant else x for x in ordered])
