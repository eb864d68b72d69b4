"""Demo: an embedded dataset (or a user's) through nnU-Net's commands; a table, a picture."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

from stunet_plugin.datasets.raw_dataset import RawDataset, find_raw, read_raw
from stunet_plugin.demo.phantom import write_dataset
from stunet_plugin.demo.stock import CommandFailedError, run_stock
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CONFIGURATION, FOLDS, PREPROCESSED, RAW, RESULTS
from stunet_plugin.nnunet.registration import find_host, trainers_folder
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.figures import OverlayCase, save_overlays
from stunet_plugin.utils.image_files import LINK, place_image
from stunet_plugin.utils.images import read_image, read_label_map

if TYPE_CHECKING:
    from stunet_plugin.commands.demo import Demo

EMBEDDED_NAME = "Dataset999_StunetDemo"
DEFAULT_EPOCHS, ITERATIONS_PER_EPOCH, VAL_ITERATIONS_PER_EPOCH = 10, 15, 2
CPU_MINUTES = {"tiny": 0.1, "small": 0.3, "base": 1.0, "large": 7.0, "huge": 20.0}
"""Of an epoch of the embedded dataset on two cores."""
OTHER_MINUTES = 2
"""Of planning, prediction and evaluation."""
FOLD = "0"
OVERLAY_ROWS = 3
PROCESSES = min(os.cpu_count() or 1, 8)
"""At most nnU-Net's own number."""


def run_demo(options: Demo) -> int:
    """Run all steps and return an exit code: 1 if a command of nnU-Net failed.

    Raises:
        PluginError: wrong input.
        KeyboardInterrupt: with how to start again.
    """
    if options.epochs is not None and options.epochs < 1:
        raise PluginError(f"--epochs must be at least 1, not {options.epochs}.")
    if not options.out.strip():
        raise PluginError("--out is empty. Name a folder; everything is written there.")
    find_host()
    folder = Path(options.out).resolve()
    options = replace(options, device=choose_device(options.device), out=str(folder))
    source = _user_dataset(options.dataset) if options.dataset is not None else None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PluginError(
            f"{folder} is there already and not empty. Remove it, or choose another with --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginError(
            f"Cannot write to {folder} ({error.strerror}). Choose another folder with --out."
        ) from error
    started = time.monotonic()
    given = [(f"--{name}", str(value)) for name, value in vars(options).items() if value]
    command = shlex.join(["stunet", "demo", *chain.from_iterable(given)])
    start_again = f"Start again: rm -r {shlex.quote(str(folder))} && {command}"
    try:
        _Run(options, source).run()
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(start_again) from error
    except CommandFailedError as error:
        print(f"\nstunet demo: {error}\nOnce fixed: {start_again}", file=sys.stderr)
        return 1
    minutes = (time.monotonic() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes on {options.device}. Everything is in {folder}")
    return 0


def _user_dataset(dataset_id: int) -> RawDataset:
    try:
        dataset = read_raw(find_raw(str(dataset_id)).resolve())
    except PluginError as error:
        raise PluginError(f"--dataset {dataset_id}: {error}") from error
    if len(dataset.cases) < FOLDS:
        raise PluginError(
            f"--dataset {dataset_id}: nnU-Net splits into {FOLDS} folds, {dataset.folder} has only"
            f" {len(dataset.cases)} labelled cases."
        )
    return dataset


class _Run:
    """One demo in one folder: its environment and its steps."""

    def __init__(self, options: Demo, source: RawDataset | None) -> None:
        self.source, self.device, self.folder = source, options.device, Path(options.out)
        self.size, self.epochs = options.size, options.epochs or DEFAULT_EPOCHS
        self.trainer = f"STUNetTrainer_{options.size}"
        name = source.name if source else EMBEDDED_NAME
        self.dataset_id = str(int(name[len("Dataset") :][:3]))
        self.raw = self.folder / RAW / name
        self.preprocessed = self.folder / PREPROCESSED / name
        self.model = self.folder / RESULTS / name / f"{self.trainer}__nnUNetPlans__{CONFIGURATION}"
        self.predictions, self.held_out = self.folder / "predictions", self.folder / "held_out"

    def run(self) -> None:
        minutes = f"about {OTHER_MINUTES + CPU_MINUTES[self.size] * self.epochs:.0f} minutes"
        on = "two cores" if self.device == "cpu" else "the CPU, a few on a GPU"
        print(
            f"Trains {self.epochs} epochs on {self.source.name}; the bar says how long that takes."
            if self.source
            else f"This takes {minutes} on {on}.",
            f"Logs: {self.folder / 'logs'}",
        )
        for number, step in enumerate((self.data, self.train, self.predict, self.evaluate), 1):
            print(f"\n[{number}/4] {(step.__doc__ or '').rstrip('.')}", flush=True)
            step()
        self._report()

    def data(self) -> None:
        """Dataset, planned and preprocessed."""
        self.raw.parent.mkdir(parents=True)
        if self.source is None:
            write_dataset(self.raw)
            print(f"  16 CT-like scans with 5 organs, made from a seed, in {self.raw}")
        else:
            self.raw.symlink_to(self.source.folder, target_is_directory=True)
            print(f"  {self.source.folder}")
        self.dataset = read_raw(self.raw)
        count = str(PROCESSES)
        self._stock(
            *("nnUNetv2_plan_and_preprocess", "-d", self.dataset_id, "-c", CONFIGURATION),
            *("-npfp", count, "-np", count),
        )

    def train(self) -> None:
        """Train."""
        self._stock(
            *("nnUNetv2_train", self.dataset_id, CONFIGURATION, FOLD, "-tr", self.trainer),
            *("-device", self.device),
            total=self.epochs,
            unit="epoch",
        )

    def predict(self) -> None:
        """Predict the cases that were not trained on."""
        splits = json.loads((self.preprocessed / "splits_final.json").read_text())
        cases = set(splits[int(FOLD)]["val"])
        ending = self.dataset.file_ending
        for kind in ("images", "labels"):
            (self.held_out / kind).mkdir(parents=True)
        for case in self.dataset.cases:
            if case.name in cases:
                for channel, image in enumerate(case.images):
                    link = self.held_out / "images" / f"{case.name}_{channel:04d}{ending}"
                    place_image(image, link, LINK)
                place_image(case.label, self.held_out / "labels" / f"{case.name}{ending}", LINK)
        # Each process imports torch, which takes longer than a small image.
        workers = str(min(max(PROCESSES // 2, 1), 3))
        self._stock(
            *("nnUNetv2_predict", "-i", str(self.held_out / "images")),
            *("-o", str(self.predictions), "-d", self.dataset_id, "-c", CONFIGURATION, "-f", FOLD),
            *("-tr", self.trainer, "-device", self.device, "-npp", workers, "-nps", workers),
            total=len(cases),
            unit="case",
        )

    def evaluate(self) -> None:
        """Evaluate."""
        folders = [str(self.held_out / "labels"), str(self.predictions)]
        if any(isinstance(value, list) for value in self.dataset.description["labels"].values()):
            dataset_json, plans = (str(self.model / f"{x}.json") for x in ("dataset", "plans"))
            command = ["nnUNetv2_evaluate_folder", *folders, "-djfile", dataset_json]
            self._stock(*command, "-pfile", plans)
        else:
            values = map(str, self._class_names())
            self._stock("nnUNetv2_evaluate_simple", *folders, "-l", *values)

    def _report(self) -> None:
        """Print the Dice table and write the picture."""
        summary = json.loads((self.predictions / "summary.json").read_text())
        names = list(self._class_names().values())
        print(f"\n{'case':<24}" + "".join(f"{name[:12]:>13}" for name in names) + f"{'mean':>9}")
        for case in summary["metric_per_case"]:
            dice = [metrics["Dice"] for metrics in case["metrics"].values()]
            name = Path(case["prediction_file"]).name.removesuffix(self.dataset.file_ending)
            _print_row(name, dice, np.nanmean(dice))
        mean = [metrics["Dice"] for metrics in summary["mean"].values()]
        _print_row("mean Dice", mean, summary["foreground_mean"]["Dice"])
        # matplotlib keeps a font cache, by default in the home directory.
        os.environ.setdefault("MPLCONFIGDIR", self._environment()["MPLCONFIGDIR"])
        picture = self.folder / "overlay.png"
        labels = sorted((self.held_out / "labels").glob(f"*{self.dataset.file_ending}"))
        save_overlays(
            [self._overlay(label) for label in labels[:OVERLAY_ROWS]], self._class_names(), picture
        )
        print(f"\nOverlay: {picture}\nCurve:   {self.model / f'fold_{FOLD}' / 'progress.png'}")

    def _overlay(self, label: Path) -> OverlayCase:
        name = label.name.removesuffix(self.dataset.file_ending)
        image = read_image(self.held_out / "images" / f"{name}_0000{self.dataset.file_ending}")
        reference, prediction = (
            sitk.GetArrayFromImage(read_label_map(path))
            for path in (label, self.predictions / label.name)
        )
        array, spacing = sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]
        return OverlayCase(name, array, reference, prediction, spacing)

    def _class_names(self) -> dict[int, str]:
        """Label value to name, without background and ignore; a region has its first label's."""
        labels = self.dataset.description["labels"]
        first = {x: value[0] if isinstance(value, list) else value for x, value in labels.items()}
        by_value = sorted((value, name) for name, value in first.items())
        return {value: name for value, name in by_value if value != 0 and name != "ignore"}

    def _environment(self) -> dict[str, str]:
        workers = os.environ.get("nnUNet_n_proc_DA", "0")
        caches = self.folder / "cache"
        return {
            **os.environ,
            **{name: str(self.folder / name) for name in (RAW, PREPROCESSED, RESULTS)},
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_def_n_proc": str(PROCESSES),
            # nnU-Net's planner stops at 0, which a user may have set for training.
            "nnUNet_n_proc_DA": workers if workers != "0" else str(PROCESSES),
            # torch.compile takes longer than this training.
            "nnUNet_compile": "f",
            "STUNET_EPOCHS": str(self.epochs),
            "STUNET_ITERATIONS": str(ITERATIONS_PER_EPOCH),
            "STUNET_VAL_ITERATIONS": str(VAL_ITERATIONS_PER_EPOCH),
            "MPLCONFIGDIR": str(caches / "matplotlib"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "PYTHONUNBUFFERED": "1",
        }

    def _stock(self, *command: str, total: int = 0, unit: str = "") -> None:
        run_stock(list(command), self.folder, self._environment(), total, unit)


def _print_row(name: str, dice: list[float], mean: float) -> None:
    print(f"{name[:23]:<24}" + "".join(f"{value:>13.3f}" for value in dice) + f"{mean:>9.3f}")
