"""Demo: an embedded dataset (or a user's) through nnU-Net's commands; a table, a picture."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from tqdm import tqdm

from stunet_plugin.datasets.raw_dataset import RawDataset, find_raw, read_raw
from stunet_plugin.demo.phantom import write_dataset
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import end_command, find_command
from stunet_plugin.nnunet.names import CONFIGURATION, FOLDS, PREPROCESSED, RAW, RESULTS
from stunet_plugin.nnunet.registration import find_host, trainers_folder
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.figures import OverlayCase, save_overlays
from stunet_plugin.utils.image_files import LINK, place_image
from stunet_plugin.utils.images import read_image, read_label_map

if TYPE_CHECKING:
    from stunet_plugin.commands.demo import Demo

EMBEDDED_NAME = "Dataset999_StunetDemo"
ITERATIONS_PER_EPOCH, VAL_ITERATIONS_PER_EPOCH = 15, 2
CPU_MINUTES = {"tiny": 0.1, "small": 0.3, "base": 1.0, "large": 7.0, "huge": 20.0}
OTHER_MINUTES = 2
"""Of an epoch of the embedded dataset on two cores; of all but training."""
FOLD = "0"
OVERLAY_ROWS = 3
LEAST_DICE = 0.1
"""Mean Dice below which nobody takes the result for one."""
PROCESSES = min(os.cpu_count() or 1, 8)
"""At most nnU-Net's own number."""
SHOWN = ("predicting ", "Mean Validation Dice", "Preprocessing", "Experiment planning")
FACTS, COUNTED = ("train_loss ", "Pseudo dice "), ("Epoch time:", "done with ")
"""How lines of nnU-Net's commands begin that users want to see; the last ones end an epoch or a
case."""


class CommandFailedError(PluginError):
    """A command of nnU-Net ended with an error."""


def run_demo(options: Demo) -> int:
    """Run all steps and return an exit code: 1 if a command of nnU-Net failed or the network found
    nothing; a PluginError is for wrong input, a KeyboardInterrupt says how to start again."""
    if options.epochs < 1:
        raise PluginError(f"--epochs must be at least 1, not {options.epochs}.")
    find_host()
    folder = Path(options.out).resolve()
    options = replace(options, device=choose_device(options.device), out=str(folder))
    source = None
    if options.dataset is not None:
        source = read_raw(find_raw(str(options.dataset)).resolve())
        if len(source.cases) < FOLDS:
            told = f"{source.folder} has only {len(source.cases)} labelled cases"
            raise PluginError(f"{told}, nnU-Net splits them into {FOLDS} folds. Add some.")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise PluginError(f"{folder} is not empty. Remove it, or choose another with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    given = [(f"--{name}", str(value)) for name, value in vars(options).items() if value]
    command = shlex.join(["stunet", "demo", *chain.from_iterable(given)])
    start_again = f"Start again: rm -r {shlex.quote(str(folder))} && {command}"
    try:
        dice = _Run(options, source).run()
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(start_again) from error
    except CommandFailedError as error:
        print(f"\nstunet demo: {error}\nOnce fixed: {start_again}", file=sys.stderr)
        return 1
    minutes = (time.monotonic() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes on {options.device}. Everything is in {folder}")
    # Not a number where no case has any of the classes.
    if dice >= LEAST_DICE:
        return 0
    longer = f"--epochs {5 * options.epochs}"
    advice = "--size small (the default)" if options.size == "tiny" else longer
    print(
        f"\nstunet demo: this network finds next to nothing (mean Dice {dice:.3f}). All commands"
        f" ran; its training was too short, or it is too small. Try {advice}.",
        file=sys.stderr,
    )
    return 1


class _Run:
    """One demo in one folder: its environment and its steps."""

    def __init__(self, options: Demo, source: RawDataset | None) -> None:
        self.source, self.device, self.folder = source, options.device, Path(options.out)
        self.size, self.epochs = options.size, options.epochs
        self.trainer = f"STUNetTrainer_{options.size}"
        name = source.name if source else EMBEDDED_NAME
        self.dataset_id = str(int(name[len("Dataset") :][:3]))
        self.raw = self.folder / RAW / name
        self.model = self.folder / RESULTS / name / f"{self.trainer}__nnUNetPlans__{CONFIGURATION}"
        self.predictions, self.held_out = self.folder / "predictions", self.folder / "held_out"

    def run(self) -> float:
        """Run all steps, print the results and return the mean Dice."""
        minutes = OTHER_MINUTES + CPU_MINUTES[self.size] * self.epochs
        told = f"This takes about {minutes:.0f} minutes on two cores, a few on a GPU."
        if self.source:
            told = f"Trains {self.epochs} epochs on {self.source.name}; see the bar."
        print(told, f"Logs: {self.folder / 'logs'}")
        for number, step in enumerate((self.data, self.train, self.predict, self.evaluate), 1):
            print(f"\n[{number}/4] {(step.__doc__ or '').rstrip('.')}", flush=True)
            step()
        return self._report()

    def data(self) -> None:
        """Dataset, planned and preprocessed."""
        self.raw.parent.mkdir(parents=True)
        if self.source is None:
            write_dataset(self.raw)
            print(f"  16 CT-like scans with 5 organs, made from a seed, in {self.raw}")
        else:
            try:
                self.raw.symlink_to(self.source.folder, target_is_directory=True)
            except OSError:  # Windows asks for a right that users do not have
                shutil.copytree(self.source.folder, self.raw)
            print(f"  {self.source.folder}")
        self.dataset = read_raw(self.raw)
        count = f"-npfp {PROCESSES} -np {PROCESSES}"
        self._stock(f"nnUNetv2_plan_and_preprocess -d {self.dataset_id} -c {CONFIGURATION} {count}")

    def train(self) -> None:
        """Train."""
        words = f"nnUNetv2_train {self.dataset_id} {CONFIGURATION} {FOLD} -tr {self.trainer}"
        self._stock(f"{words} -device {self.device}", total=self.epochs, unit="epoch")

    def predict(self) -> None:
        """Predict the cases that were not trained on."""
        splits = self.folder / PREPROCESSED / self.raw.name / "splits_final.json"
        cases = set(json.loads(splits.read_text(encoding="utf-8"))[int(FOLD)]["val"])
        images, labels = (self.held_out / kind for kind in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        ending = self.dataset.file_ending
        for case in self.dataset.cases:
            if case.name in cases:
                for channel, image in enumerate(case.images):
                    place_image(image, images / f"{case.name}_{channel:04d}{ending}", LINK)
                place_image(case.label, labels / f"{case.name}{ending}", LINK)
        # Each process imports torch, which takes longer than a small image.
        workers = min(max(PROCESSES // 2, 1), 3)
        self._stock(
            f"nnUNetv2_predict -d {self.dataset_id} -c {CONFIGURATION} -f {FOLD} -tr {self.trainer}"
            f" -device {self.device} -npp {workers} -nps {workers}",
            *("-i", str(images), "-o", str(self.predictions)),
            total=len(cases),
            unit="case",
        )

    def evaluate(self) -> None:
        """Evaluate."""
        folders = (self.held_out / "labels", self.predictions)
        files = ("-djfile", self.model / "dataset.json", "-pfile", self.model / "plans.json")
        self._stock("nnUNetv2_evaluate_folder", *map(str, (*folders, *files)))

    def _report(self) -> float:
        """Print the Dice table, write the picture and return the mean Dice."""
        summary = json.loads((self.predictions / "summary.json").read_text(encoding="utf-8"))
        ending = self.dataset.file_ending
        keys = {
            label_or_region_to_key(tuple(value) if isinstance(value, list) else value): name
            for name, value in self.dataset.description["labels"].items()
        }
        rows = {
            Path(case["prediction_file"]).name.removesuffix(ending): {
                keys[key]: metrics["Dice"] for key, metrics in case["metrics"].items()
            }
            for case in summary["metric_per_case"]
        }
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.loc["mean Dice"] = table.mean()
        table["mean"] = table.mean(axis=1)
        print("\n" + table.to_string(float_format="{:.3f}".format))
        # matplotlib keeps a font cache, by default in the home directory.
        os.environ.setdefault("MPLCONFIGDIR", self._environment()["MPLCONFIGDIR"])
        picture, overlays = self.folder / "overlay.png", []
        for label in sorted((self.held_out / "labels").glob(f"*{ending}"))[:OVERLAY_ROWS]:
            case = label.name.removesuffix(ending)
            image = read_image(self.held_out / "images" / f"{case}_0000{ending}")
            files = (label, self.predictions / label.name)
            volume, *maps = map(sitk.GetArrayFromImage, (image, *map(read_label_map, files)))
            spacing = image.GetSpacing()[::-1]
            overlays.append(OverlayCase(case, volume, maps[0], maps[1], spacing))
        save_overlays(overlays, self._class_names(), picture)
        print(f"\nOverlay: {picture}\nCurve:   {self.model / f'fold_{FOLD}' / 'progress.png'}")
        return float(table.loc["mean Dice", "mean"])

    def _class_names(self) -> dict[int, str]:
        """Label value to name, without background and ignore; a region has its first label's."""
        labels = self.dataset.description["labels"]
        first = {x: value[0] if isinstance(value, list) else value for x, value in labels.items()}
        return {value: name for name, value in first.items() if value != 0 and name != "ignore"}

    def _environment(self) -> dict[str, str]:
        workers = os.environ.get("nnUNet_n_proc_DA", "0")
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
            "MPLCONFIGDIR": str(self.folder / "cache" / "matplotlib"),
            "STUNET_HOME": str(self.folder / "cache" / "stunet"),
            "PYTHONUNBUFFERED": "1",
        }

    def _stock(self, words: str, *more: str, total: int = 0, unit: str = "") -> None:
        """Run a command, with a bar of epochs or cases and its output in logs/COMMAND.log."""
        command = [*words.split(), *more]
        log = self.folder / "logs" / f"{command[0]}.log"
        log.parent.mkdir(exist_ok=True)
        print(f"  $ {shlex.join(command)}", flush=True)
        process = subprocess.Popen(
            [find_command(command[0]), *command[1:]],
            env=self._environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        # None: no bar where the output is not a terminal.
        hidden = None if total else True
        bar = tqdm(total=total, unit=unit, file=sys.stdout, disable=hidden, leave=False)
        with log.open("a") as file, bar:
            try:
                done, facts = 0, []
                for line in process.stdout or ():
                    file.write(line)
                    file.flush()
                    # nnU-Net's log lines: "<date> <time>: <text>".
                    text = re.sub(r"^20\S+ \S+: ", "", line.strip())
                    if text.startswith((*FACTS, *COUNTED)):
                        facts.append(re.sub(r"np\.float\d+\((.*?)\)", r"\1", text))
                    elif text.startswith(SHOWN) and "%|" not in text:
                        tqdm.write(f"    {text}", file=sys.stdout)
                    if text.startswith(COUNTED):
                        done += 1
                        told = f"    {unit} {done:>3} of {total}: {', '.join(facts)}"
                        tqdm.write(told, file=sys.stdout)
                        bar.update()
                        facts.clear()
                code = process.wait()
            except BaseException:
                end_command(process)
                raise
        if code != 0:
            tail = "\n    ".join(log.read_text(errors="replace").splitlines()[-12:])
            told = f"{command[0]} ended with exit code {code}. Its last lines:"
            raise CommandFailedError(f"{told}\n    {tail}\nThe whole log: {log}")
