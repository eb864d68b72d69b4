"""Full circle on real images: train, rewrite as a published file, import, predict, fine-tune.

Makes the numbers and pictures of docs/experiments/fine_tuning.md from one finished training of
STU-Net small on Dataset004_Hippocampus (fold 0):

1. its checkpoint is rewritten into the published nnU-Net v1 format and imported with ``stunet
   import``; both model folders predict the validation images of the fold;
2. with 8 labelled cases of that validation fold (never trained on) it is fine-tuned for one merged
   label, and the result is fine-tuned back to the two parts; the same network from scratch has the
   same budget; other cases of the fold test both.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import SimpleITK as sitk
import torch
from common import (
    Dataset,
    Experiment,
    Network,
    build_parser,
    cases_in,
    copy_cases,
    describe,
    read_run,
    relabel,
    run_script,
    write_json,
)
from report import about, markdown

from stunet_plugin.utils.geometry import Grid

matplotlib.use("agg")

LABELLED_CASES, TEST_CASES = 8, 12
SEEDS = (1, 2, 3)
TASKS = {
    "merged": (Dataset(14, "Hippocampus"), ("background", "hippocampus"), (0, 1, 1)),
    "two parts again": (
        Dataset(15, "Hippocampus"),
        ("background", "anterior", "posterior"),
        (0, 1, 2),
    ),
}
"""Dataset, labels, and what becomes of the label values 0, 1, 2."""
PUBLISHED_NAMES = {
    r"encoder\.stages\.": "conv_blocks_context.",
    r"decoder\.upsample_convs\.(\d+)\.": r"upsample_layers.\1.conv.",
    r"decoder\.stages\.": "conv_blocks_localization.",
    r"decoder\.seg_layers\.": "seg_outputs.",
    r"\.shortcut\.": ".conv3.",
}
SCRATCH, TUNED = Network("STUNetTrainer_small"), Network("STUNetTrainer_small_ft")


def write_published(checkpoint: Path, file: Path) -> None:
    """Write a checkpoint of ours as nnU-Net v1 would have saved the published network."""
    weights = torch.load(checkpoint, map_location="cpu", weights_only=False)["network_weights"]
    for pattern, published in PUBLISHED_NAMES.items():
        weights = {re.sub(pattern, published, name): value for name, value in weights.items()}
    torch.save({"epoch": 5, "state_dict": weights, "lr_scheduler_state_dict": None}, file)


class Circle(Experiment):
    """The folders and steps of this experiment."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.model = options.model.resolve()
        self.validated = cases_in(self.model / "fold_0" / "validation")

    def imported_model(self) -> Path:
        folder, file = self.work / "imported", self.work / "hippocampus_ep5.model"
        if not folder.is_dir():
            if not self.dry_run:
                write_published(self.model / "fold_0" / "checkpoint_final.pth", file)
            plans = ["--plans", self.model / "plans.json", "--out", folder]
            self.run("stunet import", file, plans, "--labels background anterior posterior")
        return folder

    def compare_predictions(self) -> dict[str, Any]:
        """Predict the validation images with both folders and count the voxels that differ."""
        images = self.work / "validation_images"
        predicted = []
        for name, folder in (("trained", self.model), ("imported", self.imported_model())):
            predicted.append(self.work / f"predicted_{name}")
            if cases_in(predicted[-1]) != self.validated or self.dry_run:
                folders = ["-i", images / "imagesTr", "-o", predicted[-1], "-m", folder]
                settings = f"-f 0 -device {self.options.device} -npp 1 -nps 1"
                if not self.dry_run:
                    copy_cases(self.data, images, self.validated)
                self.run("nnUNetv2_predict_from_modelfolder", folders, settings)
        different = total = 0
        for case in [] if self.dry_run else self.validated:
            both = [sitk.ReadImage(str(folder / f"{case}.nii.gz")) for folder in predicted]
            assert Grid.of(both[0]).agrees(Grid.of(both[1])), case
            one, other = (sitk.GetArrayFromImage(image) for image in both)
            different += int((one != other).sum())
            total += one.size
        return {"cases": len(self.validated), "voxels": total, "voxels_that_differ": different}

    def make_dataset(self, task: str) -> None:
        """Make the validation cases of the first training a dataset with the task's labels."""
        dataset, labels, values = TASKS[task]
        target = self.raw / dataset.folder
        order = [*map(str, np.random.default_rng(0).permutation(self.validated))]
        train, test = order[:LABELLED_CASES], order[LABELLED_CASES : LABELLED_CASES + TEST_CASES]
        if not self.dry_run:
            copy_cases(self.data, target, self.validated, label=relabel(values))
            numbered = {name: value for value, name in enumerate(labels)}
            describe(self.data, target, len(self.validated), numbered)
        self.preprocess(dataset, SCRATCH, [{"train": train, "val": test}])

    def fine_tune(self) -> list[dict[str, Any]]:
        """Return a record of every fine-tuning and training from scratch."""
        iterations = self.options.epochs * self.options.iterations_per_epoch
        imported = self.imported_model() / "fold_0" / "checkpoint_final.pth"
        for task in TASKS:
            self.make_dataset(task)
        runs = []
        for seed in SEEDS:
            weights = imported
            options = self.training_options(iterations, seed, validation=10)
            for task, (dataset, *_) in TASKS.items():
                results = self.work / f"results_seed{seed}"
                scratch = self.train(results, dataset, SCRATCH, 0, options)
                tuned = self.train(results, dataset, TUNED, 0, options, weights)
                weights = tuned / "checkpoint_final.pth"
                for start, fold in (("fine-tuned", tuned), ("from scratch", scratch)):
                    reached = {} if self.dry_run else read_run(fold)
                    runs.append({"task": task, "start": start, "seed": seed, **reached})
        return runs


def table(runs: list[dict[str, Any]]) -> str:
    """Return the mean Dice of the test cases per task and start, as Markdown."""
    frame = pd.DataFrame(runs)
    rows = []
    for names, group in frame.groupby(["task", "start"], sort=False):
        dice = group["mean_validation_dice"]
        rows.append([*names, ", ".join(f"{value:.3f}" for value in dice), f"{dice.mean():.3f}"])
    return markdown(["labels", "start", "mean Dice per seed", "mean"], rows)


def save_curves(runs: list[dict[str, Any]], path: Path) -> None:
    """Write the pseudo Dice per epoch of all runs as a PNG, one panel per task."""
    rows = [
        {**run, "epoch": epoch, "mean pseudo Dice": np.nanmean(values)}
        for run in runs
        for epoch, values in enumerate(run["pseudo_dice"], 1)
    ]
    axes = {"x": "epoch", "y": "mean pseudo Dice", "hue": "seed", "style": "start", "col": "task"}
    sns.relplot(pd.DataFrame(rows), **axes, kind="line", palette="tab10").figure.savefig(path)


def carry_out(options: argparse.Namespace) -> None:
    circle = Circle(options)
    comparison = circle.compare_predictions()
    runs = circle.fine_tune()
    if options.dry_run:
        return
    report = {**about(note=options.machine), "both_folders": comparison, "runs": runs}
    report["budget"] = {"epochs": options.epochs, "iterations": options.iterations_per_epoch}
    write_json(options.json, report)
    save_curves(runs, options.figures / "fine_tuning_curves.png")
    print(comparison, table(runs), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser(__file__, __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder of the finished training")
    add("--epochs", type=int, default=4, help="of every fine-tuning and training from scratch")
    add("--machine", default="", help="what it runs on, in words")
    add("--figures", type=Path, default=Path("."), help="folder for the PNG")
    add("--json", type=Path, required=True, help="file for the numbers")
    parser.set_defaults(iterations_per_epoch=25)
    return run_script(parser, carry_out, arguments)


if __name__ == "__main__":
    sys.exit(main())
