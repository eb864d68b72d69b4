"""Segmentation heads that start from what is known, against random ones and against scratch.

Makes the numbers of docs/experiments/fine_tuning.md, second part, on Dataset004_Hippocampus: an
STU-Net is trained on most cases, once with both parts of the hippocampus and once with them merged;
from each it is fine-tuned with few other cases, for the same and for the other labels, with random
heads and with those of ``STUNET_HEADS=auto``. Test cases are in neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
from common import (
    Dataset,
    Experiment,
    Network,
    build_parser,
    copy_cases,
    describe,
    draw_labelled,
    read_run,
    relabel,
    run_script,
    write_json,
)
from report import about, markdown

matplotlib.use("agg")

LABELS = {
    "parts": (Dataset(21, "HippocampusParts"), ("background", "anterior", "posterior"), (0, 1, 2)),
    "merged": (Dataset(22, "HippocampusMerged"), ("background", "hippocampus"), (0, 1, 1)),
}
"""Dataset, labels, and what becomes of the label values 0, 1, 2."""
TRANSFERS = {
    f"{start}-{labels}": (start, labels)
    for start, labels in (("merged", "parts"), ("parts", "merged"), ("parts", "parts"))
}
SCRATCH, RANDOM, KNOWN = "scratch", "random heads", "known heads"
HEADS = {RANDOM: "random", KNOWN: "auto"}
SOURCE_FOLD = 0


class Study(Experiment):
    """The folders and steps of this experiment."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.test, self.pool = self.cases()
        seeds, count = options.seeds, options.labelled_cases
        self.draws = {seed: draw_labelled(self.pool, seed, count) for seed in seeds}
        labelled = {case for cases in self.draws.values() for case in cases}
        self.source_cases = [case for case in self.pool if case not in labelled]
        self.network = Network(f"STUNetTrainer_{options.size}")
        self.transfers = [TRANSFERS[name] for name in options.transfers]

    def make_datasets(self) -> None:
        folds = [self.source_cases, *self.draws.values()]
        splits = [{"train": cases, "val": self.test} for cases in folds]
        planned = None
        for dataset, labels, values in LABELS.values():
            target = self.raw / dataset.folder
            if not self.dry_run:
                copy_cases(self.data, target, self.test + self.pool, label=relabel(values))
                numbered = {name: value for value, name in enumerate(labels)}
                describe(self.data, target, len(self.test + self.pool), numbered)
            self.preprocess(dataset, self.network, splits, planned)
            planned = planned or dataset

    def source(self, labels: str) -> Path:
        """Return the fold's folder of the model that fine-tuning starts from."""
        options = self.training_options(self.options.source_iterations, 1)
        dataset = LABELS[labels][0]
        return self.train(self.work / "source", dataset, self.network, SOURCE_FOLD, options)

    def run_arm(self, arm: str, labels: str, seed: int, iterations: int, start: str) -> Path:
        """Train on the labelled cases of a seed; return the fold's folder."""
        options = self.training_options(max(iterations, 1), seed)
        if not iterations:
            # One step at a millionth of the rate: validation as before any training.
            options["STUNET_WARMUP_EPOCHS"] = "1000000"
        name = f"{arm.replace(' ', '_')}_from_{start}_{iterations}_seed_{seed}"
        network, weights = self.network, None
        if arm != SCRATCH:
            network = replace(network, trainer=f"{network.trainer}_ft")
            options["STUNET_HEADS"] = HEADS[arm]
            weights = self.source(start) / "checkpoint_final.pth"
        fold = 1 + list(self.draws).index(seed)
        results = self.work / "results" / name
        return self.train(results, LABELS[labels][0], network, fold, options, weights)

    def runs(self, seed: int) -> list[dict[str, Any]]:
        """Return a record of every training of a seed; what is done is not done again."""
        found = []
        for iterations in (0, *self.options.iterations):
            # Before any training random heads say nothing.
            arms = HEADS if iterations else (KNOWN,)
            tasks = [(arm, *transfer) for transfer in self.transfers for arm in arms]
            if iterations:
                targets = dict.fromkeys(labels for _, labels in self.transfers)
                tasks += [(SCRATCH, "nothing", labels) for labels in targets]
            for arm, start, labels in tasks:
                fold = self.run_arm(arm, labels, seed, iterations, start)
                reached = {} if self.dry_run else read_run(fold)
                found.append(
                    {"labels": labels, "from": start, "start": arm}
                    | {"iterations": iterations, "seed": seed, **reached}
                )
        return found


def table(runs: list[dict[str, Any]]) -> str:
    """Return the mean Dice of the test cases of each seed, as Markdown."""
    rows = []
    keys = ["labels", "from", "start", "iterations"]
    for names, group in pd.DataFrame(runs).groupby(keys, sort=True):
        dice = group["mean_validation_dice"]
        per_seed = ", ".join(f"{value:.3f}" for value in dice)
        rows.append([*map(str, names), per_seed, f"{dice.mean():.3f}"])
    return markdown([*keys, "mean Dice per seed", "mean"], rows)


def save_figure(runs: list[dict[str, Any]], path: Path) -> None:
    """Write the Dice against the iterations as a PNG: the means, and the seeds as points."""
    frame = pd.DataFrame(runs)
    axes = {"x": "iterations", "y": "mean_validation_dice", "hue": "start"}
    grid = sns.relplot(frame, **axes, col="labels", kind="line", errorbar=None, marker="o")
    for axis, (_, part) in zip(grid.axes.flat, frame.groupby("labels", sort=False), strict=True):
        sns.scatterplot(part, **axes, ax=axis, legend=False, alpha=0.6)
    grid.set_axis_labels("iterations", "mean Dice of the test cases")
    grid.set_titles("{col_name}").figure.savefig(path, dpi=110)


def carry_out(options: argparse.Namespace) -> None:
    study = Study(options)
    study.make_datasets()
    starts = dict.fromkeys(start for start, _ in study.transfers)
    sources = {labels: study.source(labels) for labels in starts}
    runs = []
    for seed in options.seeds:
        runs += study.runs(seed)
        if options.dry_run:
            continue
        reached = {labels: read_run(fold)["validation_dice"] for labels, fold in sources.items()}
        write_json(options.json, {**about(note=options.machine), "source": reached, "runs": runs})
        if options.figure is not None:
            save_figure(runs, options.figure)
        print(reached, table(runs), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser(__file__, __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--size", default="small", help="of STU-Net")
    add("--test-cases", type=int, default=20, help="held out")
    add("--labelled-cases", type=int, default=8, help="to fine-tune with")
    add("--source-iterations", type=int, default=500, help="of each model to start from")
    add("--iterations", type=int, nargs="+", default=[25, 50], help="of each fine-tuning")
    add("--transfers", nargs="+", choices=TRANSFERS, default=[*TRANSFERS], help="labels from, to")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of labelled cases and weights")
    add("--machine", default="", help="what it runs on, in words")
    add("--figure", type=Path, metavar="FILE", help="for the curves, .png")
    add("--json", type=Path, required=True, help="file for the numbers")
    parser.set_defaults(iterations_per_epoch=25)
    return run_script(parser, carry_out, arguments)


if __name__ == "__main__":
    sys.exit(main())
