"""Entries of a comparison, of its file and its options: which there are, and what fits in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.utils import label_systems
from stunet_plugin.utils.validation import is_list, is_number

SHARED, PAIR = "shared", "pair"
PARTS = ("Tr", "Ts")
"""Of a raw dataset: imagesTr with labelsTr, imagesTs with labelsTs."""
OWN_LABELS = "dataset.json"
"""Where labels come from that nobody names."""
ORIGIN = ("folder", "part", "images", "references")

Entry = Mapping[str, Any]


def entries_of(listed: Sequence[Entry], given: Sequence[str], flag: str) -> list[Entry]:
    """Return the entries of the file and those of the options."""
    read = entry_of_references if flag == "--references" else entry_from_option
    return [*listed, *(read(option, flag) for option in given)]


def check_names(entries: Sequence[Entry], kind: str) -> None:
    """Raise PluginError if two entries would have one folder for their results."""
    names = [str(entry.get("name")) for entry in entries]
    folders = [folder_of(name).casefold() for name in names]
    twice = [name for name, x in zip(names, folders, strict=True) if folders.count(x) > 1]
    if twice:
        raise PluginError(
            f"Two {kind}s are called {twice[0]!r} and {twice[1]!r}, and their results would go"
            " into one folder. Give each a name of its own; capitals do not count, nor a space"
            " for an underscore."
        )


def folder_of(name: str) -> str:
    """Return what the folder of a model's or a dataset's files is called."""
    return name.replace(" ", "_")


def entry_from_option(option: str, flag: str) -> dict[str, Any]:
    """Read ``NAME=FOLDER,key=value,...``; values are true, false, numbers or text. A dataset of two
    folders has no FOLDER."""
    first, *others = (part.partition("=") for part in option.split(","))
    name, equals, folder = first
    entry = {"name": name, **({"folder": folder} if equals else {})}
    entry |= {key: _value(value) for key, _, value in others}
    whole = folder if equals else {"images", "references"} & set(entry)
    if not name or not whole or not all(sign for _, sign, _ in others):
        raise PluginError(
            f"{flag} {option}: expected NAME=FOLDER, and after commas KEY=VALUE. The name is yours,"
            f" for the tables: {flag} mine=FOLDER."
        )
    return entry


def entry_of_references(option: str, flag: str) -> dict[str, Any]:
    """Read ``FOLDER,key=value,...`` or ``NAME=FOLDER,...``: a dataset without images, called after
    its folder where nobody names it."""
    first, comma, others = option.partition(",")
    if "=" not in first:
        first = f"{Path(first).absolute().name}={first}"
    entry = entry_from_option(first + comma + others, flag)
    return {"references" if key == "folder" else key: value for key, value in entry.items()}


def _value(text: str) -> Any:
    if re.fullmatch(r"\d+(\+\d+)+", text):
        return text.split("+")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_tolerance(value: Any) -> bool:
    return is_number(value) and value >= 0


SETUP_ENTRIES = (
    *("models", "predictions", "datasets", "output"),
    *("classes", "tolerances", "default_tolerance", "sliced", "lesions", "resample", "calibration"),
)
PREDICTIONS_ENTRIES = ("name", "folder", "labels")
DATASET_ENTRIES = ("name", *ORIGIN, "labels")
MODEL_ENTRIES = ("name", "folder", "fold", "checkpoint", "mirroring", "step_size", "labels")
_TABLES = (
    lambda x: _are(x, lambda entry: isinstance(entry, Mapping)),
    "a list of tables, each with name and folder",
)
_SWITCH = (lambda x: isinstance(x, bool), "true or false")
FITS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "models": _TABLES,
    "predictions": _TABLES,
    "datasets": _TABLES,
    "classes": (
        lambda x: x in (SHARED, PAIR) or (_are(x, lambda name: isinstance(name, str)) and x),
        f"{SHARED!r}, {PAIR!r} or a list of names",
    ),
    "tolerances": (
        lambda x: isinstance(x, Mapping) and all(map(_is_tolerance, x.values())),
        "a table of classes and millimetres",
    ),
    "default_tolerance": (_is_tolerance, "a number of millimetres of at least 0"),
    "sliced": _SWITCH,
    "lesions": (lambda x: _are(x, lambda name: isinstance(name, str)), "a list of names"),
    "resample": _SWITCH,
    "calibration": _SWITCH,
    "name": (
        lambda x: isinstance(x, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.+-]*", x),
        "letters, digits, spaces and _.+-, a letter or digit first",
    ),
    "fold": (
        lambda x: _are(listed(x), lambda fold: re.fullmatch(r"\d+|all", str(fold))) and x != [],
        "a number, a list of them, or 'all'",
    ),
    "mirroring": _SWITCH,
    "step_size": (lambda x: is_number(x) and 0 < x <= 1, "a number above 0 and at most 1"),
    "part": (lambda x: x in PARTS, "Tr or Ts, as in imagesTs"),
}
"""By entry, what tells that a value fits, and what a message says that it must be."""


def check(table: Mapping[str, Any], entries: Sequence[str], where: str) -> None:
    """Raise PluginError if a table has an entry that there is not, or a value that does not fit."""
    label_systems.check_entries(table, entries, where)
    for key, value in table.items():
        fits, wanted = FITS.get(key, (lambda _: True, ""))
        if not fits(value):
            raise PluginError(f"{where}: {key} must be {wanted}, not {value!r}.")


def _are(values: Any, fits: Callable[[Any], Any]) -> bool:
    return is_list(values) and all(map(fits, values))


def listed(value: Any) -> Any:
    return value if is_list(value) else [value]
