"""Pseudo-labels: a model's predictions on unlabelled images as a dataset to train on, through a
confidence filter."""

from __future__ import annotations

import contextlib
import json
import math
import operator
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from stunet_plugin import __version__
from stunet_plugin.datasets.new_dataset import NewDataset, write_labels
from stunet_plugin.datasets.raw_dataset import PSEUDO_LABELS, find_raw, list_images
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Model, Prediction
from stunet_plugin.nnunet.names import CONFIGURATION
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.files import read_json, sha256_of, write_atomically
from stunet_plugin.utils.label_systems import LabelSystem, canonical_name, check_regions

if TYPE_CHECKING:
    from stunet_plugin.commands.pseudo_label import PseudoLabel

KEPT_ENTRIES = (
    *("channel_names", "modality", "regions_class_order"),
    *("overwrite_image_reader_writer", "file_ending"),
)
"""Of the model's dataset.json, for that of the new dataset."""


@dataclass(frozen=True)
class Rule:
    """When a class of a case is kept: by the least mean confidence (0 to 1) over its voxels, and by
    its volume. None asks for nothing."""

    min_confidence: float | None = None
    min_mm3: float | None = None
    max_mm3: float | None = None

    def reasons_against(self, confidence: float | None, volume: float) -> list[str]:
        """Return why a class is not kept (confidence None: it is not predicted at all)."""
        # Comparisons are such that what is not a number is never confident.
        checks = (
            (confidence, self.min_confidence, operator.ge, "mean confidence {:.3f} below {:g}"),
            (volume, self.min_mm3, operator.ge, "{:.0f} mm3, less than {:g}"),
            (volume, self.max_mm3, operator.le, "{:.0f} mm3, more than {:g}"),
        )
        return [
            text.format(found, bound)
            for found, bound, fits, text in checks
            if found is not None and bound is not None and not fits(found, bound)
        ]


@dataclass(frozen=True)
class ConfidenceFilter:
    """The rules for a dataset: least confidence of a voxel (None asks for none), and a rule by
    canonical class name; ``drop_cases`` leaves out a case with a class that is not kept, instead of
    ignoring the class there."""

    system: LabelSystem
    ignore: int
    ignore_below: float | None = None
    rules: Mapping[str, Rule] = field(default_factory=dict)
    drop_cases: bool = False

    @property
    def may_ignore(self) -> bool:
        return self.ignore_below is not None or (bool(self.rules) and not self.drop_cases)

    def apply(self, prediction: Prediction) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the labels (z, y, x), ignored where the prediction is not kept, and why the case
        is left out (else ""), its share of ignored voxels, and its classes; their sizes and mean
        confidences are those of the whole prediction."""
        labels, confidence = prediction.labels, prediction.confidence
        doubtful = np.zeros(labels.shape, bool)
        if self.ignore_below is not None:
            doubtful = ~(confidence >= self.ignore_below)
        masks = {name: self.system.mask(labels, name) for name in self.system.classes}
        classes: dict[str, dict[str, Any]] = {}
        left_out = []
        for name, mask in masks.items():
            voxels = int(mask.sum())
            mean = float(confidence[mask].mean(dtype=np.float64)) if voxels else None
            mm3 = voxels * prediction.voxel_mm3
            reasons = self.rules.get(name, Rule()).reasons_against(mean, mm3)
            about = {"voxels": voxels, "mm3": round(mm3, 3), "confidence": mean}
            classes[name] = {**about, "reasons": reasons}
            # What is not predicted cannot be marked: it may be anywhere in the background.
            if reasons and (self.drop_cases or not voxels):
                left_out += [f"{name}: {reason}" for reason in reasons]
            elif reasons:
                doubtful |= mask
        for name, mask in masks.items():
            classes[name]["kept"] = 0 if left_out else int((mask & ~doubtful).sum())
        ignored = 0.0 if left_out else float(doubtful.mean())
        record = {"left_out": "; ".join(left_out), "ignored": ignored, "classes": classes}
        return np.where(doubtful, labels.dtype.type(self.ignore), labels), record


def parse_rules(
    system: LabelSystem, confidences: Sequence[str], sizes: Sequence[str]
) -> dict[str, Rule]:
    """Return the rule of each class that has one, from confidences ``P`` (for all classes) or
    ``CLASS=P`` and sizes ``CLASS=MIN:MAX`` (mm3, either may be empty)."""
    fields: dict[str, dict[str, float | None]] = {}

    def rule_of(name: str, where: str) -> dict[str, float | None]:
        found = canonical_name(name)
        if found not in system.classes:
            classes = ", ".join(system.classes)
            raise PluginError(f"{where}: no class {name!r} in the model. It has: {classes}.")
        return fields.setdefault(found, {})

    for text in sorted(confidences, key=lambda text: "=" in text):
        name, separator, number = text.rpartition("=")
        for one in [name] if separator else system.classes:
            rule_of(one, text)["min_confidence"] = _probability(number, "--min-confidence")
    for text in sizes:
        name, _, reach = text.rpartition("=")
        low, colon, high = reach.partition(":")
        wrong = f"--size must be CLASS=MIN:MAX (mm3, either may be left out), not {text!r}."
        least, most = (_number(x, math.inf, wrong) if x else None for x in (low, high))
        if not name or not colon or (least or 0) > (math.inf if most is None else most):
            raise PluginError(wrong)
        rule_of(name, text).update(min_mm3=least, max_mm3=most)
    return {name: Rule(**given) for name, given in fields.items()}


def _probability(text: str, option: str) -> float:
    return _number(text, 1.0, f"{option} must be a number from 0 to 1, not {text!r}.")


def _number(text: str, most: float, wrong: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= most and math.isfinite(float(text)):
            return float(text)
    raise PluginError(wrong)


def run_pseudo_label(options: PseudoLabel) -> int:
    """Predict, filter, and make the dataset; return 0, or 1 if a class is all but lost. After a
    PluginError (wrong input, no case left) the same command resumes where it stopped."""
    return _PseudoLabelling(options).run()


class _PseudoLabelling:
    """One run; the constructor checks all but the images."""

    def __init__(self, options: PseudoLabel) -> None:
        self.options = options
        self.target = NewDataset(options.dataset_id, options.name, PSEUDO_LABELS, options.copy)
        self.min_share = _probability(str(options.min_share), "--min-share")
        how = (options.step_size, options.mirroring, choose_device(options.device))
        self.model = model = Model(Path(options.model), options.folds, options.checkpoint, *how)
        self.ending = str(model.dataset["file_ending"])
        where = f"the model {model.folder.name}"
        system = LabelSystem.from_table(model.dataset, where)
        check_regions(model.dataset, where)
        self.cases = _find_images(options.images, self.ending, model.channels)
        below = options.ignore_below
        self.filter = ConfidenceFilter(
            system,
            max(system.values) + 1 if system.ignore is None else system.ignore,
            None if below is None else _probability(str(below), "--ignore-below"),
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
            "ignore_below": self.filter.ignore_below,
            "rules": {name: asdict(rule) for name, rule in self.filter.rules.items()},
            "drop_cases": options.drop_cases,
            "copy": options.copy,
            "images": {case: list(map(_state, files)) for case, files in self.cases.items()},
        }

    def run(self) -> int:
        target, model = self.target, self.model
        if target.is_there(self.settings):
            return self._warn(read_json(target.folder / PSEUDO_LABELS)["cases"])
        print(f"{len(self.cases)} cases; {model.folder.name}, fold(s) {', '.join(model.folds)}")
        if (find_raw(self.options.images) / "labelsTr").is_dir():
            print(f"{self.options.images} is a labelled dataset. Its labels are not used.")
        print("Checking the images ...", flush=True)
        left = [case for case in self.cases if not target.record_of(case).is_file()]
        model.check(self.cases[case] for case in left)
        with target.begun(self.settings):
            for case in tqdm(left, unit="case"):
                self._label(case)
            records = {case: read_json(target.record_of(case)) for case in self.cases}
            kept = [record for record in records.values() if not record["left_out"]]
            print(f"{len(kept)} of {len(records)} cases are kept.")
            for case, record in records.items():
                if record["left_out"]:
                    print(f"  left out: {case}: {record['left_out']}")
            if not kept:
                shutil.rmtree(target.unfinished)
                raise PluginError("No case is left. Ask for less (--min-confidence, --size).")
            if self.filter.may_ignore:
                print(f"  ignored: {np.mean([x['ignored'] for x in kept]):.1%} of their voxels")
            target.finish(self._description(len(kept)), self._provenance(records))
        number = self.options.dataset_id
        target.say_written(
            "2d" if model.configuration == "2d" else CONFIGURATION,
            "\nOr join it with labelled cases first:"
            f" stunet merge-datasets LABELLED {number} --train-only {number} -d ID",
        )
        return self._warn(records)

    def _label(self, case: str) -> None:
        """Predict one case and write what is kept of it, its record last."""
        images = self.cases[case]
        prediction = self.model.predict(images)
        labels, record = self.filter.apply(prediction)
        if not record["left_out"]:
            self.target.add_images(case, images, self.ending)
            file = self.target.label_of(case, self.ending)
            write_labels(self.model.reader, labels, prediction.properties, file)
        text = json.dumps({"images": list(map(str, images)), **record})
        write_atomically(self.target.record_of(case), text)

    def _warn(self, records: Mapping[str, Mapping[str, Any]]) -> int:
        """Warn of classes that too few cases show; return the exit code."""
        kept = [record for record in records.values() if not record["left_out"]]
        classes = self.filter.system.classes
        counts = {x: sum(record["classes"][x]["kept"] > 0 for record in kept) for x in classes}
        least = max(1, self.min_share * len(kept))
        lost = [f"{name} in {count}" for name, count in counts.items() if count < least]
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
        dataset, name = self.model.dataset, self.model.folder.name
        ignore = {"ignore": self.filter.ignore} if self.filter.may_ignore else {}
        return {
            **{key: dataset[key] for key in KEPT_ENTRIES if key in dataset},
            "labels": {**dataset["labels"], **ignore},
            "numTraining": cases,
            "name": self.target.folder.name,
            "description": f"Predictions of {name} by `stunet pseudo-label`. See {PSEUDO_LABELS}.",
        }

    def _provenance(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            **{key: value for key, value in self.settings.items() if key != "images"},
            "stunet_plugin": __version__,
            "nnunetv2": host_version(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cases": records,
        }


def _find_images(given: str, ending: str, channels: int) -> dict[str, tuple[Path, ...]]:
    """Return the images of each case: of a folder of them, or of a dataset in nnUNet_raw."""
    folder = find_raw(given)
    folder = folder / "imagesTr" if (folder / "imagesTr").is_dir() else folder
    cases = list_images(folder, ending, channels)
    if not cases:
        others = sorted({"".join(file.suffixes[-2:]) for file in folder.iterdir()} - {""})
        there = f" (it has files that end in {', '.join(others[:5])})" if others else ""
        raise PluginError(
            f"-i {folder} has no images CASE_0000{ending}, as the model reads{there}. Name them so."
        )
    return cases


def _state(file: Path) -> list[Any]:
    """Return what tells whether an image is still the same."""
    return [str(file), (state := file.stat()).st_size, state.st_mtime_ns]
