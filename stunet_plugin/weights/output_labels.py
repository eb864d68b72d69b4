"""Labels of a network's outputs, as ``dataset.json`` has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import is_integer, is_list
from stunet_plugin.weights.identify import NetworkWeights
from stunet_plugin.weights.locate import Source, published_facts
from stunet_plugin.weights.source_plan import SourcePlan

BACKGROUND = "background"
_MAX_VALUE = 2**16 - 1  # predictions are written with 16 bits


def choose_labels(
    source: Source,
    weights: NetworkWeights,
    plan: SourcePlan | None,
    given: Sequence[str] | None = None,
) -> tuple[dict[str, Any], str]:
    """Return ``labels`` (and ``regions_class_order``, if there are regions), and where they come
    from: ``--labels``, the checkpoint, the published order, or numbers."""
    names = [BACKGROUND, *(f"class_{value}" for value in range(1, weights.outputs))]
    origin = "numbered, as the source has no names; give them with --labels"
    if given and len(given) == 1:
        origin = Path(given[0]).name
        return _from_file(read_json(Path(given[0])), origin), origin
    if given:
        names, origin = list(given), "--labels"
    elif dataset := weights.training_argument("dataset_json", dict):
        origin = f"dataset_json in {source.checkpoint.name}"
        return _from_dataset(dataset, origin), origin
    elif plan and plan.published:
        names, origin = published_facts()["labels"], "the published label order"
    return _from_names(names, origin), origin


def check_labels(labels: dict[str, Any], origin: str, outputs: int) -> None:
    """Raise unless nnU-Net gives a network for these labels exactly so many outputs."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    try:
        manager = LabelManager(labels["labels"], labels.get("regions_class_order"))
        heads = manager.num_segmentation_heads
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise PluginError(f"Labels ({origin}): nnU-Net does not take them: {error}") from error
    if heads != outputs:
        raise PluginError(
            f"The weights have {outputs} outputs, background included, but the labels ({origin})"
            f" are {heads}. Name all outputs in their order: --labels {BACKGROUND} NAME NAME ..."
            " (or a JSON file)."
        )
    if not manager.has_regions and list(map(int, manager.all_labels)) != list(range(outputs)):
        raise PluginError(f"Labels ({origin}): values must be 0 to {outputs - 1} without gaps.")


def _from_names(names: Sequence[Any], origin: str) -> dict[str, Any]:
    """Take names in the order of the outputs."""
    twice = [name for name in names if names.count(name) > 1 or not name.strip()]
    if names[0] != BACKGROUND or twice:
        raise PluginError(
            f"Labels ({origin}) must start with output 0, {BACKGROUND!r}, and every output needs"
            f" its own name. Change {[*twice, names[0]][0]!r}."
        )
    return {"labels": {name: value for value, name in enumerate(names)}}


def _from_file(content: dict[str, Any], origin: str) -> dict[str, Any]:
    """Take a ``dataset.json``, a table {name: value}, or one {"0": name, "1": name, ...}."""
    if "labels" in content:
        return _from_dataset(content, origin)
    if not content or not all(name.isdigit() for name in content):
        return _from_dataset({"labels": content}, origin)
    ordered = [content.get(str(value)) for value in range(len(content))]
    if not all(isinstance(name, str) for name in ordered):
        raise PluginError(f"{origin}: expected names for the values 0 to {len(content) - 1}.")
    return _from_names(ordered, origin)


def _from_dataset(dataset: dict[str, Any], origin: str) -> dict[str, Any]:
    labels, order = dataset.get("labels"), dataset.get("regions_class_order")
    table = labels if isinstance(labels, dict) else {}
    ordered = order is None or (is_list(order) and all(map(is_integer, order)))
    if not table or not all(map(_is_entry, table.items())) or not ordered:
        raise PluginError(
            f"{origin}: labels must be a table of names and label values (or lists of them, for"
            " regions), and regions_class_order a list of label values."
        )
    values = {
        name: [int(one) for one in value] if is_list(value) else int(value)
        for name, value in table.items()
    }
    regions = {} if order is None else {"regions_class_order": [int(value) for value in order]}
    return {"labels": values, **regions}


def _is_entry(entry: tuple[object, Any]) -> bool:
    name, value = entry
    values = value if is_list(value) else [value]
    fits = bool(values) and all(is_integer(one) and 0 <= one <= _MAX_VALUE for one in values)
    return fits and isinstance(name, str) and name != ""
