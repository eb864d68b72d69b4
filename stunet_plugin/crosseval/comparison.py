"""Comparison: the classes that models and datasets share, and what has no counterpart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stunet_plugin.crosseval.entries import PAIR, SHARED, folder_of
from stunet_plugin.crosseval.inputs import Setup
from stunet_plugin.crosseval.lesions import is_lesion
from stunet_plugin.crosseval.models import Compared, Predictions
from stunet_plugin.crosseval.references import Dataset
from stunet_plugin.datasets.raw_dataset import Case
from stunet_plugin.errors import PluginError, did_you_mean, few, nearest
from stunet_plugin.utils import label_systems
from stunet_plugin.utils.measures import TUBULAR, tolerance_of
from stunet_plugin.utils.parts import parts_of

PREDICTIONS = "predictions"
"""Folder of those that models make."""
CONFIDENCES = "confidences"
"""Folder of the maps of their confidence."""
NEAR = 0.8
"""Similarity (1: the same) from which a name is taken for another one misspelt."""
FIX_LABELS = (
    "If they mean the same classes under other names, give one of them a labels file with the"
    " other's names (labels=FILE, or labels of its entry in the file): docs/evaluation.md, Label"
    " systems."
)


@dataclass(frozen=True)
class ScoredClass:
    """A class by its canonical name: its label values in references and in predictions, the NSD's
    tolerance in mm, whether only the slices that the reference shows it on are scored, and whether
    it is one of lesions, which are counted."""

    name: str
    in_reference: tuple[int, ...]
    in_prediction: tuple[int, ...]
    tolerance: float
    sliced: bool
    lesions: bool = False


@dataclass(frozen=True, eq=False)
class Pair:
    """A model or a tool and a dataset: the classes that are scored, and those that take no part."""

    model: Compared
    dataset: Dataset
    classes: tuple[ScoredClass, ...]
    only_in_dataset: tuple[str, ...]
    only_in_model: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str]:
        return self.model.name, self.dataset.name

    def file(self, folder: Path, case: Case, ending: str = ".json") -> Path:
        """Return where a file of a case goes in the folder of all predictions or scores."""
        return folder.joinpath(*map(folder_of, self.names), f"{case.name}{ending}")

    def prediction(self, output: Path, case: Case) -> Path:
        """Return the file of a prediction: where a tool left it, or in the output folder."""
        if isinstance(self.model, Predictions):
            return self.model.files[self.dataset.name, case.name]
        return self.file(output / PREDICTIONS, case, self.dataset.ending)

    def confidence(self, output: Path, case: Case) -> Path:
        """Return the file of the confidence of a model's prediction."""
        return self.file(output / CONFIDENCES, case, self.dataset.ending)


class Comparison:
    """Every model with every dataset (``pairs``, those of a model together), the scored ``classes``
    by name, and the ``setup``; PluginError where a class is missing or none are shared."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        # Datasets first, since their order of classes is kept.
        self._inputs: tuple[Compared | Dataset, ...] = (*setup.datasets, *setup.models)
        names = self._names()
        self.pairs = [self._pair(x, data, names) for x in setup.models for data in setup.datasets]
        self.classes = {one.name: one for pair in self.pairs for one in pair.classes}
        for one in self._inputs:
            if not any(pair.classes for pair in self.pairs if one in (pair.model, pair.dataset)):
                others = "models" if isinstance(one, Dataset) else "datasets"
                told = f"The {one.kind} {one.name} shares no class with the {others}."
                raise PluginError(f"{told} {self._what_each_has()} {FIX_LABELS}")

    @property
    def cases(self) -> list[tuple[Pair, Case]]:
        """All that are scored."""
        return [(x, case) for x in self.pairs if x.classes for case in x.dataset.cases]

    @property
    def own_cases(self) -> list[tuple[Pair, Case]]:
        """Those of this part; all models meet the same cases."""
        setup, own = self.setup, []
        for pair in self.pairs:
            cases = parts_of(pair.dataset.cases, setup.num_parts, setup.part_id)
            own += [(pair, case) for case in cases if pair.classes]
        return own

    def describe(self) -> list[str]:
        """Return lines that say what is scored and what is not."""
        lines = [f"Classes ({len(self.classes)}): {', '.join(self.classes)}."]
        for one, left in self._never_scored.items():
            lines.append(f"Not scored, as it has no counterpart: {one.kind} {one.name}: {left}.")
        for data in self.setup.datasets:
            if data.left_out:
                lines.append(
                    f"Cases of {data.name} without a prediction: {data.left_out}, left out."
                )
        lines += [note for tool in self.setup.finished for note in tool.notes]
        for pair in self.pairs:
            if not pair.classes:
                lines.append(f"Nothing to score: {' on '.join(pair.names)} share no class.")
        return lines

    def dropped(self) -> str:
        """Return a line with the classes of the datasets that no pair scores, "" if all are."""
        left = {one: x for one, x in self._never_scored.items() if isinstance(one, Dataset)}
        listed = "; ".join(f"{one.name}: {classes}" for one, classes in left.items())
        return f"Dropped, without a counterpart: {listed}." if left else ""

    def _names(self) -> Sequence[str] | None:
        """Return the classes that all pairs are scored on, None where each pair has its own."""
        asked = self.setup.classes
        if asked == PAIR:
            return None
        if asked == SHARED:
            names = label_systems.shared_classes([one.labels for one in self._inputs])
            if not names and len(self._inputs) > 2:
                raise PluginError(
                    f"There is no class that all models and datasets have. {self._what_each_has()}"
                    f" Leave one out, or compare each pair on what those two share: --classes"
                    f" {PAIR}."
                )
            return names
        for one in self._inputs:
            missing = [name for name in asked if one.labels.find(name) is None]
            if missing:
                raise PluginError(
                    f"The {one.kind} {one.name} has no class {', '.join(missing)}; it has"
                    f" {few(list(one.labels.classes))}."
                    f"{did_you_mean(missing[0], one.labels.classes, NEAR)} Take it off the list of"
                    f" classes, or use --classes {PAIR}."
                )
        return asked

    def _pair(self, model: Compared, dataset: Dataset, names: Sequence[str] | None) -> Pair:
        setup, systems = self.setup, (dataset.labels, model.labels)
        if names is None:
            names = label_systems.shared_classes(systems)
        classes = tuple(
            ScoredClass(
                name,
                dataset.labels.values_of(name),
                model.labels.values_of(name),
                tolerance_of(name, setup.tolerances, setup.default_tolerance),
                setup.sliced and name in TUBULAR,
                name in setup.lesions or is_lesion(name),
            )
            for name in names
        )
        left = (tuple(system.without_counterpart(names)) for system in systems)
        return Pair(model, dataset, classes, *left)

    @cached_property
    def _never_scored(self) -> dict[Compared | Dataset, str]:
        """The classes of each dataset and model that no pair scores, as text."""
        left = {}
        for one in self._inputs:
            pairs = [pair for pair in self.pairs if one in (pair.model, pair.dataset)]
            scored = [x.name for pair in pairs for x in pair.classes]
            if names := one.labels.without_counterpart(scored):
                left[one] = self._marked(names)
        return left

    def _what_each_has(self) -> str:
        """Return what classes there are, and which of them look like another's misspelt."""
        return " ".join(f"{x.name} has: {self._marked(x.labels.classes)}." for x in self._inputs)

    def _marked(self, names: Iterable[str]) -> str:
        """Return names as a list, first those that seem misspelt, with what is meant."""
        meant = self._misspelt
        ordered = sorted(names, key=lambda name: name not in meant)
        return few([f"{x} (did you mean {meant[x]}?)" if x in meant else x for x in ordered])

    @cached_property
    def _misspelt(self) -> Mapping[str, str]:
        """Classes that no published system has, each with the near one of another system that is
        meant: neither system has the other's, and sides and numbers are the same."""
        systems = [one.labels for one in self._inputs]
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
