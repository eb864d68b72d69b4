"""Report of a few-shot comparison: tables as CSV and Markdown, paired tests, learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from stunet_plugin.few_shot.scores import SHOWN
from stunet_plugin.utils.figures import distinct_colours, saved_figure
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.utils.measures import DSC, NSD
from stunet_plugin.utils.paired_tests import SIGNIFICANT, holm, wilcoxon

TABLE, REPORT, CURVES = "scores.csv", "few_shot.md", "few_shot.png"


def by_draw(table: pd.DataFrame) -> pd.DataFrame:
    """Return the means over cases and classes: a row per candidate, number of labelled cases and
    draw. What is not defined (a distance to nothing) takes no part."""
    keys = ["candidate", "shots", "draw"]
    return table.groupby(keys, sort=False)[list(SHOWN)].mean().reset_index()


def mean_dice_of(table: pd.DataFrame, shots: int) -> dict[str, float]:
    """Return the mean Dice of each candidate with a number of labelled cases."""
    draws = by_draw(table[table["shots"] == shots])
    return {str(name): float(dice) for name, dice in draws.groupby("candidate")[DSC].mean().items()}


def paired_tests(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per number of labelled cases and two candidates: the mean difference of their
    Dice, in how many draws the first is ahead, and p of the paired Wilcoxon test on the test cases
    (means over the draws that both have), corrected for all tests by Holm's method."""
    rows = []
    for shots, part in table.groupby("shots"):
        values = part.pivot_table(index=["case", "draw"], columns="candidate", values=DSC)
        for first, second in combinations(dict.fromkeys(part["candidate"]), 2):
            differences = (values[first] - values[second]).dropna()
            cases, draws = (differences.groupby(level=x).mean() for x in ("case", "draw"))
            ahead = f"{int((draws > 0).sum())} of {len(draws)}"
            p = wilcoxon(cases.to_numpy())
            rows.append((shots, first, second, float(cases.mean()), ahead, p))
    columns = ["shots", "first", "second", "difference", "draws ahead", "p"]
    tests = pd.DataFrame(rows, columns=columns)
    return tests.assign(corrected=holm(tests["p"]))


def write_report(
    table: pd.DataFrame,
    out: Path,
    facts: Sequence[str],
    ranked: tuple[pd.DataFrame, Mapping[str, float], int] | None,
) -> str:
    """Write the CSV, the Markdown and the picture; return the Markdown.

    Args:
        facts: lines on what was done.
        ranked: scores of ``stunet rank``, how far each agrees, and at how many labelled cases.
    """
    write_atomically(out / TABLE, table.to_csv(index=False))
    text = ["# Few-shot comparison", "", *facts, "", _means(table), "", _tests(table)]
    if ranked is not None:
        text += ["", _ranking(table, *ranked)]
    content = "\n".join([*text, "", f"![Learning curves]({CURVES})", ""])
    write_atomically(out / REPORT, content)
    save_curves(table, out / CURVES)
    return content


def _means(table: pd.DataFrame) -> str:
    rows = []
    for (shots, candidate), draws in by_draw(table).groupby(["shots", "candidate"], sort=False):
        cells = [spread(draws[measure]) for measure in SHOWN]
        each = ", ".join(f"{value:.3f}" for value in draws.sort_values("draw")[DSC])
        rows.append([str(shots), candidate, *cells, each])
    header = ["labelled cases", "weights", *SHOWN, f"{DSC} of each draw"]
    return markdown(header, rows)


def _tests(table: pd.DataFrame) -> str:
    rows = []
    for one in paired_tests(table).to_dict("records"):
        p = "n/a" if np.isnan(one["corrected"]) else f"{one['corrected']:.3f}"
        sure = " *" if one["corrected"] < SIGNIFICANT else ""
        which = [str(one["shots"]), f"{one['first']} - {one['second']}"]
        rows.append([*which, f"{one['difference']:+.3f}", one["draws ahead"], f"{p}{sure}"])
    header = ["labelled cases", "difference of the Dice", "mean", "draws ahead", "p"]
    told = (
        "p: paired Wilcoxon test over the test cases, corrected by Holm's method. It says whether"
        " these trainings differ on other cases, not whether other draws would."
    )
    return f"{markdown(header, rows)}\n\n{told}"


def _ranking(
    table: pd.DataFrame, scores: pd.DataFrame, taus: Mapping[str, float], shots: int
) -> str:
    dice = mean_dice_of(table, shots)
    order = sorted(scores.index, key=lambda name: -dice[name])
    rows = [[x, f"{dice[x]:.3f}", *(f"{v:.3f}" for v in scores.loc[x])] for x in order]
    cells = ["n/a" if np.isnan(x) else f"{x:.2f}" for x in taus.values()]
    rows.append(["weighted Kendall tau", "", *cells])
    names = [f"`{name}`" for name in scores]
    few = " With fewer than five, an order can be right by chance." if len(order) < 5 else ""
    told = f"Scores of `stunet rank` on the labelled cases, {len(order)} candidates.{few}"
    return f"{markdown(['weights', f'{DSC}, {shots} cases', *names], rows)}\n\n{told}"


def spread(values: pd.Series) -> str:
    """Return mean and standard deviation."""
    known = values.dropna()
    if known.empty:
        return "n/a"
    return f"{known.mean():.3f}" + (f" ± {known.std():.3f}" if len(known) > 1 else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def save_curves(table: pd.DataFrame, path: Path) -> None:
    """Write a PNG with DSC and NSD against the number of labelled cases: the mean over draws, and
    each draw as a point."""
    draws, candidates = by_draw(table), list(dict.fromkeys(table["candidate"]))
    colours = dict(zip(candidates, distinct_colours(len(candidates)), strict=True))
    with saved_figure(path, 10, 4.2) as figure:
        for axis, measure in zip(figure.subplots(1, 2), (DSC, NSD), strict=True):
            for name in candidates:
                mine = draws[draws["candidate"] == name]
                means = mine.groupby("shots")[measure].mean()
                axis.plot(means.index, means, marker="o", color=colours[name], label=name)
                axis.scatter(mine["shots"], mine[measure], s=9, alpha=0.5, color=colours[name])
            axis.set(xlabel="labelled cases", ylabel=measure, xticks=sorted(set(draws["shots"])))
            axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        look = {"loc": "outside lower center", "ncols": 4, "fontsize": 8, "frameon": False}
        figure.legend(handles, labels, **look)
