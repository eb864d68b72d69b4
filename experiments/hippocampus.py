"""Figures of docs/experiments/hippocampus.md: curves, an overlay and the numbers, from what nnU-Net
left behind."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import SimpleITK as sitk
from common import read_run, write_json
from report import about, run_script

from stunet_plugin.utils.figures import OverlayCase, save_overlays

matplotlib.use("agg")


def save_curves(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Write training loss and pseudo Dice per epoch of all runs as a PNG."""
    curves = {
        "training loss": lambda run: run["train_loss"],
        "mean pseudo Dice (validation patches)": lambda run: np.nanmean(run["pseudo_dice"], axis=1),
    }
    rows = [
        {"run": name, "epoch": epoch, "value": value, "curve": curve}
        for name, run in runs.items()
        for curve, read in curves.items()
        for epoch, value in enumerate(read(run), 1)
    ]
    axes = {"x": "epoch", "y": "value", "hue": "run", "col": "curve"}
    grid = sns.relplot(
        pd.DataFrame(rows), **axes, kind="line", marker="o", facet_kws={"sharey": False}
    )
    grid.set_titles("{col_name}").figure.savefig(path, dpi=130)


def overlay_cases(fold: Path, raw: Path) -> list[OverlayCase]:
    """Return the worst, median and best validation case of a fold."""
    summary = json.loads((fold / "validation" / "summary.json").read_text())

    def mean_dice(case: dict[str, Any]) -> float:
        return float(np.nanmean([metrics["Dice"] for metrics in case["metrics"].values()]))

    ranked = sorted(summary["metric_per_case"], key=mean_dice)
    rows = []
    for case in (ranked[0], ranked[len(ranked) // 2], ranked[-1]):
        name = Path(case["prediction_file"]).name.removesuffix(".nii.gz")
        image = sitk.ReadImage(str(raw / "imagesTr" / f"{name}_0000.nii.gz"))
        folders = raw / "labelsTr", fold / "validation"
        labels = [sitk.ReadImage(str(folder / f"{name}.nii.gz")) for folder in folders]
        arrays = map(sitk.GetArrayFromImage, (image, *labels))
        title = f"{name}, Dice {mean_dice(case):.2f}"
        rows.append(OverlayCase(title, *arrays, image.GetSpacing()[::-1]))
    return rows


def make_figures(options: argparse.Namespace) -> None:
    """Write curves, overlay and numbers."""
    folds = {name: Path(folder) for name, _, folder in (run.partition("=") for run in options.run)}
    runs = {name: read_run(fold) for name, fold in folds.items()}
    save_curves(runs, options.out / f"{options.stem}_curves.png")
    cases = overlay_cases(next(iter(folds.values())), options.raw)
    labels = {1: "anterior", 2: "posterior"}
    save_overlays(cases, labels, options.out / f"{options.stem}_overlay.png")
    report = {**about(note=options.machine), "runs": runs}
    write_json(options.json, report)
    for name, run in runs.items():
        minutes = f"{sum(run['epoch_seconds']) / 60:.1f} min"
        print(name, run["trainer"], run["mean_validation_dice"], run["validation_dice"], minutes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--raw", type=Path, required=True, help="raw dataset, .nii.gz")
    add("--out", type=Path, required=True, help="folder of the PNGs")
    add("--run", action="append", required=True, metavar="NAME=FOLD", help="fold folder; repeat")
    add("--stem", default="hippocampus", help="what the PNGs' names begin with")
    add("--json", type=Path, required=True, help="file for the numbers")
    add("--machine", required=True, help="what it ran on, in words")
    options = parser.parse_args(arguments)
    return run_script(lambda: make_figures(options), __file__)


if __name__ == "__main__":
    sys.exit(main())
