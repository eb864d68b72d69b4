"""What a run compared, so that a reader of its report or summary alone knows: each model and each
dataset as a record."""

from __future__ import annotations

from typing import Any

from stunet_plugin.crosseval.inputs import Dataset, Model
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights.safe_loading import load_checkpoint


def describe_model(model: Model) -> dict[str, Any]:
    """Return where a model lies, what trained it, how it predicts and what it knows, as JSON has
    it.

    Trainer and configuration are those of the checkpoint: a folder may have been given another
        name.
    """
    checkpoint = load_checkpoint(model.checkpoints[0])
    arguments = checkpoint.get("init_args") or {}
    axes = checkpoint.get("inference_allowed_mirroring_axes") or ()
    return {
        "folder": str(model.folder),
        "trainer": str(checkpoint.get("trainer_name", "")),
        "plans": str(read_json(model.folder / "plans.json").get("plans_name", "")),
        "configuration": str(arguments.get("configuration", "")),
        "folds": list(model.folds),
        "checkpoint": model.checkpoint,
        "mirroring": model.mirroring,
        "mirroring_axes": [int(axis) for axis in axes] if model.mirroring else [],
        "step_size": model.step_size,
        "labels": model.labels.name,
        "labels_from": model.labels_from,
        "classes": list(model.labels.classes),
    }


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return where a dataset's cases lie, how many they are and what their labels are, as JSON has
    it."""
    return {
        **dataset.origin,
        "cases": len(dataset.cases),
        "labels": dataset.labels.name,
        "labels_from": dataset.labels_from,
        "classes": list(dataset.labels.classes),
    }
