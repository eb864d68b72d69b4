"""Figures of docs/experiments/hippocampus.md from finished trainings, and its thinned datasets.

``figures`` reads what nnU-Net left behind and writes curves, an overlay and the numbers; ``thin``
makes a copy of a raw dataset of every n-th slice along one axis.
"""

from __future__ import annotations

import argparse
import json
import shutil
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

from stunet_plugin.errors import PluginError
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


def thin_out(options: argparse.Namespace) -> None:
    """Write every n-th slice of all images and labels; SimpleITK sets the spacing.

    Raises:
        PluginError: the target is there.
    """
    if options.out.exists():
        raise PluginError(f"--out {options.out} is there already.")
    steps = [slice(None)] * 3
    steps[options.axis] = slice(None, None, options.every)
    for part in ("imagesTr", "labelsTr"):
        (options.out / part).mkdir(parents=True)
        for file in sorted((options.raw / part).glob("*.nii.gz")):
            thin = sitk.ReadImage(str(file))[tuple(steps)]
            sitk.WriteImage(thin, str(options.out / part / file.name))
    shutil.copyfile(options.raw / "dataset.json", options.out / "dataset.json")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    figures, thin = (commands.add_parser(name) for name in ("figures", "thin"))
    figures.set_defaults(work=make_figures)
    thin.set_defaults(work=thin_out)
    for command in (figures, thin):
        command.add_argument("--raw", type=Path, required=True, help="raw dataset, .nii.gz")
        command.add_argument("--out", type=Path, required=True, help="folder (of thin: a new one)")
    add = figures.add_argument
    add("--run", action="append", required=True, metavar="NAME=FOLD", help="fold folder; repeat")
    add("--stem", default="hippocampus", help="what the PNGs' names begin with")
    add("--json", type=Path, required=True, help="file for the numbers")
    add("--machine", required=True, help="what it ran on, in words")
    thin.add_argument("--every", type=int, required=True, help="2 for every second slice")
    thin.add_argument("--axis", type=int, choices=(0, 1, 2), default=2, help="along x, y or z")
    options = parser.parse_args(arguments)
    return run_script(lambda: options.work(options), __file__)


if __name__ == "__main__":
    sys.exit(main())
