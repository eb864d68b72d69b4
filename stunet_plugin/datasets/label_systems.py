"""Label systems: which label value means which class, and how two of them meet.

A class is known by its canonical name (:func:`canonical_name`), so ``postcava``, ``IVC`` and
``inferior vena cava`` are one class, as are ``left kidney`` and ``kidney_left``. A class may have
several label values (a group, or a region of nnU-Net), and a
larger class may be made up of smaller ones: a system with both kidneys apart has ``kidney``, too.

Published systems are data (``stunet_plugin/data/label_systems.json``); a user's own is one small
JSON or YAML file, or a ``dataset.json`` of nnU-Net. Light on purpose: numpy only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.datasets.label_files import check_labels_file, published_facts, read_table
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.validation import is_integer, is_list

BACKGROUND, IGNORE = "background", "ignore"
"""Names that nnU-Net's ``dataset.json`` reserves."""
MAX_VALUE = 2**16 - 1
"""nnU-Net writes segmentations with 16 bits at most."""
SIDES = ("left", "right")


@dataclass(frozen=True)
class LabelSystem:
    """Classes of a dataset or a model.

    Attributes:
        name: for people.
        classes: canonical name to its label values (sorted, never 0); groups and regions included.
        ignore: the label value that says nothing, as in nnU-Net; None if there is none.
    """

    name: str
    classes: Mapping[str, tuple[int, ...]]
    ignore: int | None = None

    @classmethod
    def numbered(cls, name: str, classes: Sequence[str], ignore: bool = False) -> LabelSystem:
        """Give classes the values 1, 2, ..., and the next one to "ignore" if that is asked for.

        Raises:
            PluginError: a class stands twice.
        """
        values: dict[str, int] = {one: value for value, one in enumerate(classes, 1)}
        if len(values) != len(classes):
            raise PluginError(f"Label system {name}: a class stands twice in {', '.join(classes)}.")
        return cls.from_table(
            {"labels": {**values, **({IGNORE: len(classes) + 1} if ignore else {})}}, name
        )

    @classmethod
    def from_table(cls, content: Mapping[str, Any], name: str) -> LabelSystem:
        """Take a label system in the form of nnU-Net's ``dataset.json``.

        Args:
            content: ``labels`` is a table of names and values (or lists of values), or of values
                and names, or a list of names with the values 1, 2, ...; ``groups``, if given, a
                table of names and the names of labels that make them up. Classes may share values
                only as groups do, or with nnU-Net's ``regions_class_order``.
            name: for messages, unless the content has one.

        Raises:
            PluginError: labels that overlap, groups of labels that do not exist, or no labels at
                all.
        """
        name = str(content.get("name", name)) if "labels" in content else name
        labels = _named_values(content.get("labels", content), name)
        ignore = labels.pop(IGNORE, None)
        background = labels.pop(BACKGROUND, (0,))
        if background != (0,):
            raise PluginError(
                f"Label system {name}: the background must be 0, not {_shown(background)}."
            )
        if ignore is not None and len(ignore) != 1:
            raise PluginError(
                f"Label system {name}: {IGNORE!r} must be one value, not {_shown(ignore)}."
            )
        if not labels:
            raise PluginError(
                f"Label system {name} has no classes. Expected a table of names and label values."
            )
        _check_values(labels, ignore, name, may_overlap="regions_class_order" in content)
        groups = _groups(content.get("groups", {}), labels, name)
        return cls(name, {**labels, **groups}, ignore[0] if ignore else None)

    # --- looking up

    def find(self, name: str) -> tuple[int, ...] | None:
        """Return the label values of a class, made up of smaller ones where need be; None if it is
        not in the system."""
        known = canonical_name(name)
        if known in self.classes:
            return self.classes[known]
        for parts in published_facts()["compositions"].get(known, ()):
            found = [self.find(part) for part in parts]
            if all(found):
                return tuple(sorted({value for values in found for value in values or ()}))
        return None

    def values_of(self, name: str) -> tuple[int, ...]:
        """Like :meth:`find`, but raise PluginError where the class is not in the system."""
        found = self.find(name)
        if found is None:
            raise PluginError(
                f"Label system {self.name} has no class {name!r}; its classes are:"
                f" {_listed(self.classes)}."
            )
        return found

    @property
    def values(self) -> frozenset[int]:
        """All label values, the background's and the ignore label's included."""
        values = {0} | {value for values in self.classes.values() for value in values}
        return frozenset(values if self.ignore is None else values | {self.ignore})

    def check(self, present: Iterable[int], where: str) -> None:
        """Raise PluginError if an image holds label values that the system does not know.

        Args:
            present: the values in the image.
            where: what to call it.
        """
        unknown = sorted({int(value) for value in present} - self.values)
        if unknown:
            raise PluginError(
                f"{where} holds the label{'s' if len(unknown) > 1 else ''} {_shown(unknown)}, which"
                f" {self.name} does not have (0 to {max(self.values)}). Is it another label system?"
            )

    def mask(self, labels: np.ndarray, name: str) -> np.ndarray:
        """Return where an array of label values shows a class, as booleans of the same shape."""
        values = self.values_of(name)
        return labels == values[0] if len(values) == 1 else np.isin(labels, values)

    def overlapping(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Return the pairs of classes that share label values, so that one array cannot show
        both."""
        sets = {name: set(self.values_of(name)) for name in names}
        return [(one, other) for one, other in combinations(sets, 2) if sets[one] & sets[other]]

    def without_counterpart(self, classes: Iterable[str]) -> list[str]:
        """Return the system's classes that have label values which none of the given classes
        covers."""
        covered = {value for name in classes for value in self.find(name) or ()}
        return [name for name, values in self.classes.items() if not covered.issuperset(values)]


def shared_classes(systems: Sequence[LabelSystem]) -> list[str]:
    """Return the classes that all systems have, made up of smaller ones where need be, in the order
    of the systems.

    A class counts if at least one system lists it: two systems with both kidneys apart share
        ``kidney_left`` and
    ``kidney_right``, but not ``kidney``; with a third one that only knows ``kidney``, all three
    share ``kidney`` alone.
    """
    listed = dict.fromkeys(name for system in systems for name in system.classes)
    return [name for name in listed if all(system.find(name) is not None for system in systems)]


def map_labels(
    labels: np.ndarray, source: LabelSystem, target: LabelSystem, unmatched: int = 0
) -> np.ndarray:
    """Translate an array of label values from one system to another.

    Args:
        labels: whole numbers, any shape.
        source, target: what the values mean, and what they shall mean. Classes of the target with
            several values (groups) are not written, their parts are.
        unmatched: the value for classes that the target does not have.

    Returns:
        An array of the same shape, uint8 or uint16; the source's ignore label becomes the target's.

    Raises:
        PluginError: values that the source does not have, classes of the target that overlap in the
            source, or an ignore label that the target has not.
    """
    writable = {
        name: values[0]
        for name, values in target.classes.items()
        if len(values) == 1 and source.find(name)
    }
    overlaps = source.overlapping(writable)
    if overlaps:
        one, other = overlaps[0]
        raise PluginError(
            f"{source.name} cannot be mapped to {target.name}: {one!r} and {other!r} share labels"
            " there, and a voxel has one label. Leave one of them out of the target."
        )
    source.check(np.unique(labels), f"An image with labels of {source.name}")
    table = np.full(
        max(source.values) + 1,
        unmatched,
        dtype=np.uint8 if max(*target.values, unmatched) < 256 else np.uint16,
    )
    table[0] = 0
    if source.ignore is not None:
        if target.ignore is None and np.any(labels == source.ignore):
            raise PluginError(
                f"{source.name} has an ignore label and {target.name} has none. Add {IGNORE!r} to"
                " its labels."
            )
        table[source.ignore] = target.ignore or 0
    for name, value in writable.items():
        table[list(source.values_of(name))] = value
    mapped: np.ndarray = table[labels.astype(np.int64, copy=False)]
    return mapped


# --- names and where systems come from


def canonical_name(name: str) -> str:
    """Return the name that a class is known by: lower case, underscores, the side at the end, no
    synonyms. Letters of every script and signs that carry meaning (``<``, ``+``) stay."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    # Separators, controls and punctuation part words.
    spaced = [" " if unicodedata.category(sign)[0] in "ZCP" else sign for sign in folded]
    words = "".join(spaced).split()
    if len(words) > 1 and words[0] in SIDES:
        words = [*words[1:], words[0]]
    plain = "_".join(words)
    return _synonyms().get(plain, plain)


def published_systems() -> list[str]:
    """Return the names of the label systems that come with the package."""
    return list(published_facts()["systems"])


@lru_cache(maxsize=1)
def published_classes() -> frozenset[str]:
    """Return the canonical names of all classes that the published systems know, with those made up
    of smaller ones."""
    facts = published_facts()
    systems = [LabelSystem.from_table(table, name) for name, table in facts["systems"].items()]
    return frozenset(
        {name for system in systems for name in system.classes} | set(facts["compositions"])
    )


def load_label_system(source: str | Path) -> LabelSystem:
    """Return a label system by its published name, or from a file.

    Args:
        source: a name out of :func:`published_systems` (case, hyphens and underscores do not
            matter), a JSON or YAML file, or a folder with a ``dataset.json`` (an nnU-Net dataset or
            model).

    Raises:
        PluginError: no such name or file, or not a label system.
    """
    systems: dict[str, Any] = published_facts()["systems"]
    known = {_plain(name): name for name in systems}
    if isinstance(source, str) and _plain(source) in known:
        name = known[_plain(source)]
        return LabelSystem.from_table(systems[name], name)
    path = Path(source)
    file = path / "dataset.json" if path.is_dir() else path
    if not file.is_file():
        raise PluginError(
            f"{source} is neither a published label system nor a file, nor a folder with a"
            f" dataset.json. Published ones are: {', '.join(systems)}."
        )
    table = read_table(file)
    check_labels_file(table, str(file))
    return LabelSystem.from_table(table, path.name if path.is_dir() else file.stem)


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]+", "", name.casefold())


def _synonyms() -> dict[str, str]:
    synonyms: dict[str, str] = published_facts()["synonyms"]
    return synonyms


def _named_values(labels: Any, system: str) -> dict[str, tuple[int, ...]]:
    """Read the entry ``labels`` in any of its forms."""
    if is_list(labels):
        labels = {name: value for value, name in enumerate(labels, 1)}
    if not isinstance(labels, Mapping):
        raise PluginError(
            f"Label system {system}: labels must be a table of names and label values, not"
            f" {type(labels).__name__}."
        )
    if (
        labels
        and all(str(key).isdigit() for key in labels)
        and not any(map(is_integer, labels.values()))
    ):
        labels = {name: int(key) for key, name in labels.items()}
    named: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        values = value if is_list(value) else [value]
        if (
            not isinstance(name, str)
            or not values
            or not all(is_integer(one) and 0 <= one <= MAX_VALUE for one in values)
        ):
            raise PluginError(
                f"Label system {system}: {name!r} must be a value of 0 to {MAX_VALUE}, or a list,"
                f" not {value!r}."
            )
        known = canonical_name(name)
        if not known:
            raise PluginError(f"Label system {system}: the class {name!r} has no name.")
        if known in named:
            raise PluginError(
                f"Label system {system}: the class {known!r} stands twice ({name!r} is another name"
                " of it)."
            )
        named[known] = tuple(sorted({int(one) for one in values}))
    return named


def _check_values(
    labels: Mapping[str, tuple[int, ...]],
    ignore: tuple[int, ...] | None,
    system: str,
    may_overlap: bool,
) -> None:
    for name, values in labels.items():
        if 0 in values:
            raise PluginError(
                f"Label system {system}: {name!r} has the value 0, which is the background's."
            )
        if ignore is not None and ignore[0] in values:
            raise PluginError(
                f"Label system {system}: {name!r} has the value {ignore[0]}, which is the ignore"
                " label's."
            )
    if may_overlap:
        return
    owner: dict[int, str] = {}
    for name, values in labels.items():
        for value in values:
            if value in owner:
                raise PluginError(
                    f"Label system {system}: {owner[value]!r} and {name!r} overlap in label"
                    f' {value}. Give every label once, and classes made of several under "groups":'
                    ' {"kidney": ["kidney_left", "kidney_right"]}.'
                )
            owner[value] = name


def _groups(
    groups: Any, labels: Mapping[str, tuple[int, ...]], system: str
) -> dict[str, tuple[int, ...]]:
    if not isinstance(groups, Mapping):
        raise PluginError(
            f"Label system {system}: groups must be a table of names and lists of labels, not"
            f" {groups!r}."
        )
    made: dict[str, tuple[int, ...]] = {}
    for name, members in groups.items():
        known = canonical_name(str(name))
        if known in labels or known in made:
            raise PluginError(
                f"Label system {system}: the group {name!r} has the name of another class."
            )
        if not is_list(members) or not members:
            raise PluginError(
                f"Label system {system}: the group {name!r} must list names of labels, not"
                f" {members!r}."
            )
        missing = [str(member) for member in members if canonical_name(str(member)) not in labels]
        if missing:
            raise PluginError(
                f"Label system {system}: the group {name!r} names {', '.join(missing)}, which is no"
                f" label; there are {_listed(labels)}."
            )
        made[known] = tuple(
            sorted({value for member in members for value in labels[canonical_name(str(member))]})
        )
    return made


def _listed(names: Iterable[str], most: int = 30) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (
        f" and {len(listed) - most} more" if len(listed) > most else ""
    )


def _shown(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def check_regions(table: Mapping[str, Any], where: str) -> None:
    """Raise a PluginError if a model's ``regions_class_order`` makes it write values that do not
    mean its regions: then its label maps cannot be read by its own ``dataset.json``."""
    order = table.get("regions_class_order")
    if order is None:
        return
    regions = {
        name: set(values if isinstance(values, (list, tuple)) else [values])
        for name, values in table["labels"].items()
        if name != "ignore" and values not in (0, [0])
    }
    names = list(regions)
    fits = isinstance(order, (list, tuple)) and len(order) == len(names)
    for number, (name, value) in enumerate(zip(names, order if fits else (), strict=False)):
        later = [other for other in names[number + 1 :] if value in regions[other]]
        if value not in regions[name] or later:
            fits = False
    if not fits:
        raise PluginError(
            f"{where}: regions_class_order {order} does not fit its regions {table['labels']}. Each"
            " value must be one of its region's, and of no later region's: what the model writes"
            " cannot be read otherwise. Correct its dataset.json and train again."
        )
