"""Parts of a long job, for the jobs of an array on a cluster (``-num_parts``, ``-part_id``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from stunet_plugin.errors import PluginError

T = TypeVar("T")


def parts_of(items: Sequence[T], count: int, number: int) -> list[T]:
    """Return every ``count``-th item, from the ``number``-th (0 first) on."""
    check_part(count, number)
    return list(items[number::count])


def check_part(count: int, number: int) -> None:
    """Raise PluginError if there is no such part."""
    if count < 1 or not 0 <= number < count:
        raise PluginError(
            f"-num_parts {count} -part_id {number}: the part must be from 0 to {max(count, 1) - 1},"
            " of at least one."
        )
