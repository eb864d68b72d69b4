"""Label mapping of datasets that are merged with others which annotate other classes.

A class that a dataset does not annotate may hide in its background. So there, everything that is
none of the joint classes becomes the ignore label, unless the dataset has a larger class that the
missing one is a part of (``kidney`` for ``kidney_left``): then that class alone does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.label_systems import LabelSystem, canonical_name


@dataclass(frozen=True)
class LabelMapping:
    """How one dataset's labels are translated.

    Attributes:
        table: its label value to the joint one; -1 for values that it does not have.
        missing: joint classes that it does not annotate, whose place is not known.
        hidden_in: its own classes that become ignore because a missing one is a part of them.
        left_out: its own classes that are no part of the joint ones.
        background_ignored: whether everything else becomes ignore, too.
    """

    table: np.ndarray
    missing: tuple[str, ...]
    hidden_in: tuple[str, ...]
    left_out: tuple[str, ...]
    background_ignored: bool

    @property
    def changes_nothing(self) -> bool:
        known = self.table >= 0
        return bool(np.array_equal(self.table[known], np.flatnonzero(known)))

    def translate(self, labels: np.ndarray) -> np.ndarray:
        """Return the joint labels of a label map (any shape) whose values are declared."""
        joint: np.ndarray = self.table[labels].astype(np.min_scalar_type(self.table.max()))
        return joint

    def describe(self, source: LabelSystem, joint: LabelSystem) -> dict[str, str]:
        """Return in names what each class of a dataset, and its background, becomes."""
        names = {values[0]: name for name, values in joint.classes.items()}
        names |= {0: "background"} | ({joint.ignore: "ignore"} if joint.ignore else {})
        first = {name: source.classes[name][0] for name in _smallest_classes([source])}
        return {x: names[int(self.table[value])] for x, value in {"background": 0, **first}.items()}


def unite(
    systems: Sequence[LabelSystem],
    wanted: Sequence[str] | None,
    not_shown: Sequence[Collection[str]],
) -> tuple[LabelSystem, list[LabelMapping]]:
    """Return the label system of the joint dataset, with an ignore label if one is needed, and what
    the labels of each dataset become; raise PluginError if classes overlap or nobody has one.

    Args:
        systems: of the datasets.
        wanted: classes to learn; None takes all.
        not_shown: per dataset, classes that its images do not show, so that their absence is known.
    """
    known = _smallest_classes(systems)
    classes = known if wanted is None else list(dict.fromkeys(map(canonical_name, wanted)))
    unknown = [name for name in classes if all(system.find(name) is None for system in systems)]
    if unknown:
        there = ", ".join(known)
        raise PluginError(f"No dataset has the class(es) {', '.join(unknown)}. They have: {there}.")
    for system in systems:
        sets = {name: set(values) for name in classes if (values := system.find(name))}
        for one, other in combinations(sets, 2):
            if sets[one] & sets[other]:
                raise PluginError(
                    f"{one!r} and {other!r} overlap in {system.name}. Choose with --classes: the"
                    " larger one, or the smaller ones (the larger one alone then becomes ignore)."
                )
    joint = LabelSystem.numbered("joint", classes, ignore=True)
    mappings = [
        _map_labels(system, joint, set(map(canonical_name, absent)), systems)
        for system, absent in zip(systems, not_shown, strict=True)
    ]
    if not any(x.missing for x in mappings) and all(x.ignore is None for x in systems):
        joint = LabelSystem.numbered("joint", classes)
    return joint, mappings


def _smallest_classes(systems: Sequence[LabelSystem]) -> list[str]:
    """Return the classes of all systems, each once, without those that a system makes up of smaller
    ones of its own."""
    names = (
        name
        for system in systems
        for name, values in system.classes.items()
        if not any(set(other) < set(values) for other in system.classes.values())
    )
    return list(dict.fromkeys(names))


def _map_labels(
    source: LabelSystem, joint: LabelSystem, absent: set[str], systems: Sequence[LabelSystem]
) -> LabelMapping:
    missing = [name for name in joint.classes if source.find(name) is None and name not in absent]
    joint_values = {value for name in joint.classes for value in source.find(name) or ()}
    own = [name for name, values in source.classes.items() if not joint_values & set(values)]
    hidden_in = {name: [part for part in missing if _contains(name, part, systems)] for name in own}
    background_ignored = bool(set(missing).difference(*hidden_in.values()))

    values, ignore = sorted(source.values), max(joint.values)
    table = np.full(values[-1] + 1, -1, dtype=np.int64)
    table[values] = ignore if background_ignored else 0
    for name, parts in hidden_in.items():
        if parts:
            table[list(source.classes[name])] = ignore
    for name, (value,) in joint.classes.items():
        table[list(source.find(name) or ())] = value
    if source.ignore is not None:
        table[source.ignore] = ignore
    return LabelMapping(
        table,
        tuple(missing),
        tuple(name for name, parts in hidden_in.items() if parts),
        tuple(name for name, parts in hidden_in.items() if not parts),
        background_ignored,
    )


def _contains(larger: str, part: str, systems: Sequence[LabelSystem]) -> bool:
    """Whether a class is a part of another, by a system that has both."""
    found = [(system.find(larger), system.find(part)) for system in systems]
    return any(whole and piece and set(piece) <= set(whole) for whole, piece in found)
