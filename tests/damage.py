"""Damages of files, seeded: each must end in a sentence or the right result."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def damaged_files(path: Path, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield kind and content of damaged copies of a file; ``cut`` and ``stream`` lose voxels,
    ``header`` changes one of the first 348 bytes, ``text`` and ``empty`` leave nothing.

    A .gz is damaged inside as well, and compressed again.
    """
    rng = np.random.default_rng(seed)
    whole = path.read_bytes()
    compressed = path.name.endswith(".gz")
    inside = gzip.decompress(whole) if compressed else whole
    pack = (lambda x: gzip.compress(x, 1)) if compressed else (lambda x: x)
    yield "empty", b""
    yield "text", b"<html><body>404 Not Found</body></html>\n" * 20
    yield "text", pack(b"not an image at all\n" * 40)
    for number in range(count - 3):
        kind = ("cut", "stream", "header", "header")[number % 4]
        if kind == "cut":
            yield kind, whole[: int(rng.integers(1, len(whole)))]
        elif kind == "stream":
            yield kind, pack(inside[: int(rng.integers(1, len(inside)))])
        else:
            changed = bytearray(inside)
            changed[int(rng.integers(min(348, len(inside))))] = int(rng.integers(256))
            yield kind, pack(bytes(changed))


ODD_VALUES: list[Any] = json.loads(
    """[null, -1, 0, 1000000000, 2.5, NaN, "", "text", "\\u0000", [], [1, [2]], {}, {"a": {}},
    true, "../../etc", ["a", null], {"0": null}]"""
)


def damaged_json(content: Any, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield kind and text of damaged copies of a JSON file: an entry of it, however deep,
    replaced, removed or renamed, or the text cut off."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        kind = ("replaced", "removed", "renamed", "cut")[number % 4]
        changed = copy.deepcopy(content)
        if kind == "cut":
            text = json.dumps(content)
            yield kind, text[: int(rng.integers(len(text)))]
            continue
        places = list(_places(changed))
        holder, key = places[int(rng.integers(len(places)))]
        if kind == "removed":
            del holder[key]
        elif kind == "renamed" and isinstance(holder, dict):
            holder[f"{key} "] = holder.pop(key)
        else:
            holder[key] = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
        yield kind, json.dumps(changed)


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(entries):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
