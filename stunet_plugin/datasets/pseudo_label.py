"""``stunet pseudo-label``: a model's predictions on unlabelled images become a dataset to train
on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stunet_plugin import __version__
from stunet_plugin.datasets.confidence_filter import Trust, parse_rules, probability
from stunet_plugin.datasets.label_systems import LabelSystem
from stunet_plugin.datasets.new_dataset import NewDataset, write_labels
from stunet_plugin.datasets.raw_dataset import find_raw, list_images
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Model
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.files import sha256_of, write_atomically
from stunet_plugin.utils.progress import Progress

PROVENANCE = "pseudo_labels.json"
KEPT_ENTRIES = (
    "channel_names",
    "modality",
    "regions_class_order",
    "overwrite_image_reader_writer",
    "file_ending",
)
"""Of the model's dataset.json, for that of the new dataset."""


@dataclass(frozen=True)
class PseudoLabelOptions:
    """What the user asked for; see ``stunet pseudo-label --help``."""

    model: str
    images: str
    dataset_id: int
    name: str
    copy: bool = False
    ignore_below: float | None = None
    min_confidence: Sequence[str] = ()
    size: Sequence[str] = ()
    drop_cases: bool = False
    folds: Sequence[str] | None = None
    checkpoint: str = "checkpoint_final.pth"
    step_size: float = 0.5
    mirroring: bool = True
    device: str = "auto"

    @classmethod
    def from_arguments(cls, given: Any) -> PseudoLabelOptions:
        return cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})


def run_pseudo_label(options: PseudoLabelOptions) -> int:
    """Predict, filter, and make the dataset; return 0.

    Raises:
        PluginError: wrong input, or no case is left; the same command goes on where it was.
    """
    _PseudoLabelling(options).run()
    return 0


class _PseudoLabelling:
    """One run; the constructor checks everything and writes nothing."""

    def __init__(self, options: PseudoLabelOptions) -> None:
        self.options = options
        self.target = NewDataset(options.dataset_id, options.name)
        device = choose_device(options.device)
        self.model = Model(
            Path(options.model),
            options.folds,
            options.checkpoint,
            options.step_size,
            options.mirroring,
            device,
        )
        self.ending = str(self.model.dataset["file_ending"])
        self.cases = find_images(options.images, self.ending, self.model.channels)
        labels = dict(self.model.dataset["labels"])
        system = LabelSystem.from_table(self.model.dataset, f"the model {self.model.folder.name}")
        ignore_below = (
            None
            if options.ignore_below is None
            else probability(str(options.ignore_below), "--ignore-below")
        )
        rules = parse_rules(system, options.min_confidence, options.size)
        ignore = max(system.values) + 1 if system.ignore is None else system.ignore
        self.trust = Trust(system, ignore, ignore_below, rules, options.drop_cases)
        self.labels = {**labels, "ignore": ignore} if self.trust.may_ignore else labels
        self.settings: dict[str, Any] = {
            "command": "pseudo-label",
            "model": str(self.model.folder),
            "trainer": self.model.trainer,
            "plans": self.model.plans_name,
            "configuration": self.model.configuration,
            "folds": list(self.model.folds),
            "checkpoints": {file.parent.name: sha256_of(file) for file in self.model.files},
            "step_size": options.step_size,
            "mirroring": options.mirroring,
            **self.trust.to_json(),
            "copy": options.copy,
            "images": {
                case: [_state(file) for file in files] for case, files in self.cases.items()
            },
        }

    def run(self) -> None:
        print(
            f"{len(self.cases)} cases; {self.model.folder.name}, fold(s)"
            f" {', '.join(self.model.folds)}; into {self.target.folder}",
            flush=True,
        )
        with self.target.begun(self.settings):
            progress = Progress(len(self.cases))
            for case, images in self.cases.items():
                if self.target.record_of(case).is_file():
                    progress.known += 1
                    continue
                progress.add(self._label(case, images))
            progress.end()
            records = {
                case: json.loads(self.target.record_of(case).read_text()) for case in self.cases
            }
            kept = [case for case, record in records.items() if not record["left_out"]]
            self._say(records, kept)
            if not kept:
                shutil.rmtree(self.target.unfinished)
                raise PluginError(
                    "No case is left, so no dataset was made. Ask for less (--min-confidence,"
                    " --size)."
                )
            self.target.finish(
                self._description(len(kept)), {PROVENANCE: self._provenance(records)}
            )
        number = self.options.dataset_id
        joining = f"stunet merge-datasets LABELLED {number} --train-only {number} -d ID"
        print(self.target.closing_lines(f", or join it with labelled cases: {joining}"))

    def _label(self, case: str, images: tuple[Path, ...]) -> bool:
        """Predict one case and write what is kept of it, its record last; return whether it is
        kept."""
        prediction = self.model.predict(images)
        verdict = self.trust.judge(prediction)
        if verdict.labels is not None:
            self.target.add_images(case, images, self.ending, self.options.copy)
            write_labels(
                self.model.reader,
                verdict.labels,
                prediction.properties,
                self.target.label_of(case, self.ending),
            )
        record = {
            "images": [str(image) for image in images],
            "left_out": verdict.reason,
            "ignored": verdict.ignored,
            "classes": verdict.classes,
        }
        write_atomically(self.target.record_of(case), json.dumps(record))
        return verdict.labels is not None

    def _say(self, records: Mapping[str, Mapping[str, Any]], kept: Sequence[str]) -> None:
        print(f"{len(kept)} of {len(records)} cases are kept.")
        for case, record in records.items():
            if record["left_out"]:
                print(f"  left out: {case}: {record['left_out']}")
        if self.trust.may_ignore and kept:
            share = sum(records[case]["ignored"] for case in kept) / len(kept)
            print(f"  ignored: {share:.1%} of their voxels")

    def _description(self, cases: int) -> dict[str, Any]:
        kept = {key: self.model.dataset[key] for key in KEPT_ENTRIES if key in self.model.dataset}
        return {
            **kept,
            "labels": self.labels,
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


def _state(file: Path) -> list[Any]:
    """What tells whether an image is still the same."""
    state = file.stat()
    return [str(file), state.st_size, state.st_mtime_ns]
