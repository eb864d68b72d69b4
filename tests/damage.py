"""Damages of files, seeded: each must end in a sentence or the right result."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ODD_VALUES = [None, -1, 0, 10**9, 2.5, float("nan"), "", "text", "\0", "../../etc", True]
ODD_VALUES += [[], [1, [2]], ["a", None], {}, {"a": {}}, {"0": None}]


def damaged_files(path: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield kind and content of damaged copies of a file; ``cut`` and ``stream`` lose voxels,
    ``header`` changes one of the first 348 bytes, ``text`` and ``empty`` leave nothing.

    A .gz is damaged inside as well, and compressed again.
    """
    rng, whole = np.random.default_rng(0), path.read_bytes()
    compressed = path.name.endswith(".gz")
    inside = gzip.decompress(whole) if compressed else whole
    pack = (lambda x: gzip.compress(x, 1)) if compressed else bytes
    yield "empty", b""
    yield "text", b"<html><body>404 Not Found</body></html>\n" * 20
    yield "text", pack(b"not an image at all\n" * 40)
    for _ in range((count - 3) // 4):
        yield "cut", whole[: int(rng.integers(1, len(whole)))]
        yield "stream", pack(inside[: int(rng.integers(1, len(inside)))])
        for _ in range(2):
            changed = bytearray(inside)
            changed[int(rng.integers(min(348, len(inside))))] = int(rng.integers(256))
            yield "header", pack(changed)


def damaged_json(content: Any, count: int) -> Iterator[tuple[str, str]]:
    """Yield kind and text of damaged copies of a JSON file: an entry of it, however deep,
    replaced, removed or renamed, or the text cut off."""
    rng = np.random.default_rng(0)
    for number in range(count):
        kind = ("replaced", "removed", "renamed", "cut")[number % 4]
        changed = copy.deepcopy(content)
        places = list(_places(changed))
        holder, key = places[int(rng.integers(len(places)))]
        if kind == "removed":
            del holder[key]
        elif kind == "renamed" and isinstance(holder, dict):
            holder[f"{key} "] = holder.pop(key)
        elif kind != "cut":
            holder[key] = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
        text = json.dumps(changed)
        yield kind, text[: int(rng.integers(len(text)))] if kind == "cut" else text


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
