"""Predictions of every model on every case; what is there and still right is not made again.

Beside each prediction is a record with the hashes of the checkpoints, the plans, the image and the
prediction itself, and the settings. A prediction counts only with a record that agrees in all of
them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from stunet_plugin.crosseval.comparison import Pair
from stunet_plugin.crosseval.inputs import Case, Model, folder_name
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import sha256_of, write_atomically
from stunet_plugin.utils.image_files import TIFF, hash_of_image

if TYPE_CHECKING:
    from stunet_plugin.inference.predictor import Model as TrainedModel

PREDICTIONS = "predictions"
RECORD_ENDING = ".json"


@dataclass(frozen=True)
class Place:
    """Where the predictions of a model on a dataset go."""

    folder: Path
    ending: str

    @classmethod
    def of(cls, out: Path, pair: Pair) -> Place:
        folders = (folder_name(pair.model.name), folder_name(pair.dataset.name))
        return cls(out.joinpath(PREDICTIONS, *folders), pair.dataset.ending)

    def file(self, case: Case) -> Path:
        return self.folder / f"{case.name}{self.ending}"

    def record(self, case: Case) -> Path:
        # The .json of a .tif is its spacing.
        ending = ".record.json" if self.ending in TIFF else RECORD_ENDING
        return self.folder / f"{case.name}{ending}"


def read_record(path: Path) -> dict[str, Any]:
    """Return a record, or nothing where there is none or half of one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def load_model(model: Model, device: str) -> TrainedModel:
    """Return a model ready to predict.

    Raises:
        PluginError: it cannot be used.
    """
    # Heavy, and not needed where all predictions are there.
    from stunet_plugin.inference.predictor import Model as TrainedModel

    try:
        return TrainedModel(
            model.folder, model.folds, model.checkpoint, model.step_size, model.mirroring, device
        )
    except PluginError as error:
        raise PluginError(f"Model {model.name}: {error}") from error


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
    pairs = [pair for pair in pairs if pair.classes]
    # Each file is hashed once, however many pairs it belongs to.
    identities = {model: _identity(model) for model in {pair.model: None for pair in pairs}}
    cases = {case: None for pair in pairs for case in pair.dataset.cases}
    images = {case: [hash_of_image(image) for image in case.images] for case in cases}
    wanted: dict[Pair, dict[Case, dict[str, Any]]] = {}
    for pair in pairs:
        place = Place.of(out, pair)
        for case in pair.dataset.cases:
            key = {**identities[pair.model], "images": images[case]}
            if not _is_done(place, case, key):
                wanted.setdefault(pair, {})[case] = key
    total = sum(len(pair.dataset.cases) for pair in pairs)
    missing = sum(map(len, wanted.values()))
    print(f"Predictions: {total - missing} of {total} are there.", flush=True)
    if not wanted:
        return
    models = {pair.model: None for pair in wanted}
    for model in models:
        check_model(model, [pair for pair in wanted if pair.model is model], device, wanted)
    with tqdm(total=missing, desc="Predicting", unit="case") as bar:
        for model in models:
            trained = load_model(model, device)
            for pair, keys in wanted.items():
                if pair.model is model:
                    bar.set_postfix_str(f"{model.name} on {pair.dataset.name}")
                    place = Place.of(out, pair)
                    place.folder.mkdir(parents=True, exist_ok=True)
                    files = {place.file(case): case.images for case in keys}
                    written = trained.predict_files(files, place.ending, processes)
                    for file, (case, key) in zip(written, keys.items(), strict=True):
                        record = {"made_from": key, "prediction": hash_of_image(file)}
                        write_atomically(place.record(case), json.dumps(record, indent=1))
                        bar.update()


def check_model(
    model: Model, pairs: Sequence[Pair], device: str, wanted: dict[Pair, Any] | None = None
) -> None:
    """Load a model, and read through the images that it is to predict.

    Args:
        model: of these pairs.
        pairs: whose images are read.
        device: see :func:`predict_missing`.
        wanted: cases of each pair; None takes all.

    Raises:
        PluginError: the model cannot be used, or images that its reader does not take.
    """
    trained = load_model(model, device)
    for pair in pairs:
        cases = pair.dataset.cases if wanted is None else wanted[pair]
        try:
            trained.check([case.images for case in cases])
        except PluginError as error:
            raise PluginError(
                f"Model {model.name} cannot read images of dataset {pair.dataset.name}:\n{error}"
            ) from error


def _identity(model: Model) -> dict[str, Any]:
    """Return what a prediction depends on beside the image; reads the checkpoints through."""
    files = (*model.checkpoints, model.folder / "plans.json", model.folder / "dataset.json")
    return {
        "model": [sha256_of(file) for file in files],
        "folds": list(model.folds),
        "mirroring": model.mirroring,
        "step_size": model.step_size,
    }


def _is_done(place: Place, case: Case, key: dict[str, Any]) -> bool:
    record, file = read_record(place.record(case)), place.file(case)
    if record.get("made_from") != key or not file.is_file():
        return False
    return bool(record.get("prediction") == hash_of_image(file))
