"""Names of a network's outputs, in the order of the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import is_integer, is_list

BACKGROUND, IGNORE = "background", "ignore"
_MAX_NAME = 200
# Predictions are written with 16 bits.
_MAX_VALUE = 2**16 - 1


@dataclass(frozen=True)
class Labels:
    """The label part of a ``dataset.json``.

    Attributes:
        values: name to label value, or to the values of a region, the background first.
        regions_class_order: label value that each region is written as; None without regions.
        origin: where the names come from, for people.
    """

    values: Mapping[str, int | list[int]]
    regions_class_order: tuple[int, ...] | None
    origin: str

    @classmethod
    def from_names(cls, names: Sequence[str], origin: str) -> Labels:
        """Take the names in the order of the outputs, the background first.

        Raises:
            PluginError: the first is not the background, or a name stands twice.
        """
        if not names or names[0] != BACKGROUND:
            raise PluginError(
                f"Labels ({origin}) must start with output 0, {BACKGROUND!r}, not with"
                f" {names[0] if names else ''!r}."
            )
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise PluginError(
                f"Labels ({origin}): {twice!r} stands twice. Every output needs its own name."
            )
        return cls({name: value for value, name in enumerate(names)}, None, origin)

    @classmethod
    def numbered(cls, outputs: int) -> Labels:
        """Name the outputs by number, where nothing better is known."""
        names = [BACKGROUND, *(f"class_{value}" for value in range(1, outputs))]
        return cls.from_names(
            names, "numbered, as the source has no names; give them with --labels"
        )

    @classmethod
    def from_dataset(cls, dataset: Mapping[str, Any], origin: str) -> Labels:
        """Take ``labels`` and ``regions_class_order`` of a ``dataset.json``.

        Raises:
            PluginError: not what nnU-Net takes for labels.
        """
        labels = dataset.get("labels")
        if (
            not isinstance(labels, Mapping)
            or not labels
            or not all(_is_entry(name, value) for name, value in labels.items())
        ):
            raise PluginError(
                f"{origin}: labels must be a table of names and label values (or lists of them, for"
                " regions)."
            )
        order = dataset.get("regions_class_order")
        if order is not None and (not is_list(order) or not all(map(is_integer, order))):
            raise PluginError(f"{origin}: regions_class_order must be a list of label values.")
        values = {
            name: [int(one) for one in value] if is_list(value) else int(value)
            for name, value in labels.items()
        }
        return cls(values, tuple(map(int, order)) if order is not None else None, origin)

    @classmethod
    def from_option(cls, given: Sequence[str]) -> Labels:
        """Read ``--labels``: names in order, or one JSON file.

        The file is a ``dataset.json``, a table {name: value}, or one {"0": name, "1": name, ...}.
        """
        if len(given) != 1:
            return cls.from_names(list(given), "--labels")
        path = Path(given[0])
        content = read_json(path)
        if "labels" in content:
            return cls.from_dataset(content, path.name)
        if content and all(str(name).isdigit() for name in content):
            ordered = [content.get(str(value)) for value in range(len(content))]
            if not all(isinstance(name, str) and 0 < len(name) <= _MAX_NAME for name in ordered):
                raise PluginError(f"{path}: expected names for the values 0 to {len(content) - 1}.")
            return cls.from_names([str(name) for name in ordered], path.name)
        return cls.from_dataset({"labels": content}, path.name)

    @property
    def names(self) -> list[str]:
        return list(self.values)

    def check_outputs(self, outputs: int) -> None:
        """Raise unless nnU-Net gives a network for these labels exactly so many outputs."""
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        try:
            order = list(self.regions_class_order) if self.regions_class_order is not None else None
            manager = LabelManager(dict(self.values), order)
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
        if not manager.has_regions and [int(value) for value in manager.all_labels] != list(
            range(outputs)
        ):
            raise PluginError(
                f"Labels ({self.origin}): values must be 0 to {outputs - 1} without gaps."
            )

    def to_dataset(self) -> dict[str, Any]:
        """Return the entries for a ``dataset.json``."""
        order = (
            {}
            if self.regions_class_order is None
            else {"regions_class_order": list(self.regions_class_order)}
        )
        return {"labels": dict(self.values), **order}


def _is_entry(name: object, value: Any) -> bool:
    values = value if is_list(value) else [value]
    fits = bool(values) and all(is_integer(one) and 0 <= one <= _MAX_VALUE for one in values)
    return fits and isinstance(name, str) and 0 < len(name) <= _MAX_NAME
