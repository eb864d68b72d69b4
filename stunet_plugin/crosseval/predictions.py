"""Predictions of every model on every case; what is there and still right is not made again.

Beside each prediction is a record with the hashes of the checkpoints, the plans, the image and the
prediction itself, and the settings. A prediction counts only with a record that agrees in all of
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from stunet_plugin.crosseval.comparison import PREDICTIONS, Comparison, Pair
from stunet_plugin.crosseval.models import Model
from stunet_plugin.datasets.raw_dataset import Case
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import sha256_of, write_atomically
from stunet_plugin.utils.image_files import hash_of_image

if TYPE_CHECKING:
    from stunet_plugin.inference.predictor import Model as TrainedModel


def read_record(path: Path) -> dict[str, Any]:
    """Return a record, or nothing where there is none or half of one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def find_missing(
    comparison: Comparison, cases: Sequence[tuple[Pair, Case]]
) -> dict[Pair, dict[Case, dict[str, Any]]]:
    """Return the cases of models whose predictions are missing or no longer right, and what each
    prediction is made from."""
    setup, out = comparison.setup, comparison.setup.output / PREDICTIONS
    # Each file is hashed once, however many pairs it belongs to.
    identity, hash_once = cache(_identity), cache(hash_of_image)
    wanted: dict[Pair, dict[Case, dict[str, Any]]] = {}
    for pair, case in cases:
        if not isinstance(pair.model, Model):
            continue
        key = {**identity(pair.model), "images": [hash_once(image) for image in case.images]}
        record = read_record(pair.file(out, case))
        file = pair.prediction(setup.output, case)
        files = {"prediction": file}
        if setup.calibration:
            files["confidence"] = pair.confidence(setup.output, case)
        same = record.get("made_from") == key and all(map(Path.is_file, files.values()))
        if not same or any(record.get(x) != hash_of_image(file) for x, file in files.items()):
            wanted.setdefault(pair, {})[case] = key
    return wanted


def predict_missing(comparison: Comparison) -> None:
    """Make the predictions of this part that are missing or no longer right, one model after the
    other; raise PluginError for a model or an image that cannot be used, before any prediction is
    made."""
    setup, out = comparison.setup, comparison.setup.output / PREDICTIONS
    cases = [(pair, case) for pair, case in comparison.own_cases if isinstance(pair.model, Model)]
    if not cases:
        return
    wanted = find_missing(comparison, cases)
    total, missing = len(cases), sum(map(len, wanted.values()))
    print(f"Predictions: {total - missing} of {total} are there.", flush=True)
    by_model = [(model, list(pairs)) for model, pairs in groupby(wanted, lambda pair: pair.model)]
    for model, pairs in by_model:
        with loaded(model, setup.device) as trained:
            trained.check([case.images for pair in pairs for case in wanted[pair]])
    with tqdm(total=missing, desc="Predicting", unit="case", disable=not missing) as bar:
        for model, pairs in by_model:
            with loaded(model, setup.device) as trained:
                for pair in pairs:
                    bar.set_postfix_str(" on ".join(pair.names))
                    ending = pair.dataset.ending
                    files = {pair.file(out, x, ending): x.images for x in wanted[pair]}
                    next(iter(files)).parent.mkdir(parents=True, exist_ok=True)
                    confidences = None
                    if setup.calibration:
                        confidences = pair.confidence(setup.output, next(iter(wanted[pair]))).parent
                        confidences.mkdir(parents=True, exist_ok=True)
                    written = trained.predict_files(files, setup.processes, confidences)
                    for file, (case, key) in zip(written, wanted[pair].items(), strict=True):
                        record = {"made_from": key, "prediction": hash_of_image(file)}
                        if confidences:
                            record["confidence"] = hash_of_image(confidences / file.name)
                        write_atomically(pair.file(out, case), json.dumps(record, indent=1))
                        bar.update()


@contextmanager
def loaded(model: Model, device: str) -> Iterator[TrainedModel]:
    """Load a model; a PluginError on it, or on images that it reads meanwhile, says its name."""
    # Heavy, and not needed where all predictions are there.
    from stunet_plugin.inference.predictor import Model as TrainedModel

    try:
        yield TrainedModel(
            model.folder, model.folds, model.checkpoint, model.step_size, model.mirroring, device
        )
    except PluginError as error:
        raise PluginError(f"Model {model.name}: {error}") from error


def _identity(model: Model) -> dict[str, Any]:
    """Return what a prediction depends on beside the image; reads the checkpoints through."""
    files = (*model.checkpoints, model.folder / "plans.json", model.folder / "dataset.json")
    return {
        "model": [sha256_of(file) for file in files],
        "folds": list(model.folds),
        "mirroring": model.mirroring,
        "step_size": model.step_size,
    }
