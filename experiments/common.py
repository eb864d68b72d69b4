"""Experiments on real data: work folder, settings, stock commands, trainings.

What is finished stays finished: the same line resumes after an interruption. Exit codes of all
scripts: 0 done, 1 a command failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import torch

from stunet_plugin.datasets.draws import hold_out
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import CommandFailedError, is_complete, run_command, what_is_left
from stunet_plugin.nnunet.registration import trainers_folder
from stunet_plugin.utils.files import read_json, write_atomically

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import report

TRAINERS = Path(__file__).resolve().parent / "trainers"
BASE_CONFIGURATION, CONFIGURATION = "3d_fullres", "3d_fullres_small_batch"
SPLIT_SEED = 2025
SCORE = "summary.json"
SCORES = {"VolumeFusion": "pretext_score.json", "Prompt": "interaction_curve.json"}
"""What a validation writes, by what the trainer's name begins with."""
FILES = ("data", "work", "json", "figure", "figures", "report")
NOT_KEPT = (
    *FILES,
    "dry_run",
    "groups",
    "arms",
    "networks",
    "only_cases",
    "tasks",
    "starts",
    "seeds",
    "machine",
)
"""Options that may differ between runs in one work folder."""

Change, Variables = Callable[[sitk.Image], sitk.Image], dict[str, str]


class Dataset(NamedTuple):
    """A dataset of the experiment."""

    number: int
    name: str

    @property
    def folder(self) -> str:
        return f"Dataset{self.number:03d}_{self.name}"


@dataclass(frozen=True)
class Network:
    """A network of an experiment.

    Attributes:
        trainer: for labels; it also takes pretrained weights.
        planner: one of ours, or None for nnU-Net's own.
        plans: what the planner's plans are called.
        pretext_trainer: for Volume Fusion.
    """

    trainer: str
    planner: str | None = None
    plans: str = "nnUNetPlans"
    pretext_trainer: str = ""


def networks(stunet_size: str) -> dict[str, Network]:
    """Return the networks by name, STU-Net in one size."""
    pretext = f"VolumeFusionTrainer_STUNet_{stunet_size}"
    found = {"nnunet": Network("nnUNetTrainerBudget")}
    found["stunet"] = Network(f"STUNetTrainer_{stunet_size}", pretext_trainer=pretext)
    for name in ("PCTNet", "FMUNet"):
        ours = f"{name}Trainer", f"{name}Planner", f"{name}Plans", f"VolumeFusionTrainer_{name}"
        found[name.lower()] = Network(*ours)
    return found


class Experiment:
    """A work folder, and the stock commands in its environment."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dry_run = options, options.dry_run
        self.data, self.work = options.data.resolve(), options.work.resolve()
        self.raw, self.preprocessed = self.work / "nnUNet_raw", self.work / "nnUNet_preprocessed"
        self.shown: set[str] = set()
        if not (self.data / "labelsTr").is_dir():
            raise PluginError(f"--data {self.data} is no raw dataset: it has no labelsTr.")
        if not self.dry_run:
            self._keep_settings()

    def _keep_settings(self) -> None:
        """Write the settings into a new work folder, or compare them with those there."""
        kept = {name: value for name, value in vars(self.options).items() if name not in NOT_KEPT}
        kept = json.loads(json.dumps(kept, default=str))
        file = self.work / "settings.json"
        was = read_json(file) if file.is_file() else kept
        changed = [f"{name} was {was.get(name)}" for name in kept if was.get(name) != kept[name]]
        if changed:
            raise PluginError(
                f"{self.work} was begun with other settings ({', '.join(changed)}). Use those, or"
                " another --work."
            )
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(kept, indent=1))

    def run(self, *parts: object, log: Path | None = None, **environment: str) -> None:
        """Print a command and run it with its output in a log.

        Args:
            parts: strings are split at blanks, lists are taken as they are.
            log: its folder is nnUNet_results.
            environment: variables to set.

        Raises:
            SystemExit: the command failed.
        """
        words: list[str] = []
        for part in parts:
            listed = part if isinstance(part, (list, tuple)) else [part]
            words += part.split() if isinstance(part, str) else map(str, listed)
        log = log or self.work / "logs" / "prepare.log"
        environment = {"nnUNet_results": str(log.parent), **environment}
        assignments = " ".join(f"{name}={value}" for name, value in environment.items())
        line = f"{assignments} {shlex.join(words)}"
        # In a dry run nothing is ever done, so it would come again and again.
        if not (self.dry_run and line in self.shown):
            print(line, flush=True)
        self.shown.add(line)
        if self.dry_run:
            return
        ours = ("nnUNet_", "STUNET_")
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_extTrainer": os.pathsep.join((str(trainers_folder()), str(TRAINERS))),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            **environment,
        }
        try:
            run_command(words, variables, log)
        except CommandFailedError as error:
            sys.exit(str(error))

    def preprocess(
        self,
        dataset: Dataset,
        network: Network,
        splits: Sequence[dict[str, Sequence[str]]],
        plans_of: Dataset | None = None,
    ) -> None:
        """Plan a dataset for a network, or take the plans of another one, and preprocess it.

        Plans get a configuration of the batch and the patch that are wanted.
        """
        folder = self.preprocessed / dataset.folder
        done = folder / f"prepared_{network.plans}"
        if done.is_file():
            return
        if not (folder / "dataset_fingerprint.json").is_file():
            self.run("nnUNetv2_extract_fingerprint -np 2 -d", dataset.number)
        if plans_of is not None:
            where = f"-s {plans_of.number} -t {dataset.number} -sp {network.plans}"
            self.run("nnUNetv2_move_plans_between_datasets", where)
            if not self.dry_run:
                # nnU-Net's planner would have copied it.
                shutil.copyfile(self.raw / dataset.folder / "dataset.json", folder / "dataset.json")
        else:
            ours = f"stunet plan -pl {network.planner} -d"
            self.run(ours if network.planner else "nnUNetv2_plan_experiment -d", dataset.number)
            if not self.dry_run:
                file = folder / f"{network.plans}.json"
                plans = read_json(file)
                own = {"inherits_from": BASE_CONFIGURATION, "batch_size": self.options.batch}
                own |= {"patch_size": self.options.patch} if self.options.patch else {}
                plans["configurations"][CONFIGURATION] = own
                write_atomically(file, json.dumps(plans, indent=2))
        named = f"{dataset.number} -plans_name {network.plans} -c {BASE_CONFIGURATION}"
        self.run("nnUNetv2_preprocess -np 2 -d", named)
        if not self.dry_run:
            write_atomically(folder / "splits_final.json", json.dumps(splits))
            done.touch()

    def training_options(self, iterations: int, seed: int, validation: int = 1) -> Variables:
        """Return the variables of a training on labels, in whole epochs."""
        per_epoch = min(self.options.iterations_per_epoch, iterations)
        options = {
            "STUNET_EPOCHS": str(round(iterations / per_epoch)),
            "STUNET_ITERATIONS": str(per_epoch),
            "STUNET_VAL_ITERATIONS": str(validation),
            "STUNET_SEED": str(seed),
        }
        return options if self.options.mirroring else {**options, "STUNET_MIRRORING": "0"}

    def train(
        self,
        results: Path,
        dataset: Dataset,
        network: Network,
        fold: int | str,
        options: Variables,
        weights: Path | None = None,
    ) -> Path:
        """Run, resume or only validate a training, whatever is left to do; return its folder."""
        trained = f"{network.trainer}__{network.plans}__{CONFIGURATION}"
        folder = results / dataset.folder / trained / f"fold_{fold}"
        if is_complete(folder, SCORES.get(network.trainer.partition("Trainer")[0], SCORE)):
            return folder
        start = what_is_left(folder, weights)
        names = f"{dataset.number} {CONFIGURATION} {fold} -tr {network.trainer} -p {network.plans}"
        device = f"-device {self.options.device}"
        self.run("nnUNetv2_train", names, device, start, log=results / "log.txt", **options)
        return folder

    def cases(self) -> tuple[list[str], list[str]]:
        """Return the test cases and the others, the same for the same data."""
        return hold_out(cases_in(self.data / "labelsTr"), self.options.test_cases, SPLIT_SEED)


def cases_in(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz"))


def draw_labelled(pool: Sequence[str], seed: int, count: int) -> list[str]:
    """Draw labelled cases; those of a smaller number are among those of a larger one.

    Raises:
        PluginError: there are too few.
    """
    if len(pool) < count:
        raise PluginError(
            f"{len(pool)} cases are left to train on, fewer than {count}. Lower --test-cases or"
            " the number of training cases."
        )
    return sorted(np.random.default_rng(seed).permutation(sorted(pool))[:count].tolist())


def copy_cases(
    data: Path,
    target: Path,
    cases: Sequence[str],
    part: str = "Tr",
    image: Change | None = None,
    label: Change | None = None,
) -> None:
    """Link cases of a raw dataset into another one, or write them changed; keep what is there."""
    kinds = (("images", "_0000.nii.gz", image), ("labels", ".nii.gz", label))
    for kind, ending, change in kinds:
        folder = target / f"{kind}{part}"
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            file, original = folder / f"{case}{ending}", data / f"{kind}Tr" / f"{case}{ending}"
            if file.exists():
                continue
            if change is None:
                file.symlink_to(original.resolve())
            else:
                unfinished = file.with_name(f"unfinished_{file.name}")
                sitk.WriteImage(change(sitk.ReadImage(str(original))), str(unfinished))
                unfinished.replace(file)


def describe(data: Path, target: Path, count: int, labels: dict[str, int] | None = None) -> None:
    """Write the dataset.json of a copy, with other labels if there are."""
    description = read_json(data / "dataset.json") | {"numTraining": count}
    description |= {"labels": labels} if labels else {}
    write_atomically(target / "dataset.json", json.dumps(description, indent=1))


def relabel(values: Sequence[int]) -> Change:
    """Return a function that maps label 0, 1, 2, ... to the given values."""
    table = np.array(values, np.uint8)

    def change(labels: sitk.Image) -> sitk.Image:
        changed = sitk.GetImageFromArray(table[sitk.GetArrayFromImage(labels).astype(int)])
        changed.CopyInformation(labels)
        return changed

    return change


def read_run(fold: Path) -> dict[str, Any]:
    """Return what a training in a fold's folder reached, read from its checkpoint and summary.

    Raises:
        PluginError: the training or its validation has not finished.
    """
    files = fold / "checkpoint_final.pth", fold / "validation" / "summary.json"
    for file in files:
        if not file.is_file():
            raise PluginError(f"{fold} holds no finished training: {file.name} is missing.")
    checkpoint = torch.load(files[0], map_location="cpu", weights_only=False)
    log, summary = checkpoint["logging"], read_json(files[1])
    seconds = np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"])
    return {
        "trainer": checkpoint["trainer_name"],
        "train_loss": [float(value) for value in log["train_losses"]],
        "pseudo_dice": [[*map(float, epoch)] for epoch in log["dice_per_class_or_region"]],
        "epoch_seconds": seconds.tolist(),
        "validation_cases": len(summary["metric_per_case"]),
        "validation_dice": {label: one["Dice"] for label, one in summary["mean"].items()},
        "mean_validation_dice": float(summary["foreground_mean"]["Dice"]),
    }


def write_json(out: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with null for every NaN, which JSON does not have."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_atomically(out, json.dumps(plain, indent=1))


def build_parser(script: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all experiments take."""
    shown = {"description": description, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(Path(script).name, **shown)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="raw dataset with labels")
    add("--work", type=Path, required=True, metavar="FOLDER", help="for everything in between")
    add("--batch", type=int, default=2, help="samples of a step")
    add("--patch", type=int, nargs=3, metavar="VOXELS", help="of all networks, not the planner's")
    add("--iterations-per-epoch", type=int, default=50, help="between two validations")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of trainings and predictions")
    help_text = "predict eight times faster; no mirrored training samples"
    add("--no-mirroring", dest="mirroring", action="store_false", help=help_text)
    add("--dry-run", action="store_true", help="print the commands and run none")
    return parser


def run_script(
    parser: argparse.ArgumentParser,
    carry_out: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Parse, carry out, and return the exit code."""
    options = parser.parse_args(arguments)
    resume = "The same line resumes."
    return report.run_script(lambda: carry_out(options), parser.prog, resume)
