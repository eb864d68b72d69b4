"""What the experiments on hippocampi share: settings that stay, a work folder, stock commands run
in it, a training that continues.

Used by ``volume_fusion_experiment.py``, ``ranking_experiment.py`` and ``hospitals.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from volume_fusion_arms import Network, networks

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import trainers_folder
from stunet_plugin.utils.files import write_atomically

BASE_CONFIGURATION, CONFIGURATION = "3d_fullres", "3d_fullres_small_batch"
SPLIT_SEED = 2025


@dataclass(frozen=True)
class Settings:
    """What must stay the same for results to belong together; kept in the work folder.

    Attributes:
        size: of STU-Net.
        batch: samples of a step, in pretraining and fine-tuning.
        patch: voxels per axis, for all networks; None is what each planner chooses.
        pretrain_iterations, fine_tune_iterations: steps.
        iterations_per_epoch: how often nnU-Net validates and saves.
        test_cases: held out.
        cases: numbers of labelled cases.
        seeds: of the choice of labelled cases and of the initial weights.
        device: cpu or cuda.
        mirroring: in augmentation and prediction of the trainings on labels.
    """

    size: str
    batch: int
    patch: tuple[int, ...] | None
    pretrain_iterations: int
    fine_tune_iterations: int
    iterations_per_epoch: int
    test_cases: int
    cases: tuple[int, ...]
    seeds: tuple[int, ...]
    device: str
    mirroring: bool


class CommandError(Exception):
    """A stock command failed; the message says which and where its output is."""


class Experiment:
    """The work folder, and the stock commands in its environment."""

    def __init__(self, settings: Settings, data: Path, work: Path, dry_run: bool) -> None:
        self.settings, self.data, self.work, self.dry_run = settings, data, work, dry_run
        self.networks = networks(settings.size)
        self.raw, self.preprocessed = work / "nnUNet_raw", work / "nnUNet_preprocessed"

    def run(self, arguments: Sequence[object], log: Path, **options: str) -> None:
        """Print a command with what it needs of the environment, and run it with its output in a
        log."""
        words = [str(argument) for argument in arguments]
        variables = {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(log.parent),
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            **options,
        }
        shown = " ".join(
            f"{name}={value}"
            for name, value in {"nnUNet_results": variables["nnUNet_results"], **options}.items()
        )
        print(f"{shown} {shlex.join(words)}", flush=True)
        if self.dry_run:
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("nnUNet_", "STUNET_"))
        }
        with log.open("a") as output:
            command = [find_command(words[0]), *words[1:]]
            code = subprocess.run(
                command, env={**inherited, **variables}, stdout=output, stderr=output
            ).returncode
        if code != 0:
            raise CommandError(f"{shlex.join(words)} ended with {code}; its output is in {log}.")

    def cases(self) -> tuple[list[str], list[str]]:
        """Return the test cases and the others, the same for the same data."""
        return hold_out(
            [
                path.name.removesuffix(".nii.gz")
                for path in (self.data / "labelsTr").glob("*.nii.gz")
            ],
            self.settings,
        )

    def folds(self) -> dict[tuple[int, int], list[str]]:
        """Return the labelled cases of each (seed, number of cases), in the order of the folds."""
        pool = self.cases()[1]
        return {
            (seed, count): draw_labelled(pool, seed, count)
            for seed in self.settings.seeds
            for count in self.settings.cases
        }

    def plan(self, dataset: tuple[int, str], network: Network, log: Path) -> None:
        """Plan a dataset (ID and folder) for a network, and add the configuration that is trained
        with."""
        number, folder = dataset
        planner = (
            ["stunet", "plan", "-pl", network.planner]
            if network.planner
            else ["nnUNetv2_plan_experiment"]
        )
        self.run([*planner, "-d", number], log)
        if not self.dry_run:
            file = self.preprocessed / folder / f"{network.plans}.json"
            plans = json.loads(file.read_text())
            plans["configurations"][CONFIGURATION] = self.configuration()
            write_atomically(file, json.dumps(plans, indent=2))

    def configuration(self) -> dict[str, Any]:
        """What all networks are trained with; in the plans file it stands beside the planner's
        own."""
        patch = {"patch_size": list(self.settings.patch)} if self.settings.patch else {}
        return {"inherits_from": BASE_CONFIGURATION, "batch_size": self.settings.batch, **patch}

    def budget(self, iterations: int) -> dict[str, str]:
        """Options for a number of iterations, in whole epochs."""
        per_epoch = min(self.settings.iterations_per_epoch, iterations)
        return {
            "STUNET_EPOCHS": str(round(iterations / per_epoch)),
            "STUNET_ITERATIONS": str(per_epoch),
        }

    def training_options(self, iterations: int, seed: int) -> dict[str, str]:
        """Options of a training on labels."""
        options = {
            **self.budget(iterations),
            "STUNET_VAL_ITERATIONS": "1",
            "STUNET_SEED": str(seed),
        }
        return options if self.settings.mirroring else {**options, "STUNET_MIRRORING": "0"}

    def train(
        self,
        arguments: list[object],
        fold: Path,
        done: Path,
        log: Path,
        options: dict[str, str],
        start: Sequence[object] = (),
    ) -> None:
        """Run, continue or only validate a training, whatever is left to do."""
        if done.is_file():
            return
        command = ["nnUNetv2_train", *arguments, "-device", self.settings.device]
        if (fold / "checkpoint_final.pth").is_file():
            command.append("--val")
        elif (fold / "checkpoint_latest.pth").is_file():
            command.append("--c")
        else:
            command.extend(start)
        self.run(command, log, **options)


def hold_out(cases: Sequence[str], settings: Settings) -> tuple[list[str], list[str]]:
    """Split cases into those to test on and the others; the order in which they come does not
    matter.

    Raises:
        PluginError: too few cases are left.
    """
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(sorted(cases)).tolist()
    test, pool = sorted(shuffled[: settings.test_cases]), sorted(shuffled[settings.test_cases :])
    if len(pool) < max(settings.cases):
        raise PluginError(
            f"{len(cases)} cases less {settings.test_cases} for testing leave {len(pool)}, fewer"
            f" than {max(settings.cases)}. Lower --test-cases or --cases."
        )
    return test, pool


def draw_labelled(pool: Sequence[str], seed: int, count: int) -> list[str]:
    """Draw labelled cases; those of a smaller number are among those of a larger one."""
    return sorted(np.random.default_rng(seed).permutation(sorted(pool))[:count].tolist())


def link_all(pairs: Iterable[tuple[Path, Path]], folder: Path) -> None:
    """Make links into a folder, but for those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for source, link in pairs:
        if not link.exists():
            link.symlink_to(source.resolve())


def keep_settings(work: Path, settings: Settings) -> None:
    """Write the settings into a new work folder, or compare with those there.

    Raises:
        PluginError: the folder was begun with other settings.
    """
    file = work / "settings.json"
    content = json.dumps(asdict(settings), indent=2)
    if file.is_file() and file.read_text() != content:
        was = json.loads(file.read_text())
        changed = [
            f"{name} was {was.get(name)}"
            for name, value in json.loads(content).items()
            if was.get(name) != value
        ]
        raise PluginError(
            f"{work} was begun with other settings ({', '.join(changed)}). Use those, or another"
            " --work."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what all experiments on few hippocampi take: data, how samples are drawn, where it
    runs."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="raw dataset of nnU-Net with labels, .nii.gz",
    )
    add("--work", type=Path, required=True, metavar="FOLDER", help="for everything in between")
    add("--batch", type=int, default=2, help="samples of a step")
    add(
        "--patch",
        type=int,
        nargs=3,
        metavar="VOXELS",
        help="of all networks (default: what each planner chooses)",
    )
    add("--iterations-per-epoch", type=int, default=50, help="between two validations")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of trainings and predictions")
    add(
        "--no-mirroring",
        dest="mirroring",
        action="store_false",
        help="predict eight times faster; no mirrored training samples",
    )
    add("--dry-run", action="store_true", help="print the commands and run none")


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that they give.

    Raises:
        PluginError: there is no data.
    """
    if not (options.data / "labelsTr").is_dir():
        raise PluginError(
            f"--data {options.data} is no raw dataset of nnU-Net: there is no labelsTr in it."
        )
    return {
        "batch": options.batch,
        "patch": tuple(options.patch) if options.patch else None,
        "iterations_per_epoch": options.iterations_per_epoch,
        "test_cases": options.test_cases,
        "device": options.device,
        "mirroring": options.mirroring,
    }


def exit_code_of(work: Callable[[], None], script: str) -> int:
    """Run the work of an experiment's script and return its exit code, with a line about what went
    wrong."""
    try:
        work()
    except PluginError as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same line goes on from here.", file=sys.stderr)
        return 130
    return 0
