"""What came out of the experiment on ranking weights: CCFV against the Dice after fine-tuning, as
JSON, table and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import kendalltau, pearsonr, weightedtau

from stunet_plugin.utils.files import write_atomically

VARIANTS = {
    "ccfv": "CCFV, averages",
    "published_sums": "CCFV, published sums",
    "spread": "CCFV, inverse energy",
    "consistency": "consistency alone, -log W",
}
"""Key in the JSON to name in the tables; a high value promises a high Dice."""


def scores_of_ranking(
    averages: Mapping[str, Any], sums: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    """Return the variants of the score of each candidate.

    Args:
        averages, sums: what ``stunet rank --json`` wrote, without and with ``--published-sums``.
    """
    by_sums = {entry["name"]: entry["score"] for entry in sums["candidates"]}
    found: dict[str, dict[str, float | None]] = {}
    for entry in averages["candidates"]:
        levels = entry["levels"]
        scored = entry["score"] is not None
        found[entry["name"]] = {
            "ccfv": entry["score"],
            "published_sums": by_sums[entry["name"]],
            "spread": (
                -sum(float(np.log(level["energy"] * level["consistency"])) for level in levels)
                if scored
                else None
            ),
            "consistency": (
                -sum(float(np.log(level["consistency"])) for level in levels) if scored else None
            ),
        }
    return found


def correlations(scores: Sequence[float], dice: Sequence[float]) -> dict[str, float]:
    """Return Kendall's tau with its p value, weighted tau (errors among the best count more) and
    Pearson's r."""
    tau = kendalltau(scores, dice)
    return {
        "kendall_tau": float(tau.statistic),
        "kendall_p": float(tau.pvalue),
        "weighted_tau": float(weightedtau(scores, dice).statistic),
        "pearson_r": float(pearsonr(scores, dice).statistic),
    }


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average scores and Dice over seeds, and correlate them: over all candidates, and among those
    of one size.

    Args:
        runs: one per candidate and seed, with name, size, seed, dice and the scores.
    """
    candidates = []
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        means = {key: _mean([run[key] for run in own]) for key in VARIANTS}
        dice = [run["dice"] for run in own]
        one = {
            "name": name,
            "size": own[0]["size"],
            "seeds": len(own),
            "dice": _mean(dice),
            "dice_spread": float(np.std(dice)),
        }
        candidates.append({**one, **means})
    groups = {"all": candidates}
    for size in dict.fromkeys(one["size"] for one in candidates):
        groups[size] = [one for one in candidates if one["size"] == size]
    found: dict[str, Any] = {}
    for group, members in groups.items():
        for key in VARIANTS:
            known = [one for one in members if one[key] is not None]
            # Three points have a tau of 1 by chance once in six.
            if len(known) >= 3:
                pairs = [one[key] for one in known], [one["dice"] for one in known]
                found.setdefault(group, {})[key] = {
                    "candidates": len(known),
                    **correlations(*pairs),
                }
    return {"candidates": candidates, "correlations": found}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def markdown(summary: Mapping[str, Any]) -> str:
    """Return two tables: the candidates by Dice, and the correlations."""
    lines = [
        f"| weights | Dice | {' | '.join(VARIANTS.values())} |",
        f"|---|{'---:|' * (1 + len(VARIANTS))}",
    ]
    for one in sorted(summary["candidates"], key=lambda one: -one["dice"]):
        cells = " | ".join("n/a" if one[key] is None else f"{one[key]:.2f}" for key in VARIANTS)
        lines.append(f"| {one['name']} | {one['dice']:.3f} ± {one['dice_spread']:.3f} | {cells} |")
    lines += [
        "",
        "| candidates | score | Kendall's tau (p) | weighted tau | Pearson's r |",
        "|---|---|---:|---:|---:|",
    ]
    for group, scores in summary["correlations"].items():
        for key, values in scores.items():
            tau = f"{values['kendall_tau']:.2f} ({values['kendall_p']:.2f})"
            last = f"{values['weighted_tau']:.2f} | {values['pearson_r']:.2f}"
            lines.append(f"| {group} ({values['candidates']}) | {VARIANTS[key]} | {tau} | {last} |")
    return "\n".join(lines) + "\n"


def save_scatter(summary: Mapping[str, Any], path: Path) -> None:
    """Write Dice against score, a panel per variant of the score, a colour per size."""
    figure = Figure(figsize=(4 * len(VARIANTS), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(
        figure.subplots(1, len(VARIANTS), sharey=True), VARIANTS.items(), strict=True
    ):
        for size in dict.fromkeys(one["size"] for one in summary["candidates"]):
            known = [
                one for one in summary["candidates"] if one["size"] == size and one[key] is not None
            ]
            axis.errorbar(
                [one[key] for one in known],
                [one["dice"] for one in known],
                [one["dice_spread"] for one in known],
                fmt="o",
                capsize=2,
                label=size,
            )
            for one in known:
                axis.annotate(
                    one["name"],
                    (one[key], one["dice"]),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=6,
                )
        tau = summary["correlations"].get("all", {}).get(key)
        axis.set(title=title + (f"\ntau {tau['kendall_tau']:.2f}" if tau else ""), xlabel="score")
        axis.grid(alpha=0.3)
        axis.margins(x=0.2)
    first = figure.axes[0]
    first.set_ylabel("Dice after fine-tuning")
    first.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def write_report(
    runs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], out: Path, figure: Path | None
) -> None:
    """Write the numbers of all finished runs as JSON, their tables beside it, and the figure."""
    summary = summarise(runs)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_atomically(
        out,
        json.dumps(
            {"date": date, "settings": dict(settings), **summary, "runs": list(runs)}, indent=1
        ),
    )
    write_atomically(out.with_suffix(".md"), markdown(summary))
    if figure is not None:
        save_scatter(summary, figure)
