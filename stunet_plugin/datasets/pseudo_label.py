"""Pseudo-labels: a model's predictions on unlabelled images as a dataset to train on."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin import __version__
from stunet_plugin.datasets.confidence_filter import ConfidenceFilter, parse_rules, probability
from stunet_plugin.datasets.label_systems import LabelSystem, check_regions
from stunet_plugin.datasets.new_dataset import NewDataset, write_labels
from stunet_plugin.datasets.raw_dataset import find_raw, list_images
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Model
from stunet_plugin.nnunet.names import CONFIGURATION
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.files import read_json, sha256_of, write_atomically
from stunet_plugin.utils.progress import Progress

if TYPE_CHECKING:
    from stunet_plugin.commands.pseudo_label import PseudoLabel

PROVENANCE = "pseudo_labels.json"
KEPT_ENTRIES = (
    "channel_names",
    "modality",
    "regions_class_order",
    "overwrite_image_reader_writer",
    "file_ending",
)
"""Of the model's dataset.json, for that of the new dataset."""


def run_pseudo_label(options: PseudoLabel) -> int:
    """Predict, filter, and make the dataset; return 0, or 1 if a class is all but lost.

    Raises:
        PluginError: wrong input, or no case is left; the same command resumes where it stopped.
    """
    return _PseudoLabelling(options).run()


class _PseudoLabelling:
    """One run; the constructor checks everything but the images and writes nothing."""

    def __init__(self, options: PseudoLabel) -> None:
        self.options = options
        self.target = NewDataset(options.dataset_id, options.name, PROVENANCE, options.copy)
        self.min_share = probability(str(options.min_share), "--min-share")
        self.model = model = Model(
            Path(options.model),
            options.folds,
            options.checkpoint,
            options.step_size,
            options.mirroring,
            choose_device(options.device),
        )
        self.ending = str(model.dataset["file_ending"])
        where = f"the model {model.folder.name}"
        system = LabelSystem.from_table(model.dataset, where)
        check_regions(model.dataset, where)
        self.cases = find_images(options.images, self.ending, model.channels)
        below = options.ignore_below
        self.filter = ConfidenceFilter(
            system,
            max(system.values) + 1 if system.ignore is None else system.ignore,
            None if below is None else probability(str(below), "--ignore-below"),
            parse_rules(system, options.min_confidence, options.size),
            options.drop_cases,
        )
        self.settings: dict[str, Any] = {
            "command": "pseudo-label",
            "model": str(model.folder),
            "trainer": model.trainer,
            "plans": model.plans_name,
            "configuration": model.configuration,
            "folds": list(model.folds),
            "checkpoints": {file.parent.name: sha256_of(file) for file in model.files},
            "step_size": options.step_size,
            "mirroring": options.mirroring,
            **self.filter.to_json(),
            "copy": options.copy,
            "images": {case: list(map(_state, files)) for case, files in self.cases.items()},
        }

    def run(self) -> int:
        model, folds = self.model.folder.name, ", ".join(self.model.folds)
        if self.target.is_there(self.settings):
            return self._warn(read_json(self.target.folder / PROVENANCE)["cases"])
        print(f"{len(self.cases)} cases; {model}, fold(s) {folds}; into {self.target.folder}")
        print("Checking the images ...", flush=True)
        left = [case for case in self.cases if not self.target.record_of(case).is_file()]
        self.model.check(self.cases[case] for case in left)
        with self.target.begun(self.settings):
            progress = Progress(len(self.cases))
            progress.known = len(self.cases) - len(left)
            for case in left:
                progress.add(self._label(case, self.cases[case]))
            progress.end()
            records = {case: read_json(self.target.record_of(case)) for case in self.cases}
            kept = self._say(records)
            if not kept:
                shutil.rmtree(self.target.unfinished)
                raise PluginError(
                    "No case is left, so no dataset was made. Ask for less (--min-confidence,"
                    " --size)."
                )
            self.target.finish(self._description(kept), self._provenance(records))
        number = self.options.dataset_id
        self.target.say_written(
            "2d" if self.model.configuration == "2d" else CONFIGURATION,
            ", or join it with labelled cases:"
            f" stunet merge-datasets LABELLED {number} --train-only {number} -d ID",
        )
        return self._warn(records)

    def _label(self, case: str, images: tuple[Path, ...]) -> bool:
        """Predict one case and write what is kept of it, its record last; return whether it is
        kept."""
        prediction = self.model.predict(images)
        decision = self.filter.decide(prediction)
        if decision.labels is not None:
            self.target.add_images(case, images, self.ending)
            label = self.target.label_of(case, self.ending)
            write_labels(self.model.reader, decision.labels, prediction.properties, label)
        record = {
            "images": [str(image) for image in images],
            "left_out": decision.reason,
            "ignored": decision.ignored,
            "classes": decision.classes,
        }
        write_atomically(self.target.record_of(case), json.dumps(record))
        return decision.labels is not None

    def _say(self, records: Mapping[str, Mapping[str, Any]]) -> int:
        """Print what became of the cases; return how many are kept."""
        kept = [case for case, record in records.items() if not record["left_out"]]
        print(f"{len(kept)} of {len(records)} cases are kept.")
        for case, record in records.items():
            if record["left_out"]:
                print(f"  left out: {case}: {record['left_out']}")
        if self.filter.may_ignore and kept:
            share = sum(records[case]["ignored"] for case in kept) / len(kept)
            print(f"  ignored: {share:.1%} of their voxels")
        return len(kept)

    def _warn(self, records: Mapping[str, Mapping[str, Any]]) -> int:
        """Warn of classes that too few cases show; return the exit code."""
        kept = [record for record in records.values() if not record["left_out"]]
        lost = []
        for name in self.filter.system.classes:
            count = sum(record["classes"][name]["kept"] > 0 for record in kept)
            if not count or count < self.min_share * len(kept):
                lost.append(f"{name} in {count}")
        if not lost:
            return 0
        print(
            f"WARNING: classes that too few of the {len(kept)} cases show: {', '.join(lost)}. A"
            " network trained on them does not learn these. Does the model suit the images? Ask for"
            " less (--ignore-below, --min-confidence, --size), or accept it: --allow-missing",
            file=sys.stderr,
        )
        return 0 if self.options.allow_missing else 1

    def _description(self, cases: int) -> dict[str, Any]:
        dataset = self.model.dataset
        ignore = {"ignore": self.filter.ignore} if self.filter.may_ignore else {}
        return {
            **{key: dataset[key] for key in KEPT_ENTRIES if key in dataset},
            "labels": {**dataset["labels"], **ignore},
            "numTraining": cases,
            "name": self.target.folder.name,
            "description": (
                f"Predictions of {self.model.folder.name}, made a dataset by `stunet pseudo-label`."
                f" See {PROVENANCE}."
            ),
        }

    def _provenance(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            **{key: value for key, value in self.settings.items() if key != "images"},
            "stunet_plugin": __version__,
            "nnunetv2": host_version(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cases": records,
        }


def find_images(given: str, ending: str, channels: int) -> dict[str, tuple[Path, ...]]:
    """Return the images of each case: of a folder of them, or of a dataset in nnUNet_raw.

    Raises:
        PluginError: there are none of the model's kind.
    """
    path = Path(given).absolute()
    folder = path if path.is_dir() and not given.isdigit() else find_raw(given)
    folder = folder / "imagesTr" if (folder / "imagesTr").is_dir() else folder
    cases = list_images(folder, ending, channels)
    if not cases:
        others = sorted({"".join(Path(file).suffixes[-2:]) for file in os.listdir(folder)} - {""})
        there = f" (it has files that end in {', '.join(others[:5])})" if others else ""
        raise PluginError(
            f"-i {folder} has no images CASE_0000{ending}, which the model reads{there}. Name them"
            " so, and convert other formats."
        )
    return cases


def _state(file: Path) -> Sequence[Any]:
    """Return what tells whether an image is still the same."""
    state = file.stat()
    return [str(file), state.st_size, state.st_mtime_ns]
