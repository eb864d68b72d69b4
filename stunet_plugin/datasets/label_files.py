"""Reading label systems: the published ones of the package, and tables of users in JSON or YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.utils.validation import is_integer, is_list

DATA_FILE, STUNET_FILE = "label_systems.json", "published_stunet.json"
MAX_BYTES = 16 << 20
"""Tables that people write take a few kB; a dataset.json that lists its cases more."""
LABEL_ENTRIES = ("name", "labels", "groups", "regions_class_order", "source", "note")
"""Of a file of labels; the last two are for people."""
DATASET_ENTRIES = ("channel_names", "modality", "file_ending", "numTraining")
"""What tells nnU-Net's ``dataset.json`` from a file of labels."""
YAML_ENDINGS = (".yaml", ".yml")


@lru_cache(maxsize=1)
def published_facts() -> dict[str, Any]:
    """Return the content of the data file, and under ``synonyms`` its aliases turned round: other
    name to class."""
    folder = files("stunet_plugin").joinpath("data")
    content: dict[str, Any] = json.loads(folder.joinpath(DATA_FILE).read_text())
    content["synonyms"] = {
        other: name for name, others in content["aliases"].items() for other in others
    }
    # The order of the published weights is kept where the import of them needs it.
    stunet = json.loads(folder.joinpath(STUNET_FILE).read_text())
    content["systems"]["STU-Net"] = {"source": stunet["about"], "labels": stunet["labels"][1:]}
    return content


def read_table(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a table.

    Raises:
        PluginError: missing, too large, damaged, or no table.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PluginError(
                f"{path} is refused: it is too large for such a table, {path.stat().st_size} bytes."
            )
        text = path.read_text(encoding="utf-8")
        content = _parse_yaml(text) if path.suffix.lower() in YAML_ENDINGS else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, PluginError):
            raise
        raise PluginError(
            f"{path} cannot be read ({error}). Expected a table in JSON, or in YAML if it ends in"
            " .yaml."
        ) from error
    if not isinstance(content, dict):
        raise PluginError(
            f"{path} holds a {type(content).__name__}, not a table of names and values."
        )
    return content


def check_entries(table: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    """Raise PluginError if a table has entries that there are not: the first of them, all that
    there are, and the nearest."""
    unknown = sorted(str(key) for key in table if key not in allowed)
    if unknown:
        hint = did_you_mean(unknown[0], allowed)
        raise PluginError(
            f"{where}: unknown entry {unknown[0]!r}; there are {', '.join(allowed)}.{hint}"
        )


def check_labels_file(table: Mapping[str, Any], where: str) -> None:
    """Raise PluginError if a file of labels has an entry that means nothing; a ``dataset.json`` of
    nnU-Net may have any."""
    if any(key in table for key in DATASET_ENTRIES):
        return
    if "labels" in table:
        check_entries(table, LABEL_ENTRIES, where)
        return
    # Without it, the file is the table of classes itself, and these cannot be classes.
    odd = {
        key: value
        for key, value in table.items()
        if isinstance(value, Mapping) or (is_list(value) and not all(map(is_integer, value)))
    }
    check_entries(odd, LABEL_ENTRIES, where)
    if odd:
        raise PluginError(
            f"{where}: there is {next(iter(odd))!r}, but no entry 'labels', a table of names and"
            " label values."
        )


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
