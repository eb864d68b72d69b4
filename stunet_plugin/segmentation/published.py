"""Published models by name: structures, size, source and licence of each. Imports nothing heavy.

The table is ``data/published_models.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.networks.presets import PRESETS, REFERENCE_OUTPUT_CHANNELS
from stunet_plugin.nnunet.names import DEFAULT_FOLD
from stunet_plugin.utils.files import home

TABLE = "published_models.json"


@dataclass(frozen=True)
class PublishedModel:
    """A model that can be had by name.

    Attributes:
        size: of STU-Net, which says how many parameters it has.
        structures: in the order of the outputs, without the background; none where that is not
            published, and then the model is not imported by its name.
        known_to_import: ``stunet import`` knows the structures by itself.
        source: ``hf://`` address of the checkpoint; None where it is only on a ``page``, as
            ``file`` there.
        plans: file with the plan beside the checkpoint, where its name is not the expected one.
        megabytes: of the download; None if that is not known.
    """

    name: str
    size: str
    modality: str
    trained_on: str
    dataset_name: str
    channels: int
    outputs: int
    structures: tuple[str, ...]
    licence: str
    citation: tuple[str, ...]
    known_to_import: bool = False
    source: str | None = None
    page: str | None = None
    file: str | None = None
    plans: str | None = None
    fold: str = DEFAULT_FOLD
    megabytes: float | None = None
    note: str = ""

    @property
    def parameters(self) -> int:
        """Of the network: those of its size, with heads for these outputs."""
        preset = PRESETS[self.size]
        per_output = sum(width + 1 for width in preset.features_per_stage[:-1])
        return preset.parameters + (self.outputs - REFERENCE_OUTPUT_CHANNELS) * per_output

    @property
    def folder(self) -> Path:
        """Where it is kept once it is here."""
        return models_folder() / self.name

    def import_options(self) -> list[str]:
        """Return the options of ``stunet import`` beside source and ``--out``."""
        options = ["--name", self.dataset_name]
        if self.fold != DEFAULT_FOLD:
            options += ["--fold", self.fold]
        if not self.known_to_import:
            options += ["--labels", "background", *self.structures]
        return options


def models_folder() -> Path:
    """Return the folder with a subfolder for each model that is here."""
    return home() / "models"


@cache
def published_models() -> dict[str, PublishedModel]:
    """Return all models by name."""
    models = [
        _read(f"{family}-{size}", size, {**facts, **own})
        for family, facts in _data(TABLE)["families"].items()
        for size, own in facts["sizes"].items()
    ]
    return {model.name: model for model in models}


def get_model(name: str) -> PublishedModel:
    """Return a model by name, whatever its capitals; PluginError if there is none."""
    models = published_models()
    if name.lower() in models:
        return models[name.lower()]
    raise PluginError(
        f"There is no published model {name!r}.{did_you_mean(name, models)} Published are:"
        f" {', '.join(models)}."
    )


def _read(name: str, size: str, facts: dict[str, Any]) -> PublishedModel:
    structures, citation = facts["structures"], tuple(facts["citation"])
    del facts["sizes"]
    if known := isinstance(structures, str):
        structures = _data(structures)["labels"][1:]
    changes = {"structures": tuple(structures), "citation": citation, "known_to_import": known}
    return PublishedModel(name, size, **{**facts, **changes})


def _data(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        files("stunet_plugin").joinpath("data", name).read_text(encoding="utf-8")
    )
    return content
