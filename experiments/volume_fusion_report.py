"""Scores, table and figures of the hippocampus experiment on Volume Fusion, from what its runs left
behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.ndimage import binary_erosion, distance_transform_edt
from volume_fusion_arms import GROUPS, Arm

from stunet_plugin.utils.files import write_atomically

ARMS = {arm.folder: arm for group in GROUPS.values() for arm in group}
METRICS = {"dice": "Dice", "assd": "ASSD", "hd95": "HD95"}
"""Key in the JSON to name in the table; distances are in mm."""


def surface_distances(
    first: np.ndarray, second: np.ndarray, spacing: Iterable[float]
) -> np.ndarray:
    """Return the distances in mm from each mask's surface voxels to the other's surface, both ways;
    none if a mask is empty."""
    if not (first.any() and second.any()):
        return np.empty(0)
    sampling = tuple(spacing)
    surfaces = [mask & ~binary_erosion(mask) for mask in (first, second)]
    to_surface = [distance_transform_edt(~surface, sampling=sampling) for surface in surfaces]
    return np.concatenate([to_surface[1][surfaces[0]], to_surface[0][surfaces[1]]])


def score_case(
    reference: np.ndarray, prediction: np.ndarray, spacing: Iterable[float]
) -> dict[str, float]:
    """Return Dice, average symmetric surface distance and its 95th percentile (mm) of one
    structure.

    Both empty is a Dice of 1. Distances are NaN where either is empty.
    """
    size = int(reference.sum()) + int(prediction.sum())
    distances = surface_distances(reference, prediction, spacing)
    return {
        "dice": 2 * int((reference & prediction).sum()) / size if size else 1.0,
        "assd": float(distances.mean()) if distances.size else float("nan"),
        "hd95": float(np.percentile(distances, 95)) if distances.size else float("nan"),
    }


def score_run(fold: Path, references: Path, out: Path) -> None:
    """Score the predicted test cases of a fold against their labels and write a JSON, unless it is
    there."""
    if out.is_file():
        return
    checkpoint = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    log = checkpoint["logging"]
    labels = {
        name: value
        for name, value in checkpoint["init_args"]["dataset_json"]["labels"].items()
        if value
    }
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for file in sorted((fold / "validation").glob("*.nii.gz")):
        images = [sitk.ReadImage(str(path)) for path in (references / file.name, file)]
        reference, prediction = (sitk.GetArrayFromImage(image) for image in images)
        spacing = images[0].GetSpacing()[::-1]
        cases[file.name.removesuffix(".nii.gz")] = {
            name: score_case(reference == value, prediction == value, spacing)
            for name, value in labels.items()
        }
    seconds = np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"]).sum()
    scores = {
        "train_loss": [float(loss) for loss in log["train_losses"]],
        "seconds": float(seconds),
        "cases": cases,
    }
    write_atomically(out, json.dumps(scores))


def mean_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Average over structures and cases; how many structures were missed altogether."""
    structures = [structure for case in scores["cases"].values() for structure in case.values()]
    found = {
        metric: [structure[metric] for structure in structures if not np.isnan(structure[metric])]
        for metric in METRICS
    }
    means = {
        metric: float(np.mean(values)) if values else float("nan")
        for metric, values in found.items()
    }
    return {**means, "missed": int(np.isnan([structure["assd"] for structure in structures]).sum())}


def collect(work: Path) -> list[dict[str, Any]]:
    """Return one record per finished run: arm, labelled cases, seed, mean scores, training loss."""
    records = []
    for file in sorted((work / "fine_tuning").glob("*/cases_*_seed_*/scores.json")):
        _, count, _, seed = file.parent.name.split("_")
        arm: Arm = ARMS[file.parent.parent.name]
        scores = json.loads(file.read_text())
        records.append(
            {
                "arm": arm.name,
                "network": arm.network,
                "cases": int(count),
                "seed": int(seed),
                **mean_scores(scores),
                "seconds": scores["seconds"],
                "train_loss": scores["train_loss"],
            }
        )
    order = {arm.name: position for position, arm in enumerate(ARMS.values())}
    return sorted(
        records, key=lambda record: (order[record["arm"]], record["cases"], record["seed"])
    )


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds per arm and number of cases, with the difference from scratch on the same
    seeds."""
    summary = []
    by_key = {(record["arm"], record["cases"], record["seed"]): record for record in records}
    for arm, count in dict.fromkeys((record["arm"], record["cases"]) for record in records):
        runs = [record for record in records if (record["arm"], record["cases"]) == (arm, count)]
        row: dict[str, Any] = {
            "arm": arm,
            "network": runs[0]["network"],
            "cases": count,
            "seeds": len(runs),
        }
        for metric in METRICS:
            # No distance can be had of a run that found nothing.
            values = [run[metric] for run in runs if not np.isnan(run[metric])] or [float("nan")]
            row[metric] = {
                "mean": float(np.mean(values)),
                "standard_deviation": float(np.std(values)),
                "of": len(values),
            }
        scratch = [by_key.get((f"{run['network']} scratch", count, run["seed"])) for run in runs]
        differences = [
            run["dice"] - other["dice"]
            for run, other in zip(runs, scratch, strict=True)
            if other is not None
        ]
        row["dice_over_scratch"] = differences if not arm.endswith(" scratch") else []
        summary.append(row)
    return summary


def _cell(score: Mapping[str, float], seeds: int) -> str:
    some = f" (of {score['of']})" if score["of"] < seeds else ""
    return (
        f"{score['mean']:.3f} ± {score['standard_deviation']:.3f}{some}"
        if not np.isnan(score["mean"])
        else "none"
    )


def markdown_table(summary: list[dict[str, Any]], settings: Mapping[str, Any]) -> str:
    """Return one line per arm and number of labelled cases."""
    lines = [
        "| arm | labelled cases | Dice | over scratch, per seed | ASSD mm | HD95 mm | seeds |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in summary:
        cells = [_cell(row[metric], row["seeds"]) for metric in METRICS]
        over = ", ".join(f"{difference:+.3f}" for difference in row["dice_over_scratch"])
        lines.append(
            f"| {row['arm']} | {row['cases']} | {cells[0]} | {over} | {cells[1]} | {cells[2]} |"
            f" {row['seeds']} |"
        )
    size = (
        f"STU-Net {settings['size']}, "
        if any(row["network"] == "stunet" for row in summary)
        else ""
    )
    structures = "structures merged into one" if settings["merged"] else "both structures"
    lines += [
        "",
        (
            f"Mean over {settings['test_cases']} test cases, {structures}; ± is the standard"
            f" deviation over seeds. Batch {settings['batch']}, {settings['pretrain_iterations']}"
            f" iterations of pretraining, {settings['fine_tune_iterations']} of training on labels,"
            f" {size}{settings['device']}{'' if settings['mirroring'] else ', no mirroring'}."
        ),
    ]
    return "\n".join(lines)


def read_pretraining_scores(work: Path) -> dict[str, Any]:
    """Return the pretext score of every finished pretraining."""
    files = sorted((work / "pretraining").rglob("pretext_score.json"))
    return {
        file.relative_to(work / "pretraining").parts[0]: json.loads(file.read_text())
        for file in files
    }


def save_dice_figure(summary: list[dict[str, Any]], path: Path) -> None:
    """Write Dice against the number of labelled cases, one panel per network, one line per arm."""
    names = list(dict.fromkeys(row["network"] for row in summary))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(
        figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True
    ):
        for arm in dict.fromkeys(row["arm"] for row in summary if row["network"] == name):
            rows = [row for row in summary if row["arm"] == arm]
            means, spread = (
                [row["dice"][key] for row in rows] for key in ("mean", "standard_deviation")
            )
            style = "--" if "scratch" in arm else "-"
            axis.errorbar(
                [row["cases"] for row in rows],
                means,
                spread,
                linestyle=style,
                marker="o",
                capsize=3,
                label=arm,
            )
        axis.set(title=name, xlabel="labelled cases", ylabel="Dice of the test cases")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def save_loss_figure(records: list[dict[str, Any]], path: Path) -> None:
    """Write the training loss on labelled cases per epoch, mean over seeds, one panel per number of
    cases."""
    counts = sorted({record["cases"] for record in records})
    figure = Figure(figsize=(5 * len(counts), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, count in zip(
        figure.subplots(1, len(counts), squeeze=False, sharey=True)[0], counts, strict=True
    ):
        for arm in dict.fromkeys(record["arm"] for record in records):
            losses = [
                record["train_loss"]
                for record in records
                if (record["arm"], record["cases"]) == (arm, count)
            ]
            if losses:
                axis.plot(np.mean(losses, axis=0), "--" if "scratch" in arm else "-", label=arm)
        axis.set(title=f"{count} labelled cases", xlabel="epoch", ylabel="training loss")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def save_seeds_figure(records: list[dict[str, Any]], path: Path) -> None:
    """Write the Dice of every run as a point, one row per arm, one panel per number of cases."""
    counts = sorted({record["cases"] for record in records})
    names = list(dict.fromkeys(record["arm"] for record in records))[::-1]
    figure = Figure(figsize=(2.5 + 4 * len(counts), 1.2 + 0.3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, count in zip(
        figure.subplots(1, len(counts), squeeze=False, sharey=True)[0], counts, strict=True
    ):
        for row, name in enumerate(names):
            dice = [
                record["dice"]
                for record in records
                if (record["arm"], record["cases"]) == (name, count)
            ]
            axis.plot(
                dice,
                [row] * len(dice),
                "o",
                color="tab:gray" if "scratch" in name else "tab:blue",
                alpha=0.6,
            )
            axis.plot(np.mean(dice) if dice else np.nan, row, "|", color="black", markersize=14)
        axis.set(
            title=f"{count} labelled cases",
            xlabel="Dice of the test cases (line: mean over seeds)",
            xlim=(-0.03, 1),
        )
        axis.set_yticks(range(len(names)), names)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _nan_as_null(value: Any) -> Any:
    """Return the same with None for every NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _nan_as_null(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_nan_as_null(entry) for entry in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def write_report(work: Path, settings: Mapping[str, Any], out: Path, figures: Path | None) -> None:
    """Write the numbers of all finished runs as JSON, their table beside it, and the figures."""
    records = collect(work)
    if not records:
        return
    summary = summarise(records)
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": dict(settings),
        "pretraining": read_pretraining_scores(work),
        "summary": summary,
        "runs": records,
    }
    write_atomically(out, json.dumps(_nan_as_null(report), indent=1))
    write_atomically(out.with_suffix(".md"), markdown_table(summary, settings) + "\n")
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        save_dice_figure(summary, figures / "volume_fusion_dice.png")
        save_loss_figure(records, figures / "volume_fusion_loss.png")
        save_seeds_figure(records, figures / "volume_fusion_seeds.png")
