"""The demonstration: the embedded data set (or a user's) through the stock nnU-Net commands, with a
table and a picture."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.demo.phantom import write_dataset
from stunet_plugin.demo.settings import ITERATIONS_PER_EPOCH, DemoSettings, user_dataset
from stunet_plugin.demo.stock import StockCommandError, run_stock
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import terminate_as_interrupt
from stunet_plugin.nnunet.registration import find_host, trainers_folder
from stunet_plugin.utils.figures import OverlayCase, save_overlays
from stunet_plugin.utils.files import write_atomically

EMBEDDED_ID = 999
EMBEDDED_NAME = "Dataset999_StunetDemo"
VAL_ITERATIONS_PER_EPOCH = 2
CONFIGURATION = "3d_fullres"
FOLD = 0
OVERLAY_ROWS = 3
STATE_FILE = "demo.json"
MOST_PROCESSES = 8
"""nnU-Net's own number."""


def run_demo(settings: DemoSettings, out: str, resume: bool) -> int:
    """Run all steps and return an exit code.

    Args:
        settings: what to run.
        out: folder for everything; new, or with ``resume`` the one of an interrupted demo with the
            same settings.
        resume: skip what is done.
    """
    if not out.strip():
        raise PluginError("--out is empty. Name a folder; everything is written there.")
    folder = Path(out).resolve()
    find_host()
    source = user_dataset(settings.dataset) if settings.dataset is not None else None
    demo = Demo(settings, folder, source)
    demo.open(resume)
    demo.lock()
    started = time.monotonic()
    try:
        with terminate_as_interrupt():
            demo.run()
    except KeyboardInterrupt:
        print(f"\nInterrupted. Continue with: {demo.resume_command()}", file=sys.stderr)
        return 130
    except StockCommandError as error:
        print(
            f"\nstunet demo: {error}\nOnce mended, continue with: {demo.resume_command()}",
            file=sys.stderr,
        )
        return 1
    print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes on {settings.device}."
        f" Everything is in {folder}"
    )
    return 0


class Demo:
    """One demo in one folder: its environment, its steps, and what of them is done."""

    def __init__(self, settings: DemoSettings, folder: Path, source: Path | None) -> None:
        self.settings = settings
        self.folder = folder
        self.source = source
        self.dataset_id = settings.dataset if settings.dataset is not None else EMBEDDED_ID
        self.dataset_name = source.name if source else EMBEDDED_NAME
        self.raw = folder / "nnUNet_raw" / self.dataset_name
        self.predictions = folder / "predictions"
        self.held_out = folder / "held_out"
        self.done: list[str] = []

    # --- state

    def open(self, resume: bool) -> None:
        """Make the folder, or check that it is an interrupted demo with the same settings."""
        state_file = self.folder / STATE_FILE
        if resume:
            if not state_file.is_file():
                raise PluginError(
                    f"--resume: there is no interrupted demo in {self.folder}. Start one without"
                    " --resume."
                )
            try:
                state = json.loads(state_file.read_text())
                settings, done = DemoSettings(**state["settings"]), list(state["done"])
            except (ValueError, TypeError, KeyError) as error:
                raise PluginError(
                    f"{state_file} is damaged. Start a new demo in another folder with --out."
                ) from error
            if settings != self.settings:
                raise PluginError(
                    f"--resume: the demo in {self.folder} was started with {state['settings']}, not"
                    f" {asdict(self.settings)}."
                )
            self.done = done
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            advice = "Continue it with --resume, or choose" if state_file.is_file() else "Choose"
            raise PluginError(
                f"{self.folder} is there already and not empty. {advice} another folder with --out."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save_state()
        except OSError as error:
            raise PluginError(
                f"Cannot write to {self.folder} ({error.strerror}). Choose another folder with"
                " --out."
            ) from error

    def _save_state(self) -> None:
        write_atomically(
            self.folder / STATE_FILE,
            json.dumps({"settings": asdict(self.settings), "done": self.done}, indent=2),
        )

    def lock(self) -> None:
        """Let no second demo into the folder while this one, or a command that it left behind, is
        running."""
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PluginError(
                f"A demo is running in {self.folder}. Wait for it to end, or choose another folder"
                " with --out."
            ) from error

    def resume_command(self) -> str:
        dataset = f" --dataset {self.settings.dataset}" if self.settings.dataset is not None else ""
        return (
            f"stunet demo{dataset} --size {self.settings.size} --epochs {self.settings.epochs}"
            f" --device {self.settings.device} --out {shlex.quote(str(self.folder))} --resume"
        )

    # --- steps

    def run(self) -> None:
        steps: list[tuple[str, str, Callable[[], None]]] = [
            ("dataset", "Data set", self._dataset),
            ("preprocess", "Plan and preprocess", self._preprocess),
            ("train", "Train", self._train),
            ("hold_out", "Cases that were not trained on", self._hold_out),
            ("predict", "Predict", self._predict),
            ("evaluate", "Evaluate", self._evaluate),
        ]
        for number, (name, title, step) in enumerate(steps, start=1):
            if name in self.done:
                print(f"\n[{number}/{len(steps)}] {title}: done already")
                continue
            print(f"\n[{number}/{len(steps)}] {title}", flush=True)
            step()
            self.done.append(name)
            self._save_state()
        self._report()

    def _dataset(self) -> None:
        if self.source is None:
            if not self.raw.exists():
                write_dataset(self.raw)
            cases = len(list((self.raw / "labelsTr").iterdir()))
            print(f"  {cases} CT-like scans with 5 organs, made from a seed, in {self.raw}")
            return
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        if not self.raw.is_symlink():
            self.raw.symlink_to(self.source, target_is_directory=True)
        print(f"  {self.source}")

    def _preprocess(self) -> None:
        processes = str(_processes())
        self._stock(
            "nnUNetv2_plan_and_preprocess",
            "-d",
            str(self.dataset_id),
            "-c",
            CONFIGURATION,
            "-npfp",
            processes,
            "-np",
            processes,
        )

    def _train(self) -> None:
        arguments = [
            str(self.dataset_id),
            CONFIGURATION,
            str(FOLD),
            "-tr",
            self.settings.trainer,
            "-device",
            self.settings.device,
        ]
        checkpoints = list(self.model_folder.glob(f"fold_{FOLD}/checkpoint_*.pth"))
        if checkpoints and all(zipfile.is_zipfile(checkpoint) for checkpoint in checkpoints):
            arguments.append("--c")
        elif checkpoints:
            # A kill in the middle of a write. nnU-Net overwrites it, so nothing needs to be moved
            # away.
            print("  the interrupted training left a damaged checkpoint: training starts anew")
        self._stock("nnUNetv2_train", *arguments)

    def _hold_out(self) -> None:
        """Link the fold's validation cases into a folder, so that prediction takes them as any new
        images."""
        splits = json.loads(
            (
                self.folder / "nnUNet_preprocessed" / self.dataset_name / "splits_final.json"
            ).read_text()
        )
        cases = set(splits[FOLD]["val"])
        ending = self.dataset_json["file_ending"]
        shutil.rmtree(self.held_out, ignore_errors=True)
        for kind in ("images", "labels"):
            (self.held_out / kind).mkdir(parents=True)
        for image in (self.raw / "imagesTr").iterdir():
            if (
                image.name.endswith(ending)
                and image.name[: -len(ending)].rpartition("_")[0] in cases
            ):
                (self.held_out / "images" / image.name).symlink_to(image)
        for case in cases:
            (self.held_out / "labels" / f"{case}{ending}").symlink_to(
                self.raw / "labelsTr" / f"{case}{ending}"
            )
        print(
            f"  fold {FOLD} holds out {len(cases)}:"
            f" {', '.join(sorted(cases)[:6])}{' ...' if len(cases) > 6 else ''}"
        )

    def _predict(self) -> None:
        # Each starts Python and torch anew, which takes longer than a small image.
        workers = str(min(max(_processes() // 2, 1), 3))
        self._stock(
            "nnUNetv2_predict",
            "-i",
            str(self.held_out / "images"),
            "-o",
            str(self.predictions),
            "-d",
            str(self.dataset_id),
            "-c",
            CONFIGURATION,
            "-f",
            str(FOLD),
            "-tr",
            self.settings.trainer,
            "-device",
            self.settings.device,
            "-npp",
            workers,
            "-nps",
            workers,
        )

    def _evaluate(self) -> None:
        folders = [str(self.held_out / "labels"), str(self.predictions)]
        if self.has_regions:
            files = [
                "-djfile",
                str(self.model_folder / "dataset.json"),
                "-pfile",
                str(self.model_folder / "plans.json"),
            ]
            self._stock("nnUNetv2_evaluate_folder", *folders, *files)
        else:
            self._stock("nnUNetv2_evaluate_simple", *folders, "-l", *map(str, self.class_names))

    def _report(self) -> None:
        """Print the Dice table and write the picture."""
        summary = json.loads((self.predictions / "summary.json").read_text())
        names = list(self.class_names.values())
        print(f"\n{'case':<24}" + "".join(f"{name[:12]:>13}" for name in names) + f"{'mean':>9}")
        for case in summary["metric_per_case"]:
            dice = [metrics["Dice"] for metrics in case["metrics"].values()]
            name = Path(case["prediction_file"]).name.removesuffix(self.dataset_json["file_ending"])
            print(
                f"{name[:23]:<24}"
                + "".join(f"{value:>13.3f}" for value in dice)
                + f"{np.nanmean(dice):>9.3f}"
            )
        mean = [metrics["Dice"] for metrics in summary["mean"].values()]
        print(
            f"{'mean Dice':<24}"
            + "".join(f"{value:>13.3f}" for value in mean)
            + f"{summary['foreground_mean']['Dice']:>9.3f}"
        )
        # matplotlib keeps a font cache, by default in the home directory.
        os.environ.setdefault("MPLCONFIGDIR", self._environment()["MPLCONFIGDIR"])
        picture = self.folder / "overlay.png"
        save_overlays(list(self._overlay_cases()), self.class_names, picture)
        print(
            f"\nOverlay: {picture}\nCurve:   {self.model_folder / f'fold_{FOLD}' / 'progress.png'}"
        )

    def _overlay_cases(self) -> Iterator[OverlayCase]:
        import SimpleITK as sitk

        ending = self.dataset_json["file_ending"]
        for label in sorted((self.held_out / "labels").iterdir())[:OVERLAY_ROWS]:
            name = label.name.removesuffix(ending)
            image = sitk.ReadImage(str(self.held_out / "images" / f"{name}_0000{ending}"))
            arrays = [
                sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
                for path in (label, self.predictions / label.name)
            ]
            yield OverlayCase(
                name, sitk.GetArrayFromImage(image), arrays[0], arrays[1], image.GetSpacing()[::-1]
            )

    # --- what the steps share

    @property
    def dataset_json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.raw / "dataset.json").read_text())
        return content

    @property
    def has_regions(self) -> bool:
        return any(isinstance(value, list) for value in self.dataset_json["labels"].values())

    @property
    def class_names(self) -> dict[int, str]:
        """Label value to name, background and ignore label left out; a region stands under its
        first label."""
        labels = self.dataset_json["labels"]
        first = {
            name: value[0] if isinstance(value, list) else value for name, value in labels.items()
        }
        return {
            value: name
            for name, value in sorted(first.items(), key=lambda item: item[1])
            if value != 0 and name != "ignore"
        }

    @property
    def model_folder(self) -> Path:
        return (
            self.folder
            / "nnUNet_results"
            / self.dataset_name
            / f"{self.settings.trainer}__nnUNetPlans__{CONFIGURATION}"
        )

    def _environment(self) -> dict[str, str]:
        folders = {
            name: str(self.folder / name)
            for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        }
        for path in folders.values():
            Path(path).mkdir(parents=True, exist_ok=True)
        processes = str(_processes())
        workers = os.environ.get("nnUNet_n_proc_DA", processes)
        caches = self.folder / "cache"
        return {
            **os.environ,
            **folders,
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_def_n_proc": processes,
            # nnU-Net's planner stops at 0, which a user may have set for training.
            "nnUNet_n_proc_DA": workers if workers != "0" else processes,
            # torch.compile takes longer than this training.
            "nnUNet_compile": "f",
            "STUNET_EPOCHS": str(self.settings.epochs),
            "STUNET_ITERATIONS": str(ITERATIONS_PER_EPOCH),
            "STUNET_VAL_ITERATIONS": str(VAL_ITERATIONS_PER_EPOCH),
            "MPLCONFIGDIR": str(caches / "matplotlib"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "PYTHONUNBUFFERED": "1",
        }

    def _stock(self, command: str, *arguments: str) -> None:
        run_stock(
            command,
            arguments,
            self.folder,
            self._environment(),
            self._lock.fileno(),
            self.settings.epochs,
        )


def _processes() -> int:
    return min(os.cpu_count() or 1, MOST_PROCESSES)
