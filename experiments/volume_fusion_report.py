"""Scores, table and figures of the experiment on Volume Fusion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
import SimpleITK as sitk
from common import read_run, write_json
from report import about, markdown

from stunet_plugin.utils.files import write_atomically
from stunet_plugin.utils.measures import ASSD, DSC, HD95, score

matplotlib.use("agg")

METRICS = (DSC, ASSD, HD95)
"""Distances are in mm."""


def score_run(fold: Path, references: Path, out: Path) -> None:
    """Score the predicted test cases of a fold and write a JSON, unless it is there."""
    if out.is_file():
        return
    dataset = json.loads((fold.parent / "dataset.json").read_text())
    cases: dict[str, Any] = {}
    for file in sorted((fold / "validation").glob("*.nii.gz")):
        images = [sitk.ReadImage(str(path)) for path in (references / file.name, file)]
        reference, prediction = (sitk.GetArrayFromImage(image) for image in images)
        spacing = images[0].GetSpacing()[::-1]
        cases[file.name.removesuffix(".nii.gz")] = {
            name: score(reference == value, prediction == value, spacing, tolerance=1.0)
            for name, value in dataset["labels"].items()
            if value
        }
    run = read_run(fold)
    found = {"train_loss": run["train_loss"], "seconds": sum(run["epoch_seconds"]), "cases": cases}
    write_atomically(out, json.dumps(found))


def mean_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """Average over structures and cases (distances where there are any)."""
    structures = [structure for case in scores["cases"].values() for structure in case.values()]
    frame = pd.DataFrame(structures)[list(METRICS)]
    return {**frame.mean(), "missed": int(frame[ASSD].isna().sum())}


def collect(work: Path, arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a record per finished run: arm, labelled cases, seed, mean scores and by how much the
    Dice is over scratch, training loss."""
    runs = []
    for file in (work / "fine_tuning").glob("*/cases_*_seed_*/scores.json"):
        _, count, _, seed = file.parent.name.split("_")
        arm, scores = arms[file.parent.parent.name], json.loads(file.read_text())
        run = {"arm": arm.name, "network": arm.network, "cases": int(count), "seed": int(seed)}
        loss = {key: scores[key] for key in ("seconds", "train_loss")}
        runs.append({**run, **mean_scores(scores), **loss})
    order = [arm.name for arm in arms.values()]
    place = itemgetter("arm", "cases", "seed")
    runs.sort(key=lambda run: (order.index(run["arm"]), *place(run)))
    dice = {place(run): run[DSC] for run in runs}
    for run in runs:
        scratch = f"{run['network']} scratch"
        other = dice.get((scratch, run["cases"], run["seed"]), math.nan)
        run["over_scratch"] = math.nan if run["arm"] == scratch else run[DSC] - other
    return runs


def table(runs: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """Return one line per arm and number of labelled cases, as Markdown."""
    rows = []
    for (arm, count), group in runs.groupby(["arm", "cases"], sort=False):
        cells = []
        for metric in METRICS:
            # No distance can be had of a run that found nothing.
            values = group[metric].dropna()
            some = f" (of {len(values)})" if len(values) < len(group) else ""
            text = f"{values.mean():.3f} ± {values.std(ddof=0):.3f}{some}"
            cells.append(text if len(values) else "none")
        over = ", ".join(f"{one:+.3f}" for one in group["over_scratch"].dropna())
        rows.append([arm, count, cells[0], over, *cells[1:], len(group)])
    header = [
        "arm",
        "labelled cases",
        "Dice",
        "over scratch per seed",
        "ASSD mm",
        "HD95 mm",
        "seeds",
    ]
    structures = "structures merged into one" if settings["merged"] else "both structures"
    return (
        f"{markdown(header, rows)}\n\nMean over {settings['test_cases']} test cases, {structures};"
        " ± is the standard deviation over seeds."
        f" Batch {settings['batch']}, {settings['pretrain_iterations']} iterations of pretraining,"
        f" {settings['fine_tune_iterations']} on labels, STU-Net {settings['size']},"
        f" {settings['device']}{'' if settings['mirroring'] else ', no mirroring'}.\n"
    )


def save_figures(runs: pd.DataFrame, folder: Path) -> None:
    """Write Dice against labelled cases, the Dice of every run, and the training loss."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = runs.explode("train_loss").astype({"train_loss": float})
    losses["epoch"] = losses.groupby(["arm", "cases", "seed"]).cumcount() + 1
    line: dict[str, Any] = {"kind": "line", "hue": "arm"}
    bars = {"marker": "o", "err_style": "bars"}
    figures = {
        "dice": sns.relplot(runs, x="cases", y=DSC, col="network", **line, **bars),
        "seeds": sns.catplot(runs, x=DSC, y="arm", col="cases", kind="strip", alpha=0.6),
        "loss": sns.relplot(losses, x="epoch", y="train_loss", col="cases", errorbar=None, **line),
    }
    for name, grid in figures.items():
        grid.figure.savefig(folder / f"volume_fusion_{name}.png", dpi=130)


def write_report(
    work: Path,
    arms: Mapping[str, Any],
    settings: Mapping[str, Any],
    out: Path,
    figures: Path | None,
) -> None:
    """Write the numbers of all finished runs as JSON, their table beside it, and the figures."""
    pretraining = {
        file.relative_to(work / "pretraining").parts[0]: json.loads(file.read_text())
        for file in sorted((work / "pretraining").rglob("pretext_score.json"))
    }
    runs = collect(work, arms)
    report = {**about(), "settings": dict(settings), "pretraining": pretraining, "runs": runs}
    write_json(out, report)
    frame = pd.DataFrame(runs)
    write_atomically(out.with_suffix(".md"), table(frame, settings))
    if figures is not None:
        save_figures(frame, figures)
