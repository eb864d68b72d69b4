"""Predictions: every model on every case through nnU-Net's predictor, once; what is there and still
right is not made again.

Beside each prediction lies a record with the hashes of the checkpoints, the plans, the image and
the prediction itself, and the settings. A prediction counts only with a record that agrees in all
of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet_plugin.crosseval.comparison import Pair
from stunet_plugin.crosseval.inputs import Case, Dataset, Model, folder_name
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import sha256_of, write_atomically
from stunet_plugin.utils.images import check_image
from stunet_plugin.utils.progress import in_words

PREDICTIONS = "predictions"
PARTIAL = ".partial"
RECORD_ENDING = ".json"


@dataclass(frozen=True)
class Place:
    """Where the predictions of a model on a dataset go."""

    folder: Path
    ending: str

    @classmethod
    def of(cls, out: Path, pair: Pair) -> Place:
        return cls(
            out / PREDICTIONS / folder_name(pair.model.name) / folder_name(pair.dataset.name),
            pair.dataset.ending,
        )

    def file(self, case: Case) -> Path:
        return self.folder / f"{case.name}{self.ending}"

    def record(self, case: Case) -> Path:
        return self.folder / f"{case.name}{RECORD_ENDING}"


def read_record(path: Path) -> dict[str, Any]:
    """Return a record, or nothing where there is none or half of one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def model_identity(model: Model) -> dict[str, Any]:
    """Return what a prediction depends on beside the image; reads the checkpoints through."""
    files = (*model.checkpoints, model.folder / "plans.json", model.folder / "dataset.json")
    return {
        "model": [sha256_of(file) for file in files],
        "folds": list(model.folds),
        "mirroring": model.mirroring,
        "step_size": model.step_size,
    }


def predict_missing(pairs: Sequence[Pair], out: Path, device: str, processes: int) -> None:
    """Make the predictions that are missing or no longer right, one model after the other, each
    loaded once.

    Args:
        pairs: those of one model one after the other.
        out: output folder of the run.
        device: ``cpu``, ``cuda`` or ``mps``.
        processes: for the preprocessing; with 1, in this process.

    Raises:
        PluginError: an image is damaged; before any prediction is made.
    """
    wanted: list[tuple[Pair, Case, dict[str, Any]]] = []
    # Each file is read through once, however many pairs it belongs to.
    identities = {
        model: model_identity(model)
        for model in dict.fromkeys(pair.model for pair in pairs if pair.classes)
    }
    images = {case: [sha256_of(image) for image in case.images] for case in _cases(pairs)}
    for pair in pairs:
        for case in pair.dataset.cases if pair.classes else ():
            key = {**identities[pair.model], "images": images[case]}
            if not _is_done(Place.of(out, pair), case, key):
                wanted.append((pair, case, key))
    for image in dict.fromkeys(image for _, case, _ in wanted for image in case.images):
        check_image(image)
    total = sum(len(pair.dataset.cases) for pair in pairs if pair.classes)
    print(f"Predictions: {total - len(wanted)} of {total} are there.", flush=True)
    started, done = time.monotonic(), 0
    for model in dict.fromkeys(pair.model for pair, _, _ in wanted):
        predictor = load_predictor(model, device)
        for dataset in dict.fromkeys(pair.dataset for pair, _, _ in wanted if pair.model is model):
            tasks = [
                entry for entry in wanted if entry[0].model is model and entry[0].dataset is dataset
            ]
            place = Place.of(out, tasks[0][0])
            for case, key in _predict(
                predictor, dataset, [(case, key) for _, case, key in tasks], place, processes
            ):
                _record(place, case, key)
                done += 1
                left = (time.monotonic() - started) / done * (len(wanted) - done)
                estimate = f", about {in_words(left)} left" if done < len(wanted) else ""
                print(
                    f"  [{done}/{len(wanted)}] {model.name} on {dataset.name}:"
                    f" {case.name}{estimate}",
                    flush=True,
                )


def _cases(pairs: Sequence[Pair]) -> dict[Case, None]:
    """All cases that something is scored on, once each."""
    return {case: None for pair in pairs if pair.classes for case in pair.dataset.cases}


def load_predictor(model: Model, device: str) -> Any:
    """Return nnU-Net's predictor with a model's weights.

    Raises:
        PluginError: the model cannot be used.
    """
    # Heavy, and not needed where all predictions are there.
    from stunet_plugin.inference.predictor import Model as LoadedModel

    try:
        return LoadedModel(
            model.folder, model.folds, model.checkpoint, model.step_size, model.mirroring, device
        ).predictor
    except PluginError as error:
        raise PluginError(f"Model {model.name}: {error}") from error


def _predict(
    predictor: Any,
    dataset: Dataset,
    tasks: Sequence[tuple[Case, dict[str, Any]]],
    place: Place,
    processes: int,
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Predict cases and yield each when its file is complete and in place."""
    from nnunetv2.inference.export_prediction import export_prediction_from_logits

    place.folder.mkdir(parents=True, exist_ok=True)
    partial = place.folder / PARTIAL
    partial.mkdir(exist_ok=True)
    description = {**predictor.dataset_json, "file_ending": place.ending}
    prepared = _preprocessed(predictor, [case for case, _ in tasks], processes)
    try:
        for case, key in tasks:
            with _quiet():
                item = next(prepared)
                logits = predictor.predict_logits_from_preprocessed_data(item["data"]).cpu()
                managers = (predictor.configuration_manager, predictor.plans_manager)
                export_prediction_from_logits(
                    logits,
                    item["data_properties"],
                    *managers,
                    description,
                    str(partial / case.name),
                )
            os.replace(partial / f"{case.name}{place.ending}", place.file(case))
            yield case, key
    finally:
        for left in partial.iterdir():
            left.unlink()
        partial.rmdir()


def _preprocessed(
    predictor: Any, cases: Sequence[Case], processes: int
) -> Iterator[dict[str, Any]]:
    """Preprocess as nnU-Net does before prediction, in worker processes if there is more than
    one."""
    import torch

    managers = (predictor.plans_manager, predictor.dataset_json, predictor.configuration_manager)
    files = [[str(image) for image in case.images] for case in cases]
    if processes > 1:
        from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles

        yield from preprocessing_iterator_fromfiles(
            files, None, None, *managers, processes, predictor.device.type == "cuda"
        )
        return
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    plans, dataset, configuration = managers
    for images in files:
        data, _, properties = preprocessor.run_case(images, None, plans, configuration, dataset)
        yield {"data": torch.from_numpy(data), "data_properties": properties}


def _is_done(place: Place, case: Case, key: dict[str, Any]) -> bool:
    record = read_record(place.record(case))
    file = place.file(case)
    return (
        record.get("made_from") == key
        and file.is_file()
        and record.get("prediction") == sha256_of(file)
    )


def _record(place: Place, case: Case, key: dict[str, Any]) -> None:
    write_atomically(
        place.record(case),
        json.dumps({"made_from": key, "prediction": sha256_of(place.file(case))}, indent=1),
    )


def fingerprint(content: Any) -> str:
    """Return a hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """nnU-Net prints several lines per case; ours says how far the run is."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
