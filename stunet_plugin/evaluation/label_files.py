"""Reading label systems: the published ones of the package, and tables of users in JSON or YAML."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError

DATA_FILE, STUNET_FILE = "label_systems.json", "published_stunet.json"
MAX_BYTES = 16 << 20
"""Tables that people write take a few kB; a dataset.json that lists its cases more."""
YAML_ENDINGS = (".yaml", ".yml")


@lru_cache(maxsize=1)
def published_facts() -> dict[str, Any]:
    """Return the content of the data file, and under ``synonyms`` its aliases turned round: other name to class."""
    folder = files("stunet_plugin").joinpath("data")
    content: dict[str, Any] = json.loads(folder.joinpath(DATA_FILE).read_text())
    content["synonyms"] = {other: name for name, others in content["aliases"].items() for other in others}
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
            raise PluginError(f"{path} is refused: it is too large for such a table, {path.stat().st_size} bytes.")
        text = path.read_text(encoding="utf-8")
        content = _parse_yaml(text) if path.suffix.lower() in YAML_ENDINGS else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, PluginError):
            raise
        raise PluginError(f"{path} cannot be read ({error}). Expected a table in JSON, or in YAML if it ends in .yaml.") from error
    if not isinstance(content, dict):
        raise PluginError(f"{path} holds a {type(content).__name__}, not a table of names and values.")
    return content


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
