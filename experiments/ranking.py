"""Does CCFV rank pretrained weights as fine-tuning does? Hippocampus, few labelled cases, STU-Net
in several sizes.

Candidates of each size: pretrained with labels (the whole hippocampus, on cases that nothing else
    is done with), pretrained
without (Volume Fusion), each also for a part of the iterations, and random weights. ``stunet rank``
scores them on the labelled cases that they are then fine-tuned on, for two classes (anterior,
posterior); the Dice of held-out cases says who was right. Everything goes through the stock
commands; what is finished stays finished: run the same line again after an interruption.

Data, plans and the way of training are those of ``volume_fusion_experiment.py``.

Exit codes: 0 done, 1 a command failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from common import (
    BASE_CONFIGURATION,
    CONFIGURATION,
    Settings,
    add_common_options,
    common_settings,
    exit_code_of,
    keep_settings,
    link_all,
)
from ranking_report import scores_of_ranking, write_report
from volume_fusion import LABELLED, LABELLED_NAME, UNLABELLED, UNLABELLED_NAME, FusionExperiment
from volume_fusion_report import mean_scores, score_run

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import write_atomically

UPSTREAM, UPSTREAM_NAME = 906, "Dataset906_HippocampusWhole"
PLANS = "nnUNetPlans"
RANDOM, SUPERVISED, FUSION = "random", "supervised", "Volume Fusion"


@dataclass(frozen=True)
class RankingSettings(Settings):
    """Those of the experiment on Volume Fusion, and what is ranked.

    Attributes:
        sizes: of STU-Net.
        shares: of the pretraining's iterations, each a candidate.
    """

    sizes: tuple[str, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """Weights to start from: their size, how they were pretrained, and for which share of the
    iterations; or a file."""

    size: str
    kind: str
    share: float = 1.0
    file: Path | None = None

    @property
    def name(self) -> str:
        share = "" if self.share == 1 or self.file else f" {self.share:g}"
        return f"{self.size} {self.kind}{share}"

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.name)


class RankingExperiment(FusionExperiment):
    """The work folder of the experiment."""

    settings: RankingSettings

    def upstream_cases(self) -> list[str]:
        """Cases that are neither tested nor fine-tuned on, with any seed."""
        taken = {case for labelled in self.folds().values() for case in labelled}
        cases = [case for case in self.cases()[1] if case not in taken]
        if len(cases) < 2:
            raise PluginError(
                "No cases are left to pretrain on with labels. Lower --test-cases, --cases or the"
                " number of --seeds."
            )
        return cases

    def prepare(self) -> None:
        """Make the three datasets, plan them alike, and preprocess."""
        self.prepare_data()
        self.prepare_plans(self.networks["stunet"])
        done = self.work / "prepared_upstream"
        if done.is_file():
            return
        log = self.work / "logs" / "prepare.log"
        cases = self.upstream_cases()
        if not self.dry_run:
            self._write_upstream(cases)
        self.run(["nnUNetv2_extract_fingerprint", "-d", UPSTREAM, "-np", 2], log)
        self.run(
            [
                "nnUNetv2_move_plans_between_datasets",
                "-s",
                UNLABELLED,
                "-t",
                UPSTREAM,
                "-sp",
                PLANS,
            ],
            log,
        )
        folder = self.preprocessed / UPSTREAM_NAME
        if not self.dry_run:
            shutil.copyfile(self.raw / UPSTREAM_NAME / "dataset.json", folder / "dataset.json")
        self.run(
            [
                "nnUNetv2_preprocess",
                "-d",
                UPSTREAM,
                "-plans_name",
                PLANS,
                "-c",
                BASE_CONFIGURATION,
                "-np",
                2,
            ],
            log,
        )
        if not self.dry_run:
            # One case to validate on: nnU-Net predicts them all at the end.
            write_atomically(
                folder / "splits_final.json", json.dumps([{"train": cases[1:], "val": cases[:1]}])
            )
            done.touch()

    def _write_upstream(self, cases: Sequence[str]) -> None:
        """The whole hippocampus as one class."""
        target = self.raw / UPSTREAM_NAME
        images = (
            (
                self.data / "imagesTr" / f"{case}_0000.nii.gz",
                target / "imagesTr" / f"{case}_0000.nii.gz",
            )
            for case in cases
        )
        link_all(images, target / "imagesTr")
        (target / "labelsTr").mkdir(exist_ok=True)
        for case in cases:
            label = sitk.ReadImage(str(self.data / "labelsTr" / f"{case}.nii.gz"))
            sitk.WriteImage(
                sitk.Cast(label > 0, sitk.sitkUInt8), str(target / "labelsTr" / f"{case}.nii.gz")
            )
        description = json.loads((self.data / "dataset.json").read_text())
        labels = {"background": 0, "hippocampus": 1}
        write_atomically(
            target / "dataset.json",
            json.dumps({**description, "labels": labels, "numTraining": len(cases)}),
        )

    def weights(self, candidate: Candidate) -> Path | None:
        """Pretrain unless that is done; return the checkpoint, None for random weights."""
        if candidate.kind == RANDOM or candidate.file:
            return candidate.file
        supervised = candidate.kind == SUPERVISED
        dataset, name, fold = (
            (UPSTREAM, UPSTREAM_NAME, "0") if supervised else (UNLABELLED, UNLABELLED_NAME, "all")
        )
        trainer = (
            f"STUNetTrainer_{candidate.size}"
            if supervised
            else f"VolumeFusionTrainer_STUNet_{candidate.size}"
        )
        results = self.work / "pretraining" / candidate.folder
        folder = results / name / f"{trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{fold}"
        done = folder / "validation" / ("summary.json" if supervised else "pretext_score.json")
        iterations = max(int(self.settings.pretrain_iterations * candidate.share), 1)
        arguments: list[object] = [dataset, CONFIGURATION, fold, "-tr", trainer, "-p", PLANS]
        self.train(
            arguments, folder, done, results / "log.txt", self.training_options(iterations, 1)
        )
        return folder / "checkpoint_final.pth"

    def fine_tune_candidate(self, candidate: Candidate, seed: int) -> float | None:
        """Train on the labelled cases unless that is done; return the mean Dice of the test
        cases."""
        weights = self.weights(candidate)
        trainer = f"STUNetTrainer_{candidate.size}"
        number = list(self.folds()).index((seed, self.settings.cases[0]))
        results = self.work / "fine_tuning" / candidate.folder / f"seed_{seed}"
        fold = results / LABELLED_NAME / f"{trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{number}"
        arguments: list[object] = [LABELLED, CONFIGURATION, number, "-tr", trainer, "-p", PLANS]
        options = self.training_options(self.settings.fine_tune_iterations, seed)
        start = ["-pretrained_weights", weights] if weights else []
        self.train(
            arguments,
            fold,
            fold / "validation" / "summary.json",
            results / "log.txt",
            options,
            start,
        )
        if self.dry_run:
            return None
        scores = results / "scores.json"
        score_run(fold, self.data / "labelsTr", scores)
        return float(mean_scores(json.loads(scores.read_text()))["dice"])

    def rank(
        self, candidates: Sequence[Candidate], seed: int
    ) -> dict[str, dict[str, float | None]]:
        """Score all candidates on the labelled cases of a seed, unless that is done."""
        cases = self.folds()[(seed, self.settings.cases[0])]
        given = [
            f"{one.name}={self.weights(one) or f'random:STUNetTrainer_{one.size}'}"
            for one in candidates
        ]
        found: list[dict[str, Any]] = []
        for variant, more in (("averages", []), ("sums", ["--published-sums"])):
            file = self.work / "ranking" / f"{variant}_seed_{seed}.json"
            names = (
                [entry["name"] for entry in json.loads(file.read_text())["candidates"]]
                if file.is_file()
                else []
            )
            if set(names) != {one.name for one in candidates}:
                if not self.dry_run:
                    file.parent.mkdir(parents=True, exist_ok=True)
                where = [
                    "-d",
                    LABELLED,
                    "-p",
                    PLANS,
                    "-c",
                    CONFIGURATION,
                    "--names",
                    *cases,
                    "--device",
                    self.settings.device,
                ]
                command = ["stunet", "rank", *given, *where, "--seed", seed, *more, "--json", file]
                self.run(command, self.work / "logs" / "rank.log")
            found.append({} if self.dry_run else json.loads(file.read_text()))
        return {} if self.dry_run else scores_of_ranking(*found)


def candidates_of(settings: RankingSettings, files: Sequence[str]) -> list[Candidate]:
    """Return what is ranked: for every size random weights and two kinds of pretraining, and files
    that a user adds.

    Raises:
        PluginError: a file is not given as it should be, or two candidates have one name.
    """
    found = []
    for size in settings.sizes:
        found.append(Candidate(size, RANDOM))
        found += [
            Candidate(size, kind, share)
            for kind in (SUPERVISED, FUSION)
            for share in settings.shares
        ]
    for text in files:
        size, _, rest = text.partition(":")
        name, _, file = rest.partition("=")
        if not (size and name and file) or not Path(file).is_file():
            raise PluginError(
                f"--weights must be SIZE:NAME=CHECKPOINT, a file of nnU-Net v2, not {text!r}."
            )
        found.append(Candidate(size, name, file=Path(file).resolve()))
    if len({one.folder for one in found}) < len(found):
        raise PluginError("Two candidates have the same name. Name --weights differently.")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="CCFV of pretrained weights on hippocampus against the Dice after fine-tuning.",
        epilog=(
            "Example: python experiments/ranking.py --data"
            " ../shared/data/Dataset004_Hippocampus --work ranking --json"
            " experiments/results/ranking.json --figure docs/experiments/ranking.png"
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["tiny", "small"], help="of STU-Net")
    add(
        "--shares",
        type=float,
        nargs="+",
        default=[1.0, 0.1],
        help="of the pretraining's iterations, each a candidate",
    )
    add(
        "--weights",
        nargs="+",
        default=[],
        metavar="SIZE:NAME=FILE",
        help="further candidates: checkpoints of STU-Net",
    )
    add("--cases", type=int, default=8, help="labelled cases to fine-tune and rank on")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2],
        help="of the labelled cases and the initial weights",
    )
    add("--test-cases", type=int, default=40, help="held out")
    add("--pretrain-iterations", type=int, default=1000, help="of each pretraining at share 1")
    add("--fine-tune-iterations", type=int, default=100, help="of each fine-tuning")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the numbers of all finished runs go; the tables go to .md beside it",
    )
    add("--figure", type=Path, metavar="FILE", help="where the scatter plot goes, .png")
    return parser


def run(options: argparse.Namespace) -> None:
    """Prepare, pretrain, rank, fine-tune; report after every fine-tuning."""
    settings = RankingSettings(
        **common_settings(options),
        size=options.sizes[0],
        pretrain_iterations=options.pretrain_iterations,
        fine_tune_iterations=options.fine_tune_iterations,
        cases=(options.cases,),
        seeds=tuple(options.seeds),
        sizes=tuple(options.sizes),
        shares=tuple(options.shares),
    )
    candidates = candidates_of(settings, options.weights)
    work = options.work.resolve()
    if not options.dry_run:
        keep_settings(work, settings)
    experiment = RankingExperiment(settings, options.data.resolve(), work, options.dry_run)
    experiment.prepare()
    runs: list[dict[str, Any]] = []
    for seed in settings.seeds:
        scores = experiment.rank(candidates, seed)
        for candidate in candidates:
            dice = experiment.fine_tune_candidate(candidate, seed)
            if dice is None:
                continue
            runs.append(
                {
                    "name": candidate.name,
                    "size": candidate.size,
                    "seed": seed,
                    "dice": dice,
                    **scores[candidate.name],
                }
            )
            if options.json is not None:
                write_report(runs, asdict(settings), options.json, options.figure)
    if runs:
        print(
            f"Dice of the test cases: {np.min([run['dice'] for run in runs]):.3f} to"
            f" {np.max([run['dice'] for run in runs]):.3f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: run(options), __file__)


if __name__ == "__main__":
    sys.exit(main())
