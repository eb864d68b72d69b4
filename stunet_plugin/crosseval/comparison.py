"""What is scored: the classes that a model and a dataset share, and what has no counterpart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stunet_plugin.crosseval.inputs import Dataset, Model
from stunet_plugin.crosseval.measures import DEFAULT_TOLERANCE, TUBULAR, tolerance_of
from stunet_plugin.datasets.label_systems import (
    SIDES,
    LabelSystem,
    canonical_name,
    published_classes,
    shared_classes,
)
from stunet_plugin.errors import PluginError, did_you_mean, nearest
from stunet_plugin.utils.validation import is_list, is_number

SHARED, PAIR = "shared", "pair"
NEAR = 0.8
"""How much alike two names are (1: the same) before one is taken for the other misspelt."""
MEND_LABELS = (
    "If they mean the same classes under other names, give one of them a labels file with the"
    " other's names (labels=FILE, or labels of its entry in the file): docs/evaluation.md, Label"
    " systems."
)


@dataclass(frozen=True)
class ScoredClass:
    """A class as it stands in references and in predictions.

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
    """A model and a dataset.

    Attributes:
        classes: what is scored.
        only_in_dataset, only_in_model: classes with labels that take no part.
    """

    model: Model
    dataset: Dataset
    classes: tuple[ScoredClass, ...]
    only_in_dataset: tuple[str, ...]
    only_in_model: tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """How pairs are scored.

    Attributes:
        classes: :data:`SHARED` (by all models and datasets), :data:`PAIR` (by each pair), or
            canonical names.
        tolerances: of the NSD in mm by class or organ, where they differ from FLARE22's protocol.
        default_tolerance: of classes that neither knows.
        sliced: score tubular organs between the first and the last slice of the reference alone.
        resample: put predictions on the grid of their reference where they differ.
    """

    classes: str | tuple[str, ...] = SHARED
    tolerances: Mapping[str, float] | None = None
    default_tolerance: float = DEFAULT_TOLERANCE
    sliced: bool = False
    resample: bool = False

    @classmethod
    def from_table(cls, content: Mapping[str, Any]) -> Rules:
        """Check the entries of a file (or what options put in their place).

        Raises:
            PluginError: values out of range.
        """
        classes = content.get("classes", SHARED)
        if classes not in (SHARED, PAIR):
            if (
                not is_list(classes)
                or not classes
                or not all(isinstance(name, str) for name in classes)
            ):
                raise PluginError(
                    f"classes must be {SHARED!r}, {PAIR!r} or a list of names, not {classes!r}."
                )
            classes = tuple(dict.fromkeys(map(canonical_name, classes)))
        tolerances = content.get("tolerances", {})
        default = content.get("default_tolerance", DEFAULT_TOLERANCE)
        checked = tolerances if isinstance(tolerances, Mapping) else {"tolerances": None}
        for name, value in {**checked, "default_tolerance": default}.items():
            if not is_number(value) or value < 0:
                raise PluginError(
                    f"Tolerances must be a table of classes and millimetres; {name} is {value!r}."
                )
        for key in ("sliced", "resample"):
            if not isinstance(content.get(key, False), bool):
                raise PluginError(f"{key} must be true or false, not {content[key]!r}.")
        own = {canonical_name(name): float(value) for name, value in tolerances.items()}
        return cls(
            classes,
            own,
            float(default),
            bool(content.get("sliced", False)),
            bool(content.get("resample", False)),
        )


def pair_up(models: Sequence[Model], datasets: Sequence[Dataset], rules: Rules) -> list[Pair]:
    """Return every model with every dataset and the classes that are scored, the datasets of a
    model together.

    Raises:
        PluginError: classes that were asked for are missing, or none are shared.
    """
    subjects = _kinds(models, datasets)
    systems = [subject.labels for subject, _ in subjects]
    names: tuple[str, ...] | None = None
    if isinstance(rules.classes, tuple):
        names = rules.classes
        _check_asked_for(names, models, datasets)
    elif rules.classes == SHARED:
        names = tuple(shared_classes(systems))
        if not names:
            raise PluginError(_nothing_shared(models, datasets))
    pairs = [_pair(model, dataset, names, rules) for model in models for dataset in datasets]
    for subject, kind in subjects:
        if not any(pair.classes for pair in pairs if subject in (pair.model, pair.dataset)):
            what = _what_each_has(models, datasets)
            raise PluginError(
                f"{kind.capitalize()} {subject.name} shares no class with any other. {what}"
                f" {MEND_LABELS}"
            )
    return pairs


def _nothing_shared(models: Sequence[Model], datasets: Sequence[Dataset]) -> str:
    """The message for models and datasets without a class that all have; of a single pair nothing
    can be left out."""
    what = _what_each_has(models, datasets)
    if len(models) == len(datasets) == 1:
        return (
            f"Model {models[0].name} and dataset {datasets[0].name} share no class. {what}"
            f" {MEND_LABELS}"
        )
    return (
        f"There is no class that all models and datasets have. {what} Leave one out, or compare"
        f" each pair on what those two share: --classes {PAIR}."
    )


def _pair(model: Model, dataset: Dataset, names: tuple[str, ...] | None, rules: Rules) -> Pair:
    if names is None:
        names = tuple(shared_classes([dataset.labels, model.labels]))
    classes = tuple(
        ScoredClass(
            name,
            dataset.labels.values_of(name),
            model.labels.values_of(name),
            tolerance_of(name, rules.tolerances or {}, rules.default_tolerance),
            rules.sliced and name in TUBULAR,
        )
        for name in names
    )
    return Pair(
        model,
        dataset,
        classes,
        tuple(dataset.labels.without_counterpart(names)),
        tuple(model.labels.without_counterpart(names)),
    )


def _check_asked_for(
    names: Sequence[str], models: Sequence[Model], datasets: Sequence[Dataset]
) -> None:
    for subject, kind in _kinds(models, datasets):
        missing = [name for name in names if subject.labels.find(name) is None]
        if missing:
            alone = len(models) == len(datasets) == 1
            raise PluginError(
                f"The {kind} {subject.name} has no class {', '.join(missing)}; it has"
                f" {few(list(subject.labels.classes))}."
                f"{did_you_mean(missing[0], subject.labels.classes, NEAR)} Take it off the list of"
                " classes"
                f"{', or leave the list out to compare what both have.' if alone else f', or use --classes {PAIR}.'}"  # noqa: E501
            )


def _what_each_has(models: Sequence[Model], datasets: Sequence[Dataset]) -> str:
    """What classes there are, and which of them look like another's misspelt."""
    subjects = _kinds(models, datasets)
    meant = _misspelt([subject.labels for subject, _ in subjects])
    return " ".join(
        f"{subject.name} has: {_marked(subject.labels.classes, meant)}." for subject, _ in subjects
    )


def _misspelt(systems: Sequence[LabelSystem]) -> dict[str, str]:
    """Return classes that no published system has, each with the near one of another system that is
    meant.

    Neither system has the other's class. Left and right, or numbers that differ, are not slips of
    the pen.
    """
    known = published_classes()
    meant: dict[str, str] = {}
    for system in systems:
        for name in set(system.classes) - known:
            others = {
                near
                for other in systems
                if other.find(name) is None
                for near in other.classes
                if system.find(near) is None
            }
            alike = [
                near
                for near in sorted(others)
                if _sides_and_numbers(near) == _sides_and_numbers(name)
            ]
            found = nearest(name, alike, NEAR)
            if found:
                meant[name] = found
    return meant


def _sides_and_numbers(name: str) -> list[str]:
    return [
        word for word in re.split(r"_|(\d+)", name) if word and (word in SIDES or word.isdigit())
    ]


def _marked(names: Iterable[str], meant: Mapping[str, str]) -> str:
    """Names as a list; those that seem misspelt stand first, so that they are seen, with what is
    meant."""
    ordered = sorted(names, key=lambda name: name not in meant)
    return few(
        [f"{name} (did you mean {meant[name]}?)" if name in meant else name for name in ordered]
    )


def _kinds(
    models: Sequence[Model], datasets: Sequence[Dataset]
) -> list[tuple[Model | Dataset, str]]:
    """All subjects with what each of them is; datasets first, since their order of classes is
    kept."""
    return [
        *((dataset, "dataset") for dataset in datasets),
        *((model, "model") for model in models),
    ]


def few(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many there are beside them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def describe(pairs: Sequence[Pair]) -> list[str]:
    """Return lines that say what is scored and what is not."""
    lines = []
    systems = {subject: subject.labels for pair in pairs for subject in (pair.dataset, pair.model)}
    meant = _misspelt(list(systems.values()))
    scored = dict.fromkeys(scored.name for pair in pairs for scored in pair.classes)
    lines.append(f"Classes ({len(scored)}): {', '.join(scored)}.")
    for kind, subjects in (
        ("dataset", {pair.dataset.name: pair.dataset.labels for pair in pairs}),
        ("model", {pair.model.name: pair.model.labels for pair in pairs}),
    ):
        for name, labels in subjects.items():
            left = _never_scored(
                labels, [pair for pair in pairs if name == getattr(pair, kind).name]
            )
            if left:
                lines.append(
                    f"Not scored, as it has no counterpart: {kind} {name}: {_marked(left, meant)}."
                )
    lines += [
        f"Nothing to score: {pair.model.name} on {pair.dataset.name} share no class."
        for pair in pairs
        if not pair.classes
    ]
    return lines


def dropped(pairs: Sequence[Pair]) -> str:
    """Return one line with the classes of the datasets that were never scored, for the end of a
    run; empty if all were."""
    datasets = {pair.dataset.name: pair.dataset.labels for pair in pairs}
    meant = _misspelt([pair.model.labels for pair in pairs] + list(datasets.values()))
    left = {
        name: _never_scored(labels, [one for one in pairs if one.dataset.name == name])
        for name, labels in datasets.items()
    }
    shown = "; ".join(
        f"{name}: {_marked(classes, meant)}" for name, classes in left.items() if classes
    )
    return f"Dropped, without a counterpart: {shown}." if shown else ""


def _never_scored(labels: LabelSystem, pairs: Sequence[Pair]) -> list[str]:
    return labels.without_counterpart(scored.name for pair in pairs for scored in pair.classes)
