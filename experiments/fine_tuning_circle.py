"""The full circle on real images: train, rewrite as a published v1 file, import, predict, fine-tune
for other labels.

Makes docs/experiments/fine_tuning.md's numbers and pictures from one finished training on
Dataset004_Hippocampus (fold 0):

1. its checkpoint is rewritten into the published nnU-Net v1 format and imported with ``stunet
import``; both model folders predict
   the validation images of the fold;
2. with 8 labelled cases of that validation fold (never trained on), it is fine-tuned for one merged
label, and the result is
   fine-tuned back to the two parts; the same network from scratch has the same budget; other cases
   of the fold test both.

Each step is a stock command and is skipped when its result is there, so the script can be started
again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import host_version, trainers_folder
from stunet_plugin.utils.files import write_atomically

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from hippocampus import read_run

from import_helpers import published_name, v1_checkpoint

LABELLED_CASES = 8
TEST_CASES = 12
"""Of the cases that are left; each is predicted eight times over, mirrored, after every
training."""
SEEDS = (1, 2, 3)
TASKS = {
    # name: dataset ID, labels, what to make of the two parts' label values
    "merged": (14, {"background": 0, "hippocampus": 1}, {0: 0, 1: 1, 2: 1}),
    "two parts again": (15, {"background": 0, "anterior": 1, "posterior": 2}, {0: 0, 1: 1, 2: 2}),
}
CONFIGURATION = "3d_fullres_bs2"
PLANS = "nnUNetPlans"


class Circle:
    """The experiment's folders and steps.

    Args:
        raw: the raw Dataset004_Hippocampus.
        model: model folder of the finished training, with fold 0.
        work: everything is written below it.
        epochs, iterations: budget of every fine-tuning and of every training from scratch.
    """

    def __init__(self, raw: Path, model: Path, work: Path, epochs: int, iterations: int) -> None:
        self.raw, self.model, self.work = raw, model, work
        self.epochs, self.iterations = epochs, iterations
        folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed")}
        budget = {
            "STUNET_EPOCHS": str(epochs),
            "STUNET_ITERATIONS": str(iterations),
            "STUNET_VAL_ITERATIONS": "10",
        }
        self.environment = {
            **os.environ,
            **folders,
            **budget,
            "nnUNet_extTrainer": str(trainers_folder()),
        }
        summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
        self.cases = sorted(
            Path(case["prediction_file"]).name.removesuffix(".nii.gz")
            for case in summary["metric_per_case"]
        )

    def run(self, command: str, *arguments: object, **environment: str) -> None:
        print("$", command, *arguments, flush=True)
        result = subprocess.run(
            [find_command(command), *map(str, arguments)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            sys.exit(f"{command} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")

    # --- 1. from the published format and back

    def published_file(self) -> Path:
        """The checkpoint as nnU-Net v1 would have saved the published network."""
        file = self.work / "hippocampus_ep5.model"
        if not file.is_file():
            trained = torch.load(
                self.model / "fold_0" / "checkpoint_final.pth",
                map_location="cpu",
                weights_only=False,
            )
            weights = {
                published_name(name): value for name, value in trained["network_weights"].items()
            }
            torch.save(v1_checkpoint(weights), file)
        return file

    def imported_model(self) -> Path:
        folder = self.work / "imported"
        if not folder.is_dir():
            names = ("background", "anterior", "posterior")
            plans = self.model / "plans.json"
            self.run(
                "stunet",
                "import",
                self.published_file(),
                "--out",
                folder,
                "--plans",
                plans,
                "--labels",
                *names,
            )
        return folder

    def compare_predictions(self) -> dict[str, Any]:
        """Predict the validation images with both folders and count the voxels that differ."""
        images = self.work / "validation_images"
        images.mkdir(exist_ok=True)
        for case in self.cases:
            shutil.copyfile(
                self.raw / "imagesTr" / f"{case}_0000.nii.gz", images / f"{case}_0000.nii.gz"
            )
        predicted = {}
        for name, folder in (("trained", self.model), ("imported", self.imported_model())):
            predicted[name] = self.work / f"predicted_{name}"
            if len(list(predicted[name].glob("*.nii.gz"))) < len(self.cases):
                self.run(
                    "nnUNetv2_predict_from_modelfolder",
                    "-i",
                    images,
                    "-o",
                    predicted[name],
                    "-m",
                    folder,
                    "-f",
                    0,
                    "-device",
                    "cpu",
                    "-npp",
                    1,
                    "-nps",
                    1,
                    "--disable_progress_bar",
                )
        different = total = 0
        for case in self.cases:
            ours, theirs = (
                sitk.ReadImage(str(folder / f"{case}.nii.gz")) for folder in predicted.values()
            )
            if not np.allclose(
                ours.GetDirection() + ours.GetOrigin(),
                theirs.GetDirection() + theirs.GetOrigin(),
                atol=1e-5,
            ):
                sys.exit(f"{case}: the two predictions lie in different places")
            labels = [sitk.GetArrayFromImage(image) for image in (ours, theirs)]
            different += int((labels[0] != labels[1]).sum())
            total += labels[0].size
        return {"cases": len(self.cases), "voxels": total, "voxels_that_differ": different}

    # --- 2. fine-tuning for other labels

    def make_dataset(self, task: str) -> None:
        """The validation cases of the first training as a dataset of their own, with the task's
        labels, planned and split."""
        dataset_id, labels, mapping = TASKS[task]
        name = f"Dataset{dataset_id:03d}_Hippocampus"
        folder, preprocessed = self.work / "raw" / name, self.work / "preprocessed" / name
        if (preprocessed / "splits_final.json").is_file():
            return
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for case in self.cases:
            shutil.copyfile(
                self.raw / "imagesTr" / f"{case}_0000.nii.gz",
                folder / "imagesTr" / f"{case}_0000.nii.gz",
            )
            image = sitk.ReadImage(str(self.raw / "labelsTr" / f"{case}.nii.gz"))
            values = sitk.GetArrayFromImage(image)
            changed = sitk.GetImageFromArray(
                np.vectorize(mapping.__getitem__, otypes=[np.uint8])(values)
            )
            changed.CopyInformation(image)
            sitk.WriteImage(changed, str(folder / "labelsTr" / f"{case}.nii.gz"))
        description = {
            "channel_names": {"0": "MRI"},
            "labels": labels,
            "numTraining": len(self.cases),
            "file_ending": ".nii.gz",
        }
        write_atomically(folder / "dataset.json", json.dumps(description, indent=2))
        self.run(
            "nnUNetv2_plan_and_preprocess",
            "-d",
            dataset_id,
            "-c",
            "3d_fullres",
            "-np",
            2,
            "-npfp",
            2,
        )
        plans_file = preprocessed / f"{PLANS}.json"
        plans = json.loads(plans_file.read_text())
        plans["configurations"][CONFIGURATION] = {"inherits_from": "3d_fullres", "batch_size": 2}
        write_atomically(plans_file, json.dumps(plans, indent=2))
        order = [str(case) for case in np.random.default_rng(0).permutation(self.cases)]
        split = [
            {
                "train": sorted(order[:LABELLED_CASES]),
                "val": sorted(order[LABELLED_CASES : LABELLED_CASES + TEST_CASES]),
            }
        ]
        write_atomically(preprocessed / "splits_final.json", json.dumps(split, indent=2))

    def train(self, task: str, seed: int, weights: Path | None) -> tuple[Path, dict[str, Any]]:
        """Train or fine-tune and return the fold's folder and what it reached."""
        dataset_id = TASKS[task][0]
        trainer = "STUNetTrainer_small" + ("_ft" if weights else "")
        results = self.work / f"results_seed{seed}"
        results.mkdir(exist_ok=True)
        fold = (
            results
            / f"Dataset{dataset_id:03d}_Hippocampus"
            / f"{trainer}__{PLANS}__{CONFIGURATION}"
            / "fold_0"
        )
        if not (fold / "validation" / "summary.json").is_file():
            start = ("-pretrained_weights", weights) if weights else ()
            self.run(
                "nnUNetv2_train",
                dataset_id,
                CONFIGURATION,
                0,
                "-tr",
                trainer,
                "-device",
                "cpu",
                *start,
                nnUNet_results=str(results),
                STUNET_SEED=str(seed),
            )
        return fold, read_run(fold)

    def fine_tune(self) -> list[dict[str, Any]]:
        """All fine-tunings and trainings from scratch, as records."""
        for task in TASKS:
            self.make_dataset(task)
        imported = self.imported_model() / "fold_0" / "checkpoint_final.pth"
        runs = []
        for seed in SEEDS:
            weights = imported
            for task in TASKS:
                fold, reached = self.train(task, seed, weights)
                runs.append({"task": task, "start": "fine-tuned", "seed": seed, **reached})
                runs.append(
                    {
                        "task": task,
                        "start": "from scratch",
                        "seed": seed,
                        **self.train(task, seed, None)[1],
                    }
                )
                weights = fold / "checkpoint_final.pth"
        return runs


def table(runs: list[dict[str, Any]]) -> str:
    """Mean Dice of the test cases per task and start, as Markdown."""
    lines = ["| labels | start | mean Dice per seed | mean |", "|---|---|---|---:|"]
    for task in TASKS:
        for start in ("fine-tuned", "from scratch"):
            dice = [
                run["mean_validation_dice"]
                for run in runs
                if (run["task"], run["start"]) == (task, start)
            ]
            lines.append(
                f"| {task} | {start} | {', '.join(f'{value:.3f}' for value in dice)} |"
                f" {np.mean(dice):.3f} |"
            )
    return "\n".join(lines)


def save_curves(runs: list[dict[str, Any]], iterations: int, path: Path) -> None:
    """Write the pseudo Dice per epoch of all runs as a PNG, one panel per task."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, task in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS, strict=True):
        for start, style in (("fine-tuned", "-"), ("from scratch", "--")):
            for run in (run for run in runs if (run["task"], run["start"]) == (task, start)):
                dice = [np.nanmean(values) for values in run["pseudo_dice"]]
                axis.plot(
                    range(1, len(dice) + 1),
                    dice,
                    style,
                    color=f"C{run['seed'] - 1}",
                    label=f"{start}, seed {run['seed']}",
                )
        axis.set_title(f"labels: {task}", fontsize=10)
        axis.set_xlabel(f"epoch ({iterations} iterations)")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.axes[0].set_ylabel("mean pseudo Dice")
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Example: python experiments/fine_tuning_circle.py --raw"
            " $nnUNet_raw/Dataset004_Hippocampus --model"
            " results_1/Dataset004_Hippocampus/STUNetTrainer_small_ep5__nnUNetPlans__3d_fullres_bs2"
            ' --work circle --machine "2 CPU cores" --out docs/experiments --json'
            " experiments/results/fine_tuning_circle.json"
        ),
    )
    parser.add_argument("--raw", type=Path, required=True, help="the raw dataset")
    parser.add_argument(
        "--model", type=Path, required=True, help="model folder of the finished training"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for everything that is made on the way"
    )
    parser.add_argument(
        "--epochs", type=int, default=4, help="of every fine-tuning and training from scratch"
    )
    parser.add_argument("--iterations", type=int, default=25, help="per epoch")
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG")
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    circle = Circle(
        options.raw.resolve(),
        options.model.resolve(),
        options.work.resolve(),
        options.epochs,
        options.iterations,
    )
    comparison = circle.compare_predictions()
    differing = f"{comparison['voxels_that_differ']} of {comparison['voxels']} voxels differ"
    print(f"Both folders on {comparison['cases']} images: {differing}")
    runs = circle.fine_tune()
    report = {
        "date": datetime.now(timezone.utc).isoformat(),
        "machine": options.machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nnunetv2": host_version(),
        },
        "budget": {"epochs": circle.epochs, "iterations": circle.iterations, "batch": 2},
        "cases": {"labelled": LABELLED_CASES, "test": TEST_CASES},
        "both_folders": comparison,
        "runs": runs,
    }
    write_atomically(options.json, json.dumps(report, indent=2))
    save_curves(runs, circle.iterations, options.out / "fine_tuning_curves.png")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
