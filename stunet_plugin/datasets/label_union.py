"""Label mapping of datasets that are merged with others which annotate other classes.

A class that a dataset does not annotate may hide in its background. So there, everything that is
none of the joint classes becomes the ignore label, unless the dataset has a larger class that the
missing one is a part of (``kidney`` for ``kidney_left``): then that class alone does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from stunet_plugin.datasets.label_systems import LabelSystem, canonical_name, map_labels
from stunet_plugin.errors import PluginError


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
        smallest = np.uint8 if self.table.max() < 256 else np.uint16
        joint: np.ndarray = self.table[labels].astype(smallest)
        return joint

    def describe(self, source: LabelSystem, joint: LabelSystem) -> dict[str, str]:
        """Return in names what each class of a dataset, and its background, becomes."""
        names = {values[0]: name for name, values in joint.classes.items()}
        names |= {0: "background"} | ({joint.ignore: "ignore"} if joint.ignore else {})
        first = {name: source.classes[name][0] for name in all_classes([source])}
        return {x: names[int(self.table[value])] for x, value in {"background": 0, **first}.items()}


def all_classes(systems: Sequence[LabelSystem]) -> list[str]:
    """Return the classes of all systems, each once; those that a system makes up of smaller ones of
    its own are left out."""
    return list(
        dict.fromkeys(
            name
            for system in systems
            for name, values in system.classes.items()
            if not any(set(other) < set(values) for other in system.classes.values())
        )
    )


def joint_system(
    systems: Sequence[LabelSystem],
    wanted: Sequence[str] | None,
    not_shown: Sequence[Collection[str]],
) -> LabelSystem:
    """Return the label system of the joint dataset, with an ignore label if one is needed.

    Args:
        systems: of the datasets.
        wanted: classes to learn; None takes all.
        not_shown: per dataset, classes that its images do not show.

    Raises:
        PluginError: no dataset has a wanted class, or classes overlap.
    """
    classes = (
        all_classes(systems) if wanted is None else list(dict.fromkeys(map(canonical_name, wanted)))
    )
    unknown = [name for name in classes if all(system.find(name) is None for system in systems)]
    if unknown:
        raise PluginError(
            f"No dataset has the class(es) {', '.join(unknown)}. They have:"
            f" {', '.join(all_classes(systems))}. Leave others out."
        )
    for system in systems:
        overlaps = system.overlapping([name for name in classes if system.find(name)])
        if overlaps:
            one, other = overlaps[0]
            raise PluginError(
                f"{one!r} and {other!r} overlap in {system.name}, and a voxel has one label. Say"
                " what to learn with --classes: the larger class, or the smaller ones (where a"
                " dataset has the larger one alone, it then becomes ignore)."
            )
    joint = LabelSystem.numbered("joint", classes, ignore=True)
    needed = any(
        system.ignore is not None or map_to_union(system, joint, absent, systems).missing
        for system, absent in zip(systems, not_shown, strict=True)
    )
    return joint if needed else LabelSystem.numbered("joint", classes)


def map_to_union(
    source: LabelSystem,
    joint: LabelSystem,
    not_shown: Collection[str],
    systems: Sequence[LabelSystem],
) -> LabelMapping:
    """Return what the labels of a dataset become.

    Args:
        source: its label system.
        joint: the one of the joint dataset.
        not_shown: classes that its images do not show, so that their absence is known.
        systems: of all datasets; they know which classes are parts of others.

    Raises:
        PluginError: classes overlap.
    """
    absent = {canonical_name(name) for name in not_shown}
    missing = [name for name in joint.classes if source.find(name) is None and name not in absent]
    joint_values = {value for name in joint.classes for value in source.find(name) or ()}
    own = [name for name, values in source.classes.items() if not joint_values & set(values)]
    hidden_in = {name: [part for part in missing if _contains(name, part, systems)] for name in own}
    placed = {part for parts in hidden_in.values() for part in parts}
    background_ignored = bool(set(missing) - placed)

    values = np.array(sorted(source.values))
    # Without an ignore label nothing is missing, and nothing is mapped to it.
    elsewhere = joint.ignore or 0 if background_ignored else 0
    table = np.full(values.max() + 1, -1, dtype=np.int64)
    table[values] = map_labels(values, source, joint, unmatched=elsewhere)
    table[0] = elsewhere
    for name, parts in hidden_in.items():
        if parts:
            table[list(source.values_of(name))] = joint.ignore
    return LabelMapping(
        table,
        tuple(missing),
        tuple(name for name, parts in hidden_in.items() if parts),
        tuple(name for name, parts in hidden_in.items() if not parts),
        background_ignored,
    )


def _contains(larger: str, part: str, systems: Sequence[LabelSystem]) -> bool:
    """Whether a class is a part of another, by a system that has both."""
    for system in systems:
        whole, piece = system.find(larger), system.find(part)
        if whole and piece and set(piece) <= set(whole):
            return True
    return False
