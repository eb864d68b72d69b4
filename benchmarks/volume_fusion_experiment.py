"""Does Volume Fusion help on real images? Hippocampus, few labelled cases: pretrained against from scratch.

Holds out test cases, pretrains on all others without their labels, then trains on 4, 8 and 16 labelled ones from the
pretrained weights and from scratch: same network, same cases, same initial weights, same number of iterations. Everything goes
through the stock commands, each printed before it runs. What is finished stays finished: run the same line again after an
interruption. What is compared stands in ``volume_fusion_arms.py``, numbers and figures in ``volume_fusion_report.py``.

Plans are made on the unlabelled dataset, which has no test cases, and moved to the labelled one. There, each combination of
seed and number of cases is a fold of its own whose validation cases are the test cases; the last checkpoint is scored,
none is selected.

Exit codes: 0 done, 1 a command failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from volume_fusion_arms import GROUPS, PRETRAININGS, Arm, Network, Pretraining, networks
from volume_fusion_report import score_run, write_report

from stunet_plugin.errors import PluginError
from stunet_plugin.registration import trainers_folder, write_atomically
from stunet_plugin.stock_commands import find_command

UNLABELLED, LABELLED = 904, 905
UNLABELLED_NAME, LABELLED_NAME = "Dataset904_HippocampusUnlabelled", "Dataset905_HippocampusFew"
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
        """Print a command with what it needs of the environment, and run it with its output in a log."""
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
        shown = " ".join(f"{name}={value}" for name, value in {"nnUNet_results": variables["nnUNet_results"], **options}.items())
        print(f"{shown} {shlex.join(words)}", flush=True)
        if self.dry_run:
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet_", "STUNET_"))}
        with log.open("a") as output:
            command = [find_command(words[0]), *words[1:]]
            code = subprocess.run(command, env={**inherited, **variables}, stdout=output, stderr=output).returncode
        if code != 0:
            raise CommandError(f"{shlex.join(words)} ended with {code}; its output is in {log}.")

    # --- data ---------------------------------------------------------------------------------------------------------

    def cases(self) -> tuple[list[str], list[str]]:
        """Return the test cases and the others, the same for the same data."""
        return hold_out([path.name.removesuffix(".nii.gz") for path in (self.data / "labelsTr").glob("*.nii.gz")], self.settings)

    def folds(self) -> dict[tuple[int, int], list[str]]:
        """Return the labelled cases of each (seed, number of cases), in the order of the folds."""
        pool = self.cases()[1]
        return {(seed, count): draw_labelled(pool, seed, count) for seed in self.settings.seeds for count in self.settings.cases}

    def prepare_data(self) -> None:
        """Make both datasets: scans alone, and all cases with their labels."""
        test, pool = self.cases()
        scans = self.work / "scans"
        if not self.dry_run:
            link_all(((self.data / "imagesTr" / f"{case}_0000.nii.gz", scans / f"{case}.nii.gz") for case in pool), scans)
            target = self.raw / LABELLED_NAME
            for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
                files = [f"{case}{ending}" for case in (*test, *pool)]
                link_all(((self.data / part / file, target / part / file) for file in files), target / part)
            description = json.loads((self.data / "dataset.json").read_text())
            write_atomically(target / "dataset.json", json.dumps({**description, "numTraining": len(test) + len(pool)}))
        log = self.work / "logs" / "prepare.log"
        if not (self.raw / UNLABELLED_NAME / "dataset.json").is_file():
            name = UNLABELLED_NAME.partition("_")[2]
            self.run(["stunet", "unlabeled", "-i", scans, "-d", UNLABELLED, "-n", name, "--modality", "MR", "-np", 2], log)
        for dataset, folder in ((UNLABELLED, UNLABELLED_NAME), (LABELLED, LABELLED_NAME)):
            if not (self.preprocessed / folder / "dataset_fingerprint.json").is_file():
                self.run(["nnUNetv2_extract_fingerprint", "-d", dataset, "-np", 2], log)

    def prepare_plans(self, network: Network) -> None:
        """Plan on the scans, add a configuration with the batch size, move the plans to the labelled dataset, preprocess both."""
        log = self.work / "logs" / "prepare.log"
        done = self.work / f"prepared_{network.plans}"
        if done.is_file():
            return
        planner = ["stunet", "plan", "-pl", network.planner] if network.planner else ["nnUNetv2_plan_experiment"]
        self.run([*planner, "-d", UNLABELLED], log)
        if not self.dry_run:
            file = self.preprocessed / UNLABELLED_NAME / f"{network.plans}.json"
            plans = json.loads(file.read_text())
            plans["configurations"][CONFIGURATION] = self.configuration()
            write_atomically(file, json.dumps(plans, indent=2))
        self.run(["nnUNetv2_move_plans_between_datasets", "-s", UNLABELLED, "-t", LABELLED, "-sp", network.plans], log)
        if not self.dry_run:
            # nnU-Net's planner would have copied it; the plans here come from elsewhere.
            shutil.copyfile(self.raw / LABELLED_NAME / "dataset.json", self.preprocessed / LABELLED_NAME / "dataset.json")
        for dataset in (UNLABELLED, LABELLED):
            self.run(["nnUNetv2_preprocess", "-d", dataset, "-plans_name", network.plans, "-c", BASE_CONFIGURATION, "-np", 2], log)
        if not self.dry_run:
            splits = [{"train": labelled, "val": self.cases()[0]} for labelled in self.folds().values()]
            write_atomically(self.preprocessed / LABELLED_NAME / "splits_final.json", json.dumps(splits))
            done.touch()

    def configuration(self) -> dict[str, Any]:
        """What all networks are trained with; in the plans file it stands beside the planner's own."""
        patch = {"patch_size": list(self.settings.patch)} if self.settings.patch else {}
        return {"inherits_from": BASE_CONFIGURATION, "batch_size": self.settings.batch, **patch}

    # --- trainings ------------------------------------------------------------------------------------------------------

    def pretrain(self, pretraining: Pretraining) -> Path:
        """Pretrain unless that is done; return the checkpoint."""
        network = self.networks[pretraining.network]
        results = self.work / "pretraining" / pretraining.name
        trained = f"{network.pretext_trainer}__{network.plans}__{CONFIGURATION}"
        fold = results / UNLABELLED_NAME / trained / "fold_all"
        budget = max(int(self.settings.pretrain_iterations * pretraining.share), 1)
        options = {**self.budget(budget), "STUNET_VAL_ITERATIONS": "5", "STUNET_SEED": "1", **pretraining.options}
        arguments = [UNLABELLED, CONFIGURATION, "all", "-tr", network.pretext_trainer, "-p", network.plans]
        self.train(arguments, fold, fold / "validation" / "pretext_score.json", results / "log.txt", options)
        return fold / "checkpoint_final.pth"

    def fine_tune(self, arm: Arm, seed: int, count: int) -> Path:
        """Train on labelled cases unless that is done, and score the test cases; return the folder of the run."""
        network = self.networks[arm.network]
        weights = self.pretrain(PRETRAININGS[arm.pretraining]) if arm.pretraining else None
        results = self.work / "fine_tuning" / arm.folder / f"cases_{count}_seed_{seed}"
        trainer = network.segmentation_trainer + arm.suffix
        number = list(self.folds()).index((seed, count))
        fold = results / LABELLED_NAME / f"{trainer}__{network.plans}__{CONFIGURATION}" / f"fold_{number}"
        options = {**self.budget(self.settings.fine_tune_iterations), "STUNET_VAL_ITERATIONS": "1", "STUNET_SEED": str(seed)}
        if not self.settings.mirroring:
            options["STUNET_MIRRORING"] = "0"
        if arm.warmup:
            options["STUNET_WARMUP_EPOCHS"] = str(max(round(arm.warmup * int(options["STUNET_EPOCHS"])), 1))
        arguments: list[object] = [LABELLED, CONFIGURATION, number, "-tr", trainer, "-p", network.plans]
        start = ["-pretrained_weights", weights] if weights else []
        self.train(arguments, fold, fold / "validation" / "summary.json", results / "log.txt", {**options, **arm.options}, start)
        if not self.dry_run:
            score_run(fold, self.data / "labelsTr", results / "scores.json")
        return results

    def budget(self, iterations: int) -> dict[str, str]:
        """Options for a number of iterations, in whole epochs."""
        per_epoch = min(self.settings.iterations_per_epoch, iterations)
        return {"STUNET_EPOCHS": str(round(iterations / per_epoch)), "STUNET_ITERATIONS": str(per_epoch)}

    def train(
        self, arguments: list[object], fold: Path, done: Path, log: Path, options: dict[str, str], start: Sequence[object] = ()
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
    """Split cases into those to test on and the others; the order in which they come does not matter.

    Raises:
        PluginError: too few cases are left.
    """
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(sorted(cases)).tolist()
    test, pool = sorted(shuffled[: settings.test_cases]), sorted(shuffled[settings.test_cases :])
    if len(pool) < max(settings.cases):
        raise PluginError(
            f"{len(cases)} cases less {settings.test_cases} for testing leave {len(pool)}, fewer than {max(settings.cases)}. "
            f"Lower --test-cases or --cases."
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
        changed = [f"{name} was {was.get(name)}" for name, value in json.loads(content).items() if was.get(name) != value]
        raise PluginError(f"{work} was begun with other settings ({', '.join(changed)}). Use those, or another --work.")
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what all experiments on few hippocampi take: data, how samples are drawn, where it runs."""
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="raw dataset of nnU-Net with labels, .nii.gz")
    add("--work", type=Path, required=True, metavar="FOLDER", help="for everything in between")
    add("--batch", type=int, default=2, help="samples of a step")
    add("--patch", type=int, nargs=3, metavar="VOXELS", help="of all networks (default: what each planner chooses)")
    add("--iterations-per-epoch", type=int, default=50, help="between two validations")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of trainings and predictions")
    add("--no-mirroring", dest="mirroring", action="store_false", help="predict eight times faster; no mirrored training samples")
    add("--dry-run", action="store_true", help="print the commands and run none")


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that they give.

    Raises:
        PluginError: there is no data.
    """
    if not (options.data / "labelsTr").is_dir():
        raise PluginError(f"--data {options.data} is no raw dataset of nnU-Net: there is no labelsTr in it.")
    return {
        "batch": options.batch,
        "patch": tuple(options.patch) if options.patch else None,
        "iterations_per_epoch": options.iterations_per_epoch,
        "test_cases": options.test_cases,
        "device": options.device,
        "mirroring": options.mirroring,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Volume Fusion on hippocampus: pretrain, fine-tune on few cases, compare with training from scratch.",
        epilog="Example: python benchmarks/volume_fusion_experiment.py --data ../shared/data/Dataset004_Hippocampus --work vf "
        "--groups stunet scheme classes --json benchmarks/results/volume_fusion.json --figures docs/experiments",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--groups", nargs="+", choices=list(GROUPS), default=["stunet"], help="what to compare")
    add("--size", default="small", help="of STU-Net")
    add("--cases", type=int, nargs="+", default=[4, 8, 16], help="numbers of labelled cases")
    add("--only-cases", type=int, nargs="+", metavar="N", help="of --cases, run these now (default: all)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the labelled cases and the initial weights")
    add("--test-cases", type=int, default=60, help="held out")
    add("--pretrain-iterations", type=int, default=3000, help="of each pretraining")
    add("--fine-tune-iterations", type=int, default=300, help="of each training on labels")
    add("--json", type=Path, metavar="FILE", help="where the numbers of all finished runs go; the table goes to .md beside it")
    add("--figures", type=Path, metavar="FOLDER", help="where the plots go")
    return parser


def carry_out(options: argparse.Namespace) -> None:
    """Run what is missing of the groups that are asked for.

    Raises:
        PluginError: wrong input, or a work folder of other settings.
        CommandError: a command failed.
    """
    settings = Settings(
        **common_settings(options),
        size=options.size,
        pretrain_iterations=options.pretrain_iterations,
        fine_tune_iterations=options.fine_tune_iterations,
        cases=tuple(sorted(set(options.cases))),
        seeds=tuple(options.seeds),
    )
    arms = [arm for group in options.groups for arm in GROUPS[group]]
    work = options.work.resolve()
    wanted = options.only_cases or settings.cases
    if not set(wanted) <= set(settings.cases):
        raise PluginError(f"--only-cases {wanted} must be among --cases {list(settings.cases)}.")
    if not options.dry_run:
        keep_settings(work, settings)
    experiment = Experiment(settings, options.data.resolve(), work, options.dry_run)
    experiment.prepare_data()
    for name in dict.fromkeys(arm.network for arm in arms):
        experiment.prepare_plans(experiment.networks[name])
    for seed, count in experiment.folds():
        for arm in arms if count in wanted else ():
            experiment.fine_tune(arm, seed, count)
            if options.json is not None and not options.dry_run:
                write_report(work, asdict(settings), options.json, options.figures)


def exit_code_of(work: Callable[[], None], script: str) -> int:
    """Run the work of an experiment's script and return its exit code, with a line about what went wrong."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: carry_out(options), __file__)


if __name__ == "__main__":
    sys.exit(main())
