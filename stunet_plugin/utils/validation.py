"""Taking values out of plans that nobody vouches for: each is checked for type and size where it is
read."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from stunet_plugin.errors import PluginError, did_you_mean

MAX_ENTRIES = 10_000
"""No list in a plan that is read here has more entries."""


class Fields:
    """A dict of a file, which messages call ``where`` (for example ``base_ep4k.model.pkl``). Every
    getter raises PluginError where a value without a default is missing, or is not what it must be.
    """

    _REQUIRED = object()

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise PluginError(f"{where} is a {kind}, not a table of names and values.")
        self.values, self.where = values, where

    def __contains__(self, key: object) -> bool:
        return key in self.values

    def get(self, key: Any, default: Any = _REQUIRED) -> Any:
        if key in self.values:
            return self.values[key]
        if default is Fields._REQUIRED:
            names = ", ".join(str(name) for name in list(self.values)[:12])
            raise PluginError(f"{self.where} has no {key!r}; its entries are: {names or 'none'}.")
        return default

    def fields(self, key: Any, default: Any = _REQUIRED) -> Fields:
        return Fields(self.get(key, default), f"{self.where}, {key}")

    def wrong(self, key: Any, expected: str) -> PluginError:
        given = reprlib.repr(self.values.get(key))
        return PluginError(f"{self.where}: {key} must be {expected}, not {given}.")

    def _checked(self, key: Any, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self.get(key, default)
        if not fits(value):
            raise self.wrong(key, expected)
        return value

    def integer(self, key: Any, minimum: int, default: Any = _REQUIRED) -> int:
        expected = f"a whole number of at least {minimum}"
        return int(self._checked(key, default, lambda x: is_integer(x) and x >= minimum, expected))

    def boolean(self, key: Any, default: Any = _REQUIRED) -> bool:
        return bool(self._checked(key, default, lambda x: isinstance(x, int), "true or false"))

    def choice(self, key: Any, allowed: Collection[str], default: Any = _REQUIRED) -> str:
        def fits(value: Any) -> bool:
            return isinstance(value, str) and value in allowed

        return str(self._checked(key, default, fits, f"one of {', '.join(allowed)}"))

    def text(self, key: Any) -> str:
        return str(self._checked(key, Fields._REQUIRED, _is_name, "text"))

    def number(self, key: Any, default: Any = _REQUIRED) -> float:
        return float(self._checked(key, default, is_number, "a finite number"))

    def positives(
        self, key: Any, count: int, whole: bool, default: Any = _REQUIRED
    ) -> tuple[Any, ...]:
        """Return ``count`` positive numbers, whole ones as int."""
        kind = is_integer if whole else is_number

        def fits(value: Any) -> bool:
            return is_list(value) and len(value) == count and all(kind(x) and x > 0 for x in value)

        expected = f"{count} positive {'whole ' if whole else ''}numbers"
        values = self._checked(key, default, fits, expected)
        return tuple(int(x) if whole else float(x) for x in values)

    def strides(self, key: Any, axes: int) -> tuple[tuple[int, ...], ...]:
        value = self.get(key)
        rows = [{key: row} for row in value] if is_list(value) else []
        if not rows:
            raise self.wrong(key, f"a list with {axes} whole numbers for each pooling")
        return tuple(Fields(row, self.where).positives(key, axes, whole=True) for row in rows)

    def integers(self, key: Any, maximum: int, default: Any = _REQUIRED) -> tuple[int, ...]:
        """Return rising integers from 0 to ``maximum``."""

        def fits(value: Any) -> bool:
            whole = is_list(value) and all(map(is_integer, value))
            return whole and list(value) == sorted({x for x in value if 0 <= x <= maximum})

        expected = f"rising whole numbers from 0 to {maximum}"
        return tuple(map(int, self._checked(key, default, fits, expected)))

    def only(self, *known: str) -> None:
        """Raise if there is an entry of another name."""
        if unknown := [str(key) for key in self.values if key not in known]:
            raise PluginError(
                f"{self.where} has no setting {unknown[0]!r}.{did_you_mean(unknown[0], known)}"
                f" Settings: {', '.join(known)}."
            )

    def permutation(self, key: Any, axes: int, default: Any = _REQUIRED) -> tuple[int, ...]:
        order = list(range(axes))

        def fits(value: Any) -> bool:
            return is_list(value) and all(map(is_integer, value)) and sorted(value) == order

        return tuple(map(int, self._checked(key, default, fits, f"an order of the axes {order}")))

    def per_channel(self, key: Any, default: Any = _REQUIRED) -> dict[str, Any]:
        """Return a table by channel; v1 keys channels by number, JSON by text, v2 lists them."""
        value = self.get(key, default)
        if is_list(value):
            value = dict(enumerate(value))
        if not isinstance(value, Mapping) or not value or len(value) > MAX_ENTRIES:
            raise self.wrong(key, "one entry per channel")
        table = {str(channel): entry for channel, entry in value.items()}
        names = [str(channel) for channel in range(len(table))]
        if set(table) != set(names):
            raise self.wrong(key, "entries for the channels 0, 1, ...")
        return {name: table[name] for name in names}


def is_list(value: object) -> bool:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return False
    return len(value) <= MAX_ENTRIES


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_integer(value: Any) -> bool:
    # v1 plans hold sizes as floats at times (128.0).
    return is_number(value) and float(value).is_integer()


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def channel_names(description: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the channels of a ``dataset.json``; older ones call them modality."""
    names = description.get("channel_names", description.get("modality"))
    wanted = set(map(str, range(len(names)))) if isinstance(names, dict) else set()
    if not isinstance(names, dict) or not names or set(names) != wanted:
        turned = isinstance(names, dict) and names and set(map(str, names.values())) == wanted
        hint = " Here names and numbers are the wrong way round." if turned else ""
        wrong = f'channel_names must be {{"0": "CT"}} and so on, not {names!r}.{hint}'
        raise PluginError(f"{where}: {wrong}")
    return names
