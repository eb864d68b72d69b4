"""Label systems: which label value means which class, and how two of them meet.

A class is known by its canonical name (``IVC`` is ``inferior_vena_cava``). It may have several
label values (a group, or a region of nnU-Net), and may be made up of smaller ones: a system with
both kidneys apart has ``kidney``, too. Published systems are in ``data/label_systems.json``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError, did_you_mean, few, last_line
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import is_integer, is_list

BACKGROUND, IGNORE = "background", "ignore"
"""Names that nnU-Net's ``dataset.json`` reserves."""
MAX_VALUE = 2**16 - 1
"""nnU-Net writes segmentations with 16 bits at most."""
SIDES = ("left", "right")
LABEL_ENTRIES = ("name", "labels", "groups", "regions_class_order", "source", "note")
"""Of a file of labels; the last two are for people."""
DATASET_ENTRIES = ("channel_names", "modality", "file_ending", "numTraining")
"""What tells nnU-Net's ``dataset.json`` from a file of labels."""


@dataclass(frozen=True)
class LabelSystem:
    """Classes of a dataset or a model: canonical name to its label values (sorted, never 0), groups
    and regions included; and nnU-Net's ignore label, None if there is none."""

    name: str
    classes: Mapping[str, tuple[int, ...]]
    ignore: int | None = None

    @classmethod
    def numbered(cls, name: str, classes: Sequence[str], ignore: bool = False) -> LabelSystem:
        """Give classes the values 1, 2, ..., and the next one to "ignore" if that is asked for."""
        names = [*classes, IGNORE] if ignore else classes
        return cls.from_table({"labels": names}, name)

    @classmethod
    def from_table(cls, content: Mapping[str, Any], name: str) -> LabelSystem:
        """Take a label system in the form of nnU-Net's ``dataset.json``.

        ``labels`` is a table of names and values (or lists of values), or of values and names, or a
        list of names with the values 1, 2, ...; ``groups``, if given, a table of names and the
        names of labels that make them up. Classes may share values only as groups do, or with
        nnU-Net's ``regions_class_order``; PluginError otherwise.
        """
        name = str(content.get("name", name)) if "labels" in content else name
        where = f"Label system {name}"
        labels = _named_values(content.get("labels", content), where)
        ignore, background = labels.pop(IGNORE, None), labels.pop(BACKGROUND, (0,))
        if background != (0,):
            raise PluginError(f"{where}: the background must be 0, not {background}.")
        if ignore is not None and len(ignore) != 1:
            raise PluginError(f"{where}: {IGNORE!r} must be one value, not {ignore}.")
        if not labels:
            raise PluginError(f"{where} has no classes. Give a table of names and label values.")
        owners = {0: BACKGROUND, **dict.fromkeys(ignore or (), IGNORE)}
        for label, values in labels.items():
            for value in values:
                if value in owners:
                    raise PluginError(
                        f"{where}: {owners[value]!r} and {label!r} overlap in label {value}. Give"
                        ' every label once, and classes made of several under "groups": {"kidney":'
                        ' ["kidney_left", "kidney_right"]}.'
                    )
            if "regions_class_order" not in content:
                owners |= dict.fromkeys(values, label)
        groups = _groups(content.get("groups", {}), labels, where)
        return cls(name, {**labels, **groups}, ignore[0] if ignore else None)

    def find(self, name: str) -> tuple[int, ...] | None:
        """Return the label values of a class, made up of smaller ones where need be, or None."""
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
            known = few(list(self.classes), 30)
            raise PluginError(f"{self.name} has no class {name!r}; its classes are: {known}.")
        return found

    @property
    def values(self) -> frozenset[int]:
        """All label values, the background's and the ignore label's included."""
        values = {0, *(value for values in self.classes.values() for value in values)}
        return frozenset(values if self.ignore is None else values | {self.ignore})

    def mask(self, labels: np.ndarray, name: str) -> np.ndarray:
        """Return where an array of label values shows a class."""
        values = self.values_of(name)
        return labels == values[0] if len(values) == 1 else np.isin(labels, values)

    def without_counterpart(self, classes: Iterable[str]) -> list[str]:
        """Return the system's classes with label values that none of the given ones covers."""
        covered = {value for name in classes for value in self.find(name) or ()}
        return [name for name, values in self.classes.items() if not covered.issuperset(values)]


def shared_classes(systems: Sequence[LabelSystem]) -> list[str]:
    """Return the classes that all systems have and one lists, made up of smaller ones where need
    be, in the order of the systems."""
    listed = dict.fromkeys(name for system in systems for name in system.classes)
    return [name for name in listed if all(system.find(name) is not None for system in systems)]


def canonical_name(name: str) -> str:
    """Return the name that a class is known by: lower case, underscores, the side at the end, no
    synonyms. Letters of every script and signs that carry meaning (``<``, ``+``) stay."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    # Separators, controls and punctuation part words; ER- is not ER, and #1 not 1.
    parts = [unicodedata.category(sign)[0] in "ZCP" and sign != "#" for sign in folded]
    words = "".join(" " if x else sign for x, sign in zip(parts, folded, strict=True)).split()
    if words and folded.rstrip().endswith("-"):
        words[-1] += "-"
    if len(words) > 1 and words[0] in SIDES:
        words = [*words[1:], words[0]]
    plain = "_".join(words)
    return str(published_facts()["synonyms"].get(plain, plain))


@lru_cache(maxsize=1)
def published_facts() -> dict[str, Any]:
    """Return the content of the data file, and under ``synonyms`` its aliases turned round: other
    name to class."""
    folder = files("stunet_plugin").joinpath("data")
    content: dict[str, Any] = json.loads(
        folder.joinpath("label_systems.json").read_text(encoding="utf-8")
    )
    content["synonyms"] = {x: name for name, others in content["aliases"].items() for x in others}
    # The order of the published weights is kept where the import of them needs it.
    stunet = json.loads(folder.joinpath("published_stunet.json").read_text(encoding="utf-8"))
    content["systems"]["STU-Net"] = {"source": stunet["about"], "labels": stunet["labels"][1:]}
    return content


@lru_cache(maxsize=1)
def published_classes() -> frozenset[str]:
    """Return the canonical names of all classes of the published systems."""
    facts = published_facts()
    systems = [LabelSystem.from_table(table, name) for name, table in facts["systems"].items()]
    return frozenset(facts["compositions"]).union(*(system.classes for system in systems))


def load_label_system(source: str | Path) -> LabelSystem:
    """Return a label system by its published name (case, hyphens and underscores do not matter),
    from a JSON or YAML file, or from a folder with a ``dataset.json``; raise PluginError if there
    is none."""
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
    _check_labels_file(table, str(file))
    return LabelSystem.from_table(table, path.name if path.is_dir() else file.stem)


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]+", "", name.casefold())


def read_table(path: Path) -> dict[str, Any]:
    """Read a JSON file, or a YAML one by its ending; raise PluginError if it holds no table."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return read_json(path)
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PluginError(f"{path} cannot be read as YAML ({last_line(error)}).") from error
    if not isinstance(content, dict):
        raise PluginError(f"{path} holds a {type(content).__name__}, not a table.")
    return content


def check_entries(entries: Iterable[Any], allowed: Sequence[str], where: str) -> None:
    """Raise PluginError if a table has entries that there are not."""
    unknown = sorted(str(key) for key in entries if key not in allowed)
    if unknown:
        told = f"unknown entry {unknown[0]!r}; there are {', '.join(allowed)}."
        raise PluginError(f"{where}: {told}{did_you_mean(unknown[0], allowed)}")


def _check_labels_file(table: Mapping[str, Any], where: str) -> None:
    """Raise PluginError if a file of labels has an entry that means nothing; a ``dataset.json`` of
    nnU-Net may have any."""
    if any(key in table for key in DATASET_ENTRIES):
        return
    # Without 'labels', the file is the table of classes itself, and these cannot be classes.
    entries = [
        key
        for key, value in table.items()
        if "labels" in table
        or isinstance(value, Mapping)
        or (is_list(value) and not all(map(is_integer, value)))
    ]
    check_entries(entries, LABEL_ENTRIES, where)
    if entries and "labels" not in table:
        raise PluginError(f"{where}: there is {entries[0]!r}, but no entry 'labels'.")


def _named_values(labels: Any, where: str) -> dict[str, tuple[int, ...]]:
    """Read the entry ``labels`` in any of its forms."""
    pairs: Iterable[tuple[Any, Any]]
    if is_list(labels):
        pairs = [(name, value) for value, name in enumerate(labels, 1)]
    elif not isinstance(labels, Mapping):
        raise PluginError(f"{where}: labels must be a table of names and values, not {labels!r}.")
    elif all(str(x).isdigit() for x in labels) and not any(map(is_integer, labels.values())):
        pairs = [(name, int(value)) for value, name in labels.items()]
    else:
        pairs = labels.items()
    named: dict[str, tuple[int, ...]] = {}
    for name, value in pairs:
        values = value if is_list(value) else [value]
        right = bool(values) and all(is_integer(one) and 0 <= one <= MAX_VALUE for one in values)
        if not isinstance(name, str) or not right:
            allowed = f"a value of 0 to {MAX_VALUE}, or a list"
            raise PluginError(f"{where}: {name!r} must be {allowed}, not {value!r}.")
        known = canonical_name(name)
        if not known or known in named:
            what = f"is {known!r}, which stands twice" if known else "has no name"
            raise PluginError(f"{where}: the class {name!r} {what}. Give each its own.")
        named[known] = tuple(sorted({int(one) for one in values}))
    return named


def _groups(
    groups: Any, labels: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, tuple[int, ...]]:
    if not isinstance(groups, Mapping):
        raise PluginError(f"{where}: groups must be a table of lists of labels, not {groups!r}.")
    made: dict[str, tuple[int, ...]] = {}
    for name, members in groups.items():
        known = canonical_name(str(name))
        if known in labels or known in made:
            raise PluginError(f"{where}: the group {name!r} has the name of another class.")
        parts = [canonical_name(str(member)) for member in members] if is_list(members) else []
        if not parts or not set(parts) <= set(labels):
            there = few(list(labels), 30)
            raise PluginError(f"{where}: the group {name!r} must list labels ({there}).")
        made[known] = tuple(sorted({value for part in parts for value in labels[part]}))
    return made


def check_regions(table: Mapping[str, Any], where: str) -> None:
    """Raise a PluginError if a model's ``regions_class_order`` makes it write values that do not
    mean its regions: then its label maps cannot be read by its own ``dataset.json``."""
    order = table.get("regions_class_order")
    if order is None:
        return
    regions = [
        set(values if isinstance(values, (list, tuple)) else [values])
        for name, values in table["labels"].items()
        if name != IGNORE and values not in (0, [0])
    ]
    # Later regions are written over earlier ones.
    allowed = [one.difference(*regions[number:]) for number, one in enumerate(regions, 1)]
    if (
        not is_list(order)
        or len(order) != len(regions)
        or not all(value in region for value, region in zip(order, allowed, strict=True))
    ):
        raise PluginError(
            f"{where}: regions_class_order {order} does not fit {table['labels']}: each value must"
            " be one of its region's, of no later one's. Correct dataset.json and train again."
        )
