"""Volume Fusion on hippocampus: pretrained against from scratch, with few labelled cases.

Holds out test cases, pretrains on all others without their labels, then trains on 4, 8 and 16
labelled ones from the pretrained weights and from scratch: same network, cases, initial weights and
number of iterations. What is compared are the ARMS below; every arm differs from its network's
``scratch`` or ``pretrained`` in one thing.

Plans are made on the unlabelled dataset, which has no test cases, and moved to the labelled one.
There each combination of seed and number of cases is a fold whose validation cases are the test
cases; the last checkpoint is scored, none is selected.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from common import (
    Dataset,
    Experiment,
    Network,
    Variables,
    build_parser,
    copy_cases,
    describe,
    draw_labelled,
    networks,
    relabel,
    run_script,
)
from volume_fusion_report import score_run, write_report

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import folder_name, read_json

UNLABELLED, LABELLED = Dataset(904, "HippocampusUnlabelled"), Dataset(905, "HippocampusFew")
Draw = tuple[int, int]
"""Seed and number of labelled cases."""
PRETRAININGS: dict[str, Variables] = {
    "stunet": {},
    "stunet_2023": {"STUNET_VF_SCHEME": "2023"},
    "stunet_k1": {"STUNET_VF_CLASSES": "1"},
    "stunet_k8": {"STUNET_VF_CLASSES": "8"},
    "stunet_standardised": {"STUNET_VF_STANDARDISE": "1"},
    "stunet_large_blocks": {"STUNET_VF_SMALLEST": "0.15", "STUNET_VF_LARGEST": "0.6"},
    "stunet_slow": {"STUNET_VF_RATE": "1e-4"},
    "stunet_long": {},
    "pctnet": {},
    "fmunet": {},
}
"""Variables of each pretraining, beside its budget; the network is the word before the bar."""
LONG = 10.0
"""Share of the budget that ``stunet_long`` takes."""


@dataclass(frozen=True)
class Arm:
    """One way to train on the labelled cases.

    Attributes:
        name: in tables.
        network: that is trained.
        pretraining: that it starts from; None starts from scratch.
        suffix: of the trainer's name; ``_ft`` of STU-Net has a tenth of the learning rate.
        warmup: share of the epochs over which the learning rate rises.
        options: variables, beside those of the budget.
    """

    name: str
    network: str = "stunet"
    pretraining: str | None = None
    suffix: str = ""
    warmup: float = 0.0
    options: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return folder_name(self.name)


def _pair(network: str) -> tuple[Arm, Arm]:
    return Arm(f"{network} scratch", network), Arm(f"{network} pretrained", network, network)


def _arm(name: str, pretraining: str = "stunet", **changes: object) -> tuple[Arm]:
    return (Arm(name, "stunet", pretraining, **changes),)  # type: ignore[arg-type]


GROUPS: dict[str, tuple[Arm, ...]] = {
    **{network: _pair(network) for network in ("stunet", "pctnet", "fmunet")},
    "scheme": _arm("scheme of 2023", "stunet_2023"),
    "classes": _arm("K = 1", "stunet_k1") + _arm("K = 8", "stunet_k8"),
    "rate": (Arm("scratch, rate 1e-3", suffix="_ft"), *_arm("pretrained, rate 1e-3", suffix="_ft")),
    "warmup": _arm("pretrained, warm-up", warmup=0.2),
    "encoder": _arm("pretrained, encoder at a tenth", options={"STUNET_ENCODER_RATE": "0.1"}),
    "intensity": _arm("pretrained on standardised images", "stunet_standardised"),
    "blocks": _arm("pretrained with large blocks", "stunet_large_blocks"),
    "pretraining_rate": _arm("pretrained at a rate of 1e-4", "stunet_slow"),
    "length": _arm("ten times the pretraining", "stunet_long"),
    "heads": (
        Arm("scratch, fitted heads", options={"STUNET_HEADS": "fit"}),
        *_arm("pretrained, fitted heads", options={"STUNET_HEADS": "fit"}),
    ),
}
"""What can be asked for; ``stunet`` is what all but the other networks are compared with."""
ARMS = {arm.folder: arm for group in GROUPS.values() for arm in group}


class FusionExperiment(Experiment):
    """An experiment with two datasets: unlabelled scans, and all cases with labels."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.networks = networks(options.size)

    def folds(self) -> dict[Draw, list[str]]:
        """Return the labelled cases of each (seed, number of cases), in the order of the folds."""
        pool, counts = self.cases()[1], sorted(set(self.options.cases))
        return {
            (seed, count): draw_labelled(pool, seed, count)
            for seed in self.options.seeds
            for count in counts
        }

    def prepare_data(self) -> None:
        """Make both datasets: scans alone, and all cases with their labels."""
        test, pool = self.cases()
        scans, target = self.work / "scans", self.raw / LABELLED.folder
        merged = getattr(self.options, "merged", False)
        if not self.dry_run:
            copy_cases(self.data, scans, pool)
            copy_cases(self.data, target, test + pool, label=relabel((0, 1, 1)) if merged else None)
            labels = {"background": 0, "structure": 1} if merged else None
            describe(self.data, target, len(test + pool), labels)
        if not (self.raw / UNLABELLED.folder / "dataset.json").is_file():
            name = f"-d {UNLABELLED.number} -n {UNLABELLED.name} --modality MR -np 2"
            self.run("stunet unlabeled -i", scans / "imagesTr", name)

    def prepare_plans(self, network: Network) -> None:
        """Plan on the scans, and preprocess both datasets with these plans."""
        splits = [{"train": cases, "val": self.cases()[0]} for cases in self.folds().values()]
        self.preprocess(UNLABELLED, network, [])
        self.preprocess(LABELLED, network, splits, plans_of=UNLABELLED)

    def pretrain(self, name: str, options: Variables, network: Network) -> Path:
        """Pretrain on the scans unless that is done; return the checkpoint."""
        results = self.work / "pretraining" / name
        options.pop("STUNET_MIRRORING", None)
        pretext = replace(network, trainer=network.pretext_trainer)
        fold = self.train(results, UNLABELLED, pretext, "all", options)
        return fold / "checkpoint_final.pth"

    def starting_weights(self, arm: Arm) -> Path | None:
        """Return the weights that an arm starts from; pretrain if they are not there."""
        if arm.pretraining is None:
            return None
        network = self.networks[arm.network]
        share = LONG if arm.pretraining == "stunet_long" else 1
        options = self.training_options(int(self.options.pretrain_iterations * share), 1, 5)
        options |= PRETRAININGS[arm.pretraining]
        return self.pretrain(arm.pretraining, options, network)

    def fine_tune(self, arm: Arm, seed: int, count: int) -> None:
        """Train on labelled cases, and score the test cases."""
        network, weights = self.networks[arm.network], self.starting_weights(arm)
        options = self.training_options(self.options.fine_tune_iterations, seed) | arm.options
        if arm.warmup:
            epochs = max(round(arm.warmup * int(options["STUNET_EPOCHS"])), 1)
            options["STUNET_WARMUP_EPOCHS"] = str(epochs)
        results = self.work / "fine_tuning" / arm.folder / f"cases_{count}_seed_{seed}"
        trained = replace(network, trainer=network.trainer + arm.suffix)
        self.train_labelled(results, trained, (seed, count), options, weights)

    def train_labelled(
        self, results: Path, network: Network, draw: Draw, options: Variables, weights: Path | None
    ) -> None:
        """Train on the labelled cases of a draw and write ``scores.json`` into ``results``."""
        number = list(self.folds()).index(draw)
        fold = self.train(results, LABELLED, network, number, options, weights)
        if not self.dry_run:
            score_run(fold, self.raw / LABELLED.folder / "labelsTr", results / "scores.json")


def carry_out(options: argparse.Namespace) -> None:
    """Run what is missing of the groups that are asked for."""
    arms = [arm for group in options.groups for arm in GROUPS[group]]
    wanted = options.only_cases or options.cases
    if not set(wanted) <= set(options.cases):
        raise PluginError(f"--only-cases {wanted} must be among --cases {options.cases}.")
    experiment = FusionExperiment(options)
    folds = experiment.folds()
    experiment.prepare_data()
    for name in dict.fromkeys(arm.network for arm in arms):
        experiment.prepare_plans(experiment.networks[name])
    for seed, count in folds:
        for arm in arms if count in wanted else ():
            experiment.fine_tune(arm, seed, count)
            if options.json is not None and not options.dry_run:
                settings = read_json(experiment.work / "settings.json")
                write_report(experiment.work, ARMS, settings, options.json, options.figures)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser(__file__, __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--groups", nargs="+", choices=list(GROUPS), default=["stunet"], help="what to compare")
    add("--size", default="small", help="of STU-Net")
    add("--cases", type=int, nargs="+", default=[4, 8, 16], help="numbers of labelled cases")
    add("--only-cases", type=int, nargs="+", metavar="N", help="of --cases, run these now")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of labelled cases and weights")
    add("--test-cases", type=int, default=60, help="held out")
    add("--pretrain-iterations", type=int, default=3000, help="of each pretraining")
    add("--fine-tune-iterations", type=int, default=300, help="of each training on labels")
    add("--merged", action="store_true", help="train and score the structures as one")
    add("--json", type=Path, metavar="FILE", help="for the numbers; the table goes to .md")
    add("--figures", type=Path, metavar="FOLDER", help="for the plots")
    return run_script(parser, carry_out, arguments)


if __name__ == "__main__":
    sys.exit(main())
