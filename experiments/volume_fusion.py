"""Does Volume Fusion help on real images? Hippocampus, few labelled cases: pretrained against from
scratch.

Holds out test cases, pretrains on all others without their labels, then trains on 4, 8 and 16
labelled ones from the
pretrained weights and from scratch: same network, same cases, same initial weights, same number of
    iterations. Everything goes
through the stock commands, each printed before it runs. What is finished stays finished: run the
same line again after an interruption. What is compared stands in ``volume_fusion_arms.py``, numbers
and figures in ``volume_fusion_report.py``.

Plans are made on the unlabelled dataset, which has no test cases, and moved to the labelled one.
There, each combination of seed and number of cases is a fold of its own whose validation cases are
the test cases; the last checkpoint is scored, none is selected.

Exit codes: 0 done, 1 a command failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import SimpleITK as sitk
from common import (
    BASE_CONFIGURATION,
    CONFIGURATION,
    Experiment,
    Settings,
    add_common_options,
    common_settings,
    exit_code_of,
    keep_settings,
    link_all,
)
from rescale_features import write_rescaled
from volume_fusion_arms import GROUPS, PRETRAININGS, Arm, Network, Pretraining
from volume_fusion_report import score_run, write_report

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import write_atomically

UNLABELLED, LABELLED = 904, 905
UNLABELLED_NAME, LABELLED_NAME = "Dataset904_HippocampusUnlabelled", "Dataset905_HippocampusFew"


@dataclass(frozen=True)
class FusionSettings(Settings):
    """Settings of this experiment.

    Attributes:
        merged: the structures are trained and scored as one.
    """

    merged: bool


class FusionExperiment(Experiment):
    """An experiment with two datasets: unlabelled scans, and all cases with labels."""

    settings: FusionSettings

    def prepare_data(self) -> None:
        """Make both datasets: scans alone, and all cases with their labels."""
        test, pool = self.cases()
        scans = self.work / "scans"
        if not self.dry_run:
            link_all(
                (
                    (self.data / "imagesTr" / f"{case}_0000.nii.gz", scans / f"{case}.nii.gz")
                    for case in pool
                ),
                scans,
            )
            self.prepare_labelled([*test, *pool])
        log = self.work / "logs" / "prepare.log"
        if not (self.raw / UNLABELLED_NAME / "dataset.json").is_file():
            name = UNLABELLED_NAME.partition("_")[2]
            self.run(
                [
                    "stunet",
                    "unlabeled",
                    "-i",
                    scans,
                    "-d",
                    UNLABELLED,
                    "-n",
                    name,
                    "--modality",
                    "MR",
                    "-np",
                    2,
                ],
                log,
            )
        for dataset, folder in ((UNLABELLED, UNLABELLED_NAME), (LABELLED, LABELLED_NAME)):
            if not (self.preprocessed / folder / "dataset_fingerprint.json").is_file():
                self.run(["nnUNetv2_extract_fingerprint", "-d", dataset, "-np", 2], log)

    def prepare_labelled(self, cases: Sequence[str]) -> None:
        """Make the dataset with labels: links, but for labels that are merged into one."""
        target = self.raw / LABELLED_NAME
        for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            merge = self.settings.merged and part == "labelsTr"
            pairs = (
                (self.data / part / f"{case}{ending}", target / part / f"{case}{ending}")
                for case in cases
            )
            (merge_all if merge else link_all)(pairs, target / part)
        description = json.loads((self.data / "dataset.json").read_text())
        if self.settings.merged:
            description["labels"] = {"background": 0, "structure": 1}
        write_atomically(
            target / "dataset.json", json.dumps({**description, "numTraining": len(cases)})
        )

    def prepare_plans(self, network: Network) -> None:
        """Plan on the scans, add a configuration with the batch size, move the plans to the
        labelled dataset, preprocess both."""
        log = self.work / "logs" / "prepare.log"
        done = self.work / f"prepared_{network.plans}"
        if done.is_file():
            return
        self.plan((UNLABELLED, UNLABELLED_NAME), network, log)
        self.run(
            [
                "nnUNetv2_move_plans_between_datasets",
                "-s",
                UNLABELLED,
                "-t",
                LABELLED,
                "-sp",
                network.plans,
            ],
            log,
        )
        if not self.dry_run:
            # nnU-Net's planner would have copied it; the plans here come from elsewhere.
            shutil.copyfile(
                self.raw / LABELLED_NAME / "dataset.json",
                self.preprocessed / LABELLED_NAME / "dataset.json",
            )
        for dataset in (UNLABELLED, LABELLED):
            self.run(
                [
                    "nnUNetv2_preprocess",
                    "-d",
                    dataset,
                    "-plans_name",
                    network.plans,
                    "-c",
                    BASE_CONFIGURATION,
                    "-np",
                    2,
                ],
                log,
            )
        if not self.dry_run:
            splits = [
                {"train": labelled, "val": self.cases()[0]} for labelled in self.folds().values()
            ]
            write_atomically(
                self.preprocessed / LABELLED_NAME / "splits_final.json", json.dumps(splits)
            )
            done.touch()

    def pretrain(self, pretraining: Pretraining) -> Path:
        """Pretrain unless that is done; return the checkpoint."""
        network = self.networks[pretraining.network]
        results = self.work / "pretraining" / pretraining.name
        trained = f"{network.pretext_trainer}__{network.plans}__{CONFIGURATION}"
        fold = results / UNLABELLED_NAME / trained / "fold_all"
        budget = max(int(self.settings.pretrain_iterations * pretraining.share), 1)
        options = {
            **self.budget(budget),
            "STUNET_VAL_ITERATIONS": "5",
            "STUNET_SEED": "1",
            **pretraining.options,
        }
        arguments = [
            UNLABELLED,
            CONFIGURATION,
            "all",
            "-tr",
            network.pretext_trainer,
            "-p",
            network.plans,
        ]
        self.train(
            arguments,
            fold,
            fold / "validation" / "pretext_score.json",
            results / "log.txt",
            options,
        )
        return fold / "checkpoint_final.pth"

    def fine_tune(self, arm: Arm, seed: int, count: int) -> Path:
        """Train on labelled cases unless that is done, and score the test cases; return the folder
        of the run."""
        network = self.networks[arm.network]
        weights = self.pretrain(PRETRAININGS[arm.pretraining]) if arm.pretraining else None
        if weights is not None and arm.rescaled:
            rescaled = weights.with_name("checkpoint_rescaled.pth")
            if not self.dry_run:
                write_rescaled(
                    weights,
                    self.preprocessed / UNLABELLED_NAME / f"{network.plans}_{BASE_CONFIGURATION}",
                    rescaled,
                )
            weights = rescaled
        results = self.work / "fine_tuning" / arm.folder / f"cases_{count}_seed_{seed}"
        trainer = network.segmentation_trainer + arm.suffix
        number = list(self.folds()).index((seed, count))
        fold = (
            results
            / LABELLED_NAME
            / f"{trainer}__{network.plans}__{CONFIGURATION}"
            / f"fold_{number}"
        )
        options = self.training_options(self.settings.fine_tune_iterations, seed)
        if arm.warmup:
            options["STUNET_WARMUP_EPOCHS"] = str(
                max(round(arm.warmup * int(options["STUNET_EPOCHS"])), 1)
            )
        arguments: list[object] = [
            LABELLED,
            CONFIGURATION,
            number,
            "-tr",
            trainer,
            "-p",
            network.plans,
        ]
        start = ["-pretrained_weights", weights] if weights else []
        self.train(
            arguments,
            fold,
            fold / "validation" / "summary.json",
            results / "log.txt",
            {**options, **arm.options},
            start,
        )
        if not self.dry_run:
            score_run(fold, self.raw / LABELLED_NAME / "labelsTr", results / "scores.json")
        return results


def merge_all(pairs: Iterable[tuple[Path, Path]], folder: Path) -> None:
    """Write label images into a folder in which every structure is 1, but for those that are
    there."""
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in pairs:
        if not target.exists():
            unfinished = target.with_name(f"unfinished_{target.name}")
            sitk.WriteImage(
                sitk.Cast(sitk.ReadImage(str(source)) > 0, sitk.sitkUInt8), str(unfinished)
            )
            unfinished.replace(target)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(
            "Volume Fusion on hippocampus: pretrain, fine-tune on few cases, compare with training"
            " from scratch."
        ),
        epilog=(
            "Example: python experiments/volume_fusion.py --data"
            " ../shared/data/Dataset004_Hippocampus --work vf --groups stunet scheme classes --json"
            " benchmarks/results/volume_fusion.json --figures docs/experiments"
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--groups", nargs="+", choices=list(GROUPS), default=["stunet"], help="what to compare")
    add("--size", default="small", help="of STU-Net")
    add("--cases", type=int, nargs="+", default=[4, 8, 16], help="numbers of labelled cases")
    add(
        "--only-cases",
        type=int,
        nargs="+",
        metavar="N",
        help="of --cases, run these now (default: all)",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="of the labelled cases and the initial weights",
    )
    add("--test-cases", type=int, default=60, help="held out")
    add("--pretrain-iterations", type=int, default=3000, help="of each pretraining")
    add("--fine-tune-iterations", type=int, default=300, help="of each training on labels")
    add("--merged", action="store_true", help="train on the structures as one, and score them so")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the numbers of all finished runs go; the table goes to .md beside it",
    )
    add("--figures", type=Path, metavar="FOLDER", help="where the plots go")
    return parser


def carry_out(options: argparse.Namespace) -> None:
    """Run what is missing of the groups that are asked for.

    Raises:
        PluginError: wrong input, or a work folder of other settings.
        CommandError: a command failed.
    """
    settings = FusionSettings(
        **common_settings(options),
        size=options.size,
        pretrain_iterations=options.pretrain_iterations,
        fine_tune_iterations=options.fine_tune_iterations,
        cases=tuple(sorted(set(options.cases))),
        seeds=tuple(options.seeds),
        merged=options.merged,
    )
    arms = [arm for group in options.groups for arm in GROUPS[group]]
    work = options.work.resolve()
    wanted = options.only_cases or settings.cases
    if not set(wanted) <= set(settings.cases):
        raise PluginError(f"--only-cases {wanted} must be among --cases {list(settings.cases)}.")
    if not options.dry_run:
        keep_settings(work, settings)
    experiment = FusionExperiment(settings, options.data.resolve(), work, options.dry_run)
    experiment.prepare_data()
    for name in dict.fromkeys(arm.network for arm in arms):
        experiment.prepare_plans(experiment.networks[name])
    for seed, count in experiment.folds():
        for arm in arms if count in wanted else ():
            experiment.fine_tune(arm, seed, count)
            if options.json is not None and not options.dry_run:
                write_report(work, asdict(settings), options.json, options.figures)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: carry_out(options), __file__)


if __name__ == "__main__":
    sys.exit(main())
