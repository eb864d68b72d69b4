"""Names of a network's outputs, in the order of the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import is_integer, is_list
from stunet_plugin.weights.identify import NetworkWeights
from stunet_plugin.weights.locate import Source, published_facts
from stunet_plugin.weights.source_plan import SourcePlan

BACKGROUND = "background"
_MAX_NAME = 200
_MAX_VALUE = 2**16 - 1  # predictions are written with 16 bits


@dataclass(frozen=True)
class Labels:
    """The label part of a ``dataset.json``.

    Attributes:
        values: name to label value, or to the values of a region, the background first.
        regions_class_order: label value that each region is written as; None without regions.
        origin: where the names come from, for people.
    """

    values: Mapping[str, int | list[int]]
    regions_class_order: list[int] | None
    origin: str

    @classmethod
    def from_names(cls, names: Sequence[str], origin: str) -> Labels:
        """Take the names in the order of the outputs, the background first."""
        if not names or names[0] != BACKGROUND:
            raise PluginError(
                f"Labels ({origin}) must start with output 0, {BACKGROUND!r}, not with"
                f" {names[0] if names else ''!r}."
            )
        if twice := [name for name in names if names.count(name) > 1]:
            raise PluginError(
                f"Labels ({origin}): {twice[0]!r} stands twice. Every output needs its own name."
            )
        return cls({name: value for value, name in enumerate(names)}, None, origin)

    @classmethod
    def from_dataset(cls, dataset: Mapping[str, Any], origin: str) -> Labels:
        """Take ``labels`` and ``regions_class_order`` of a ``dataset.json``."""
        labels, order = dataset.get("labels"), dataset.get("regions_class_order")
        if not isinstance(labels, Mapping) or not labels or not all(map(_is_entry, labels.items())):
            raise PluginError(
                f"{origin}: labels must be a table of names and label values (or lists of them, for"
                " regions)."
            )
        if order is not None and (not is_list(order) or not all(map(is_integer, order))):
            raise PluginError(f"{origin}: regions_class_order must be a list of label values.")
        values = {
            name: [int(one) for one in value] if is_list(value) else int(value)
            for name, value in labels.items()
        }
        return cls(values, None if order is None else [int(value) for value in order], origin)

    @classmethod
    def from_option(cls, given: Sequence[str]) -> Labels:
        """Read ``--labels``: names in order, or one JSON file, which is a ``dataset.json``, a table
        {name: value}, or one {"0": name, "1": name, ...}."""
        if len(given) != 1:
            return cls.from_names(given, "--labels")
        path = Path(given[0])
        content = read_json(path)
        if "labels" in content:
            return cls.from_dataset(content, path.name)
        if not content or not all(name.isdigit() for name in content):
            return cls.from_dataset({"labels": content}, path.name)
        ordered = [content.get(str(value)) for value in range(len(content))]
        if not all(isinstance(name, str) and 0 < len(name) <= _MAX_NAME for name in ordered):
            raise PluginError(f"{path}: expected names for the values 0 to {len(content) - 1}.")
        return cls.from_names([str(name) for name in ordered], path.name)

    def check_outputs(self, outputs: int) -> None:
        """Raise unless nnU-Net gives a network for these labels exactly so many outputs."""
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        try:
            manager = LabelManager(dict(self.values), self.regions_class_order)
            heads = manager.num_segmentation_heads
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise PluginError(
                f"Labels ({self.origin}): nnU-Net does not take them: {error}"
            ) from error
        if heads != outputs:
            raise PluginError(
                f"The weights have {outputs} outputs, background included, but the labels"
                f" ({self.origin}) are {heads}. Name all outputs in their order: --labels"
                f" {BACKGROUND} NAME NAME ... (or a JSON file)."
            )
        if not manager.has_regions and list(map(int, manager.all_labels)) != list(range(outputs)):
            raise PluginError(
                f"Labels ({self.origin}): values must be 0 to {outputs - 1} without gaps."
            )

    def to_dataset(self) -> dict[str, Any]:
        """Return the entries for a ``dataset.json``."""
        order = self.regions_class_order
        regions = {} if order is None else {"regions_class_order": order}
        return {"labels": dict(self.values), **regions}


def choose_labels(
    source: Source, weights: NetworkWeights, plan: SourcePlan | None, given: Sequence[str] | None
) -> Labels:
    """Return the labels: ``--labels``, the checkpoint's own, the published ones, or numbers."""
    if given:
        return Labels.from_option(given)
    if dataset := weights.training_argument("dataset_json", dict):
        return Labels.from_dataset(dataset, f"dataset_json in {source.checkpoint.name}")
    if plan and plan.published:
        return Labels.from_names(published_facts()["labels"], "the published label order")
    names = [BACKGROUND, *(f"class_{value}" for value in range(1, weights.outputs))]
    return Labels.from_names(names, "numbered, as the source has no names; give them with --labels")


def _is_entry(entry: tuple[object, Any]) -> bool:
    name, value = entry
    values = value if is_list(value) else [value]
    fits = bool(values) and all(is_integer(one) and 0 <= one <= _MAX_VALUE for one in values)
    return fits and isinstance(name, str) and 0 < len(name) <= _MAX_NAME
