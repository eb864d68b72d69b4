"""Heads by name: which outputs of a pretrained model mean a class of the new dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.label_systems import BACKGROUND, LabelSystem, canonical_name
from stunet_plugin.weights.pretrained import VOLUME_FUSION_ENTRY

PLACEHOLDER = re.compile(r"class_\d+")
"""Names that ``stunet import`` gives to outputs without names."""


@dataclass(frozen=True)
class Outputs:
    """What the outputs of a network mean.

    Attributes:
        names: of each output, canonical; with labels (softmax) the first is the background.
        values: label values of each output.
        regions: whether the outputs are regions, which may overlap (a sigmoid each).
        system: the classes, groups included.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    regions: bool
    system: LabelSystem

    @classmethod
    def of(cls, dataset: Mapping[str, Any], where: str) -> Outputs:
        """Take them from the content of a ``dataset.json``; raise PluginError if a class stands
        twice in it or nnU-Net does not take the labels."""
        kept = ("labels", "regions_class_order")
        entries = {key: dataset[key] for key in kept if dataset.get(key) is not None}
        system = LabelSystem.from_table(entries, where)
        try:
            manager = LabelManager(entries["labels"], entries.get("regions_class_order"))
        except Exception as error:  # it has several
            reason = last_line(error)
            raise PluginError(f"nnU-Net cannot use the labels {where} ({reason}).") from error
        if manager.has_regions:
            return cls(tuple(system.classes), tuple(system.classes.values()), True, system)
        single = {values[0]: name for name, values in system.classes.items() if len(values) == 1}
        values = tuple(int(value) for value in manager.all_labels)
        names = [BACKGROUND, *(single[value] for value in values[1:])]
        return cls(tuple(names), tuple((value,) for value in values), False, system)

    def find(self, name: str) -> tuple[int, ...]:
        """Return the outputs that together are a class, none if there are none."""
        wanted = () if PLACEHOLDER.fullmatch(name) else self.system.find(name) or ()
        if self.regions:
            return tuple(x for x, values in enumerate(self.values) if values == wanted)[:1]
        return tuple(x for x, (value,) in enumerate(self.values) if value in wanted)


@dataclass(frozen=True)
class Row:
    """Outputs of the pretrained model whose weights an output starts from.

    Attributes:
        outputs: their mean is taken; of none (a background beside regions) it is zero.
        minus: output to subtract, which makes a sigmoid's logit of two of a softmax.
        exact: whether it means the very same, so that nothing is left to fit.
    """

    outputs: tuple[int, ...]
    minus: int | None = None
    exact: bool = True

    def take(self, tensor: Tensor) -> Tensor:
        """Return the weights of this output from those of all (output, ...)."""
        row = tensor[list(self.outputs)].mean(0) if self.outputs else torch.zeros_like(tensor[0])
        return row if self.minus is None else row - tensor[self.minus]


def match(source: Outputs, target: Outputs) -> dict[int, Row]:
    """Return for outputs of the new dataset what the pretrained model has of the same class.

    The background is the same only where the new dataset has all classes of the model; otherwise it
    holds some of them, and is a start for the fit.
    """
    minus = 0 if target.regions and not source.regions else None
    rows = {}
    for output, name in enumerate(target.names):
        found = source.find(name) if target.regions or output else ()
        if found:
            rows[output] = Row(found, minus, exact=len(found) == 1)
    if rows and not target.regions:
        known = [target.names[output] for output in rows]
        complete = not source.system.without_counterpart(known)
        rows[0] = Row(() if source.regions else (0,), exact=complete)
    return dict(sorted(rows.items()))


def source_outputs(checkpoint: Mapping[str, Any], file: str) -> Outputs | None:
    """Return what the outputs of a checkpoint of nnU-Net v2 mean: by the ``dataset.json`` in it, or
    beside its fold; None if neither is there, or it was pretrained with Volume Fusion."""
    dataset = (checkpoint.get("init_args") or {}).get("dataset_json")
    beside = Path(file).absolute().parent.parent / "dataset.json"
    where = f"in {file}"
    if not isinstance(dataset, Mapping):
        if not beside.is_file():
            return None
        dataset, where = read_json(beside), f"in {beside}"
    if VOLUME_FUSION_ENTRY in dataset or "labels" not in dataset:
        return None
    return Outputs.of(dataset, where)


def describe_rows(rows: Mapping[int, Row], source: Outputs, target: Outputs) -> str:
    """Return the classes that are taken over, and what they are called in the model if they are
    called otherwise."""
    texts = []
    for output, row in rows.items():
        own, theirs = target.names[output], [source.names[x] for x in row.outputs]
        same = [canonical_name(own)] == theirs
        texts.append(own if same or not theirs else f"{own} (mean of {' and '.join(theirs)})")
    return ", ".join(texts)


def have_heads(weights: Mapping[str, Tensor], like: Mapping[str, Tensor], outputs: int) -> bool:
    """Return whether weights have heads with that many outputs, otherwise like these."""
    return all(
        name in weights
        and weights[name].shape[1:] == tensor.shape[1:]
        and (weights[name].shape == tensor.shape or len(weights[name]) == outputs)
        for name, tensor in like.items()
    )
