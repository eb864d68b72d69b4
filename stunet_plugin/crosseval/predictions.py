"""Predictions of every model on every case; what is there and still right is not made again.

Beside each prediction is a record with the hashes of the checkpoints, the plans, the image and the
prediction itself, and the settings. A prediction counts only with a record that agrees in all of
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from stunet_plugin.crosseval.comparison import Pair
from stunet_plugin.crosseval.inputs import Case, Model, folder_name
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import sha256_of, write_atomically
from stunet_plugin.utils.image_files import hash_of_image

if TYPE_CHECKING:
    from stunet_plugin.inference.predictor import Model as TrainedModel

PREDICTIONS = "predictions"


def prediction_file(out: Path, pair: Pair, case: Case) -> Path:
    """Return where the prediction of a case goes in the output folder."""
    folders = (folder_name(pair.model.name), folder_name(pair.dataset.name))
    return out.joinpath(PREDICTIONS, *folders, f"{case.name}{pair.dataset.ending}")


def record_file(out: Path, pair: Pair, case: Case) -> Path:
    """Return where the record of a prediction is."""
    return prediction_file(out, pair, case).with_name(f"{case.name}.json")


def read_record(path: Path) -> dict[str, Any]:
    """Return a record, or nothing where there is none or half of one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def predict_missing(pairs: Sequence[Pair], out: Path, device: str, processes: int) -> None:
    """Make the predictions that are missing or no longer right, one model after the other.

    Args:
        pairs: those of one model one after the other.
        out: output folder of the run.
        device: ``cpu``, ``cuda`` or ``mps``.
        processes: for the preprocessing; with 1, in this process.

    Raises:
        PluginError: a model cannot be used, or an image is damaged; before any prediction is made.
    """
    # Each file is hashed once, however many pairs it belongs to.
    identities = {model: _identity(model) for model in {x.model: 0 for x in pairs if x.classes}}
    cases = {case: 0 for pair in pairs for case in pair.scored_cases}
    images = {case: [hash_of_image(image) for image in case.images] for case in cases}
    wanted: dict[Model, dict[Pair, dict[Case, dict[str, Any]]]] = {}
    for pair in pairs:
        for case in pair.scored_cases:
            key = {**identities[pair.model], "images": images[case]}
            record = read_record(record_file(out, pair, case))
            file = prediction_file(out, pair, case)
            same = record.get("made_from") == key and file.is_file()
            if not same or record.get("prediction") != hash_of_image(file):
                wanted.setdefault(pair.model, {}).setdefault(pair, {})[case] = key
    total = sum(len(pair.scored_cases) for pair in pairs)
    missing = sum(len(keys) for of_model in wanted.values() for keys in of_model.values())
    print(f"Predictions: {total - missing} of {total} are there.", flush=True)
    for model, of_model in wanted.items():
        check_model(model, of_model, device)
    with tqdm(total=missing, desc="Predicting", unit="case", disable=not missing) as bar:
        for model, of_model in wanted.items():
            trained = load_model(model, device)
            for pair, keys in of_model.items():
                bar.set_postfix_str(f"{model.name} on {pair.dataset.name}")
                files = {prediction_file(out, pair, case): case.images for case in keys}
                next(iter(files)).parent.mkdir(parents=True, exist_ok=True)
                written = trained.predict_files(files, pair.dataset.ending, processes)
                for file, (case, key) in zip(written, keys.items(), strict=True):
                    record = {"made_from": key, "prediction": hash_of_image(file)}
                    write_atomically(record_file(out, pair, case), json.dumps(record, indent=1))
                    bar.update()


def check_model(model: Model, cases: Mapping[Pair, Iterable[Case]], device: str) -> None:
    """Load a model, and read through the images that it is to predict.

    Raises:
        PluginError: the model cannot be used, or images that its reader does not take.
    """
    trained = load_model(model, device)
    for pair, its_cases in cases.items():
        try:
            trained.check([case.images for case in its_cases])
        except PluginError as error:
            raise PluginError(
                f"Model {model.name} cannot read images of dataset {pair.dataset.name}:\n{error}"
            ) from error


def load_model(model: Model, device: str) -> TrainedModel:
    # Heavy, and not needed where all predictions are there.
    from stunet_plugin.inference.predictor import Model as TrainedModel

    try:
        return TrainedModel(
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
