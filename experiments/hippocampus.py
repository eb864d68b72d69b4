"""Figures of docs/experiments/hippocampus.md from finished trainings: curves, an overlay, and a
JSON with the numbers.

Reads what nnU-Net left behind: the log in ``checkpoint_final.pth`` (our own files) and
``validation/summary.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.figures import OverlayCase, save_overlays
from stunet_plugin.utils.files import write_atomically


def read_run(fold: Path) -> dict[str, Any]:
    """Return what a training in a fold's folder reached.

    Raises:
        PluginError: the training or its validation has not finished.
    """
    checkpoint_file, summary_file = (
        fold / "checkpoint_final.pth",
        fold / "validation" / "summary.json",
    )
    if not checkpoint_file.is_file() or not summary_file.is_file():
        raise PluginError(
            f"{fold} holds no finished training: expected checkpoint_final.pth and"
            " validation/summary.json."
        )
    checkpoint = torch.load(checkpoint_file, map_location="cpu", weights_only=False)
    log, summary = checkpoint["logging"], json.loads(summary_file.read_text())
    return {
        "trainer": checkpoint["trainer_name"],
        "train_loss": [float(value) for value in log["train_losses"]],
        "pseudo_dice": [
            [float(value) for value in epoch] for epoch in log["dice_per_class_or_region"]
        ],
        "epoch_seconds": [
            float(end - start)
            for start, end in zip(
                log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True
            )
        ],
        "validation_cases": len(summary["metric_per_case"]),
        "validation_dice": {
            label: float(metrics["Dice"]) for label, metrics in summary["mean"].items()
        },
        "mean_validation_dice": float(summary["foreground_mean"]["Dice"]),
    }


def save_curves(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Write training loss and pseudo Dice per epoch of all runs as a PNG."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis, dice_axis = figure.subplots(1, 2)
    for name, run in runs.items():
        epochs = np.arange(1, len(run["train_loss"]) + 1)
        style = "--" if run["trainer"].startswith("Plain") else "-"
        loss_axis.plot(epochs, run["train_loss"], style, marker="o", markersize=3, label=name)
        dice_axis.plot(
            epochs,
            [np.nanmean(values) for values in run["pseudo_dice"]],
            style,
            marker="o",
            markersize=3,
            label=name,
        )
    for axis, title in (
        (loss_axis, "training loss"),
        (dice_axis, "mean pseudo Dice (validation patches)"),
    ):
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    dice_axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def overlay_cases(fold: Path, raw: Path) -> list[OverlayCase]:
    """Worst, median and best validation case of a fold."""
    summary = json.loads((fold / "validation" / "summary.json").read_text())

    def mean_dice(case: dict[str, Any]) -> float:
        return float(np.nanmean([metrics["Dice"] for metrics in case["metrics"].values()]))

    ranked = sorted(summary["metric_per_case"], key=mean_dice)
    rows = []
    for case in (ranked[0], ranked[len(ranked) // 2], ranked[-1]):
        name = Path(case["prediction_file"]).name.removesuffix(".nii.gz")
        files = (
            raw / "imagesTr" / f"{name}_0000.nii.gz",
            raw / "labelsTr" / f"{name}.nii.gz",
            fold / "validation" / f"{name}.nii.gz",
        )
        image, reference, prediction = (sitk.ReadImage(str(file)) for file in files)
        arrays = [sitk.GetArrayFromImage(volume) for volume in (image, reference, prediction)]
        rows.append(
            OverlayCase(f"{name}, Dice {mean_dice(case):.2f}", *arrays, image.GetSpacing()[::-1])
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=(
            "Example: python experiments/hippocampus.py --raw"
            ' $nnUNet_raw/Dataset004_Hippocampus --run "seed 1=results_1/.../fold_0" --out'
            " docs/experiments --json experiments/results/hippocampus.json"
        ),
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=FOLD",
        help="a name and the folder of a fold; repeat",
    )
    parser.add_argument("--raw", type=Path, required=True, help="the raw dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNGs")
    parser.add_argument("--stem", default="hippocampus", help="what the PNGs' names begin with")
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NAME",
        help="a run that the --json file holds; repeat",
    )
    parser.add_argument("--machine", required=True, help="what it ran on, in words")
    options = parser.parse_args()
    folds = {name: Path(folder) for name, _, folder in (run.partition("=") for run in options.run)}
    try:
        runs = {name: read_run(fold) for name, fold in folds.items()}
        earlier = json.loads(options.json.read_text())["runs"] if options.keep else {}
        runs |= {name: earlier[name] for name in options.keep}
    except KeyError as error:
        print(f"{options.json} holds no run {error}; it has {', '.join(earlier)}.", file=sys.stderr)
        return 2
    except PluginError as error:
        print(error, file=sys.stderr)
        return 2
    save_curves(runs, options.out / f"{options.stem}_curves.png")
    first = next(iter(folds.values()))
    overlay = options.out / f"{options.stem}_overlay.png"
    save_overlays(overlay_cases(first, options.raw), {1: "anterior", 2: "posterior"}, overlay)
    report = {
        "date": datetime.now(timezone.utc).isoformat(),
        "machine": options.machine,
        "torch": torch.__version__,
        "runs": runs,
    }
    write_atomically(options.json, json.dumps(report, indent=2))
    for name, run in runs.items():
        minutes = sum(run["epoch_seconds"]) / 60
        classes = " / ".join(f"{value:.3f}" for value in run["validation_dice"].values())
        print(
            f"| {name} | {run['trainer']} | {run['mean_validation_dice']:.3f} | {classes} |"
            f" {minutes:.1f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
