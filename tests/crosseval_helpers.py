"""Small cases and models for the tests of `stunet crosseval`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stunet_plugin.cli import main

from dataset_helpers import write_array
from import_helpers import make_network, published_weights, write_v1

Run = Callable[..., str]
"""The command: returns what it says, or its error where one is expected."""
SHAPE = (10, 14, 12)
KIDNEYS = {"background": 0, "kidney": 1, "spleen": 2, "bone": 3}


def write_cases(
    images: Path, references: Path, values: tuple[int, int, int], seed: int, channel: str = "_0000"
) -> None:
    """Three cases with a box of each label in noise."""
    rng = np.random.default_rng(seed)
    for number in range(3):
        labels = np.zeros(SHAPE, np.uint8)
        for place, value in enumerate(values):
            labels[2:8, 2:12, 1 + 4 * place : 4 + 4 * place] = value
        image = (labels * 20 + rng.normal(0, 9, SHAPE)).astype(np.float32)
        write_array(images / f"case{number}{channel}.nii.gz", image)
        write_array(references / f"case{number}.nii.gz", labels)


def make_model(folder: Path, name: str, labels: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    weights = published_weights(make_network(outputs=len(labels)))
    source = write_v1(folder / f"{name}.model", weights)
    assert main(["import", str(source), "--out", str(folder / name), "--labels", *labels]) == 0


def setup_file(subjects: Path, tmp_path: Path, **changes: Any) -> Path:
    """A file of both models and datasets."""
    how = {"mirroring": False, "step_size": 1}
    folders = {key: str(subjects / "flare" / key) for key in ("images", "references")}
    content = {
        "models": [{"name": x, "folder": str(subjects / x), **how} for x in ("apart", "joint")],
        "datasets": [
            {"name": "Own", "folder": str(subjects / "raw")},
            {"name": "FLARE", "labels": "FLARE22", **folders},
        ],
        **changes,
    }
    path = tmp_path / "setup.json"
    path.write_text(json.dumps(content))
    return path


def rows_of(out: Path) -> dict[tuple[str, ...], str]:
    with (out / "scores.csv").open() as file:
        keys = ("model", "dataset", "case", "class", "measure")
        return {tuple(row[key] for key in keys): row["value"] for row in csv.DictReader(file)}
