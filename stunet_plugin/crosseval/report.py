"""One HTML file with everything in it: no script, nothing from a network, for screens of any width
and for paper."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.crosseval.comparison import few
from stunet_plugin.crosseval.measures import HD95, LARGER_IS_BETTER, MEASURES, UNITS
from stunet_plugin.crosseval.results import PairScores, Results, shown
from stunet_plugin.utils.files import write_atomically

SIGNIFICANT = 0.05

STYLE = """
:root { color-scheme: light; --ink: #1d2630; --soft: #5b6774; --line: #d9dfe5; --paper: #fff; --tint: #f4f6f8; --accent: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 0.5rem; border-bottom: 2px solid var(--line); padding-bottom: 0.25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 0.25rem; }
p.about, figcaption, .note { color: var(--soft); font-size: 0.9rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.wide.text { margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: 0.35rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
thead th { background: var(--tint); }
td.long { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
td.best { font-weight: 700; color: var(--accent); }
td small { display: block; color: var(--soft); font-weight: 400; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; }
details { border: 1px solid var(--line); border-radius: 4px; margin: 0.5rem 0; padding: 0.25rem 0.75rem; }
summary { cursor: pointer; font-weight: 600; padding: 0.25rem 0; }
ul.warnings { background: #fff8e1; border-left: 4px solid #e0a800; padding: 0.5rem 1rem 0.5rem 2rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  main { padding: 0.6rem; }
  th, td { padding: 0.3rem 0.4rem; }
  .wide > img { max-width: 44rem; }
}
@media print {
  @page { margin: 15mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  table { font-size: 8pt; min-width: 0; }
  th, td { white-space: normal; padding: 0.15rem 0.3rem; }
  td.long { min-width: 0; }
  h2, h3 { break-after: avoid; }
  figure, tr, details { break-inside: avoid; }
  img { max-height: 230mm; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""  # noqa: E501


def write_report(
    results: Results,
    about: Sequence[str],
    models: Mapping[str, Mapping[str, Any]],
    datasets: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[tuple[Path, str]],
    path: Path,
) -> None:
    """Write the report.

    Args:
        results: scores and tests.
        about: lines on what was compared and how.
        models, datasets: by name, as :mod:`stunet_plugin.crosseval.compared` describes them.
        pictures: PNG files with their captions; they are put into the page.
        path: of the HTML file.
    """
    parts = [
        "<h1>Models across datasets</h1>",
        *(f'<p class="about">{escape(line)}</p>' for line in about),
        *_warnings(results),
        "<h2>What was compared</h2>",
        _models(models),
        _datasets(datasets),
        "<h2>Scores</h2>",
        (
            '<p class="note">Mean over classes of the mean over cases, below it the 95 % bootstrap'
            " interval over cases. In bold the best model of each dataset. A distance is undefined"
            " where reference or prediction has nothing of a class; those take no part in the mean,"
            " so a model that misses a class is not better for a shorter distance.</p>"
        ),
        *(
            part
            for measure in LARGER_IS_BETTER
            for part in (f"<h3>{_title(measure)}</h3>", _matrix(results, measure))
        ),
        *(_figure(picture, caption) for picture, caption in pictures),
        "<h2>Differences between models</h2>",
        (
            '<p class="note">Paired Wilcoxon tests over the mean scores of the cases, corrected for'
            " all tests of a measure (Holm). With fewer than six cases no test is made.</p>"
        ),
        _tests(results),
        "<h2>Classes</h2>",
        (
            '<p class="note">Means over cases. Undefined: cases in which reference or prediction'
            " has nothing of the class, so that there is no distance.</p>"
        ),
        *(_classes(one) for one in results.scores),
    ]
    body = "\n".join(part for part in parts if part)
    write_atomically(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Models across datasets</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
    )


def _models(models: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, model in models.items():
        axes = ", ".join(map(str, model["mirroring_axes"]))
        mirroring = f"on axes {axes}" if axes else "on, of no axis" if model["mirroring"] else "off"
        trained = (model["trainer"], model["plans"], model["configuration"])
        folds = f"fold{'s' if len(model['folds']) > 1 else ''} {', '.join(model['folds'])}"
        predicts = (
            f"{folds}, {model['checkpoint']}",
            f"mirroring {mirroring}",
            f"step size {model['step_size']:g}",
        )
        rows.append(_text_row([name], trained, predicts, [model["folder"]], [_labels(model)]))
    return _table(
        ["model", "trainer, plans, configuration", "predicts with", "folder", "labels"],
        rows,
        kind="text",
    )


def _datasets(datasets: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, dataset in datasets.items():
        places = [str(dataset[key]) for key in ("folder", "images", "references") if key in dataset]
        rows.append(
            _text_row(
                [name],
                [dataset.get("part", "")],
                [str(dataset["cases"])],
                places,
                [_labels(dataset)],
            )
        )
    return _table(["dataset", "part", "cases", "folder", "labels"], rows, kind="text")


def _labels(subject: Mapping[str, Any]) -> str:
    return f"{subject['labels_from']}: {few(subject['classes'])}"


def _text_row(*cells: Sequence[str]) -> str:
    """Cells of one or more lines of words; the last two, folders and labels, are long and wrap."""
    shown = ["".join(f"<div>{escape(line)}</div>" for line in lines) for lines in cells]
    last = len(shown) - 2
    return "".join(
        f'<td class="long">{cell}</td>' if index >= last else f"<td>{cell}</td>"
        for index, cell in enumerate(shown)
    )


def _title(measure: str) -> str:
    unit = f", {UNITS[measure]}" if measure in UNITS else ""
    return f"{measure}{unit} ({'larger' if LARGER_IS_BETTER[measure] else 'smaller'} is better)"


def _matrix(results: Results, measure: str) -> str:
    matrix = results.matrix(measure)
    undefined = results.undefined(measure)
    # Means over other cases cannot be compared.
    compared = np.where(
        undefined.any(axis=0), np.nan, matrix if LARGER_IS_BETTER[measure] else -matrix
    )
    rows = []
    for row, model in enumerate(results.models):
        cells = [f"<td>{escape(model)}</td>"]
        for column, dataset in enumerate(results.datasets):
            cell = results.cell(model, dataset, measure)
            others = compared[:, column][np.isfinite(compared[:, column])]
            best = (
                ' class="best"'
                if len(others) > 1
                and np.isfinite(cell.mean)
                and compared[row, column] == others.max()
                else ""
            )
            below = (
                f"<small>{cell.low:.3f} to {cell.high:.3f}</small>"
                if np.isfinite(cell.mean)
                else ""
            )
            below += (
                f"<small>{undefined[row, column]} undefined</small>"
                if undefined[row, column]
                else ""
            )
            cells.append(f"<td{best}>{shown(cell).partition(' ')[0]}{below}</td>")
        rows.append("".join(cells))
    return _table(["model", *results.datasets], rows)


def _tests(results: Results) -> str:
    rows = []
    for test in results.tests:
        values = (test.measure, test.dataset, test.first, test.second)
        numbers = (str(test.cases), f"{test.difference:+.3f}", _p(test.p), _p(test.corrected))
        verdict = (
            "yes"
            if test.corrected < SIGNIFICANT
            else "no"
            if np.isfinite(test.corrected)
            else "too few cases"
        )
        rows.append("".join(f"<td>{escape(value)}</td>" for value in (*values, *numbers, verdict)))
    if not rows:
        return "<p>There is one model, so nothing to test.</p>"
    header = [
        "measure",
        "dataset",
        "first",
        "second",
        "cases",
        "first - second",
        "p",
        "p corrected",
        f"differ (p < {SIGNIFICANT})",
    ]
    return _table(header, rows)


def _classes(scores: PairScores) -> str:
    pair = scores.pair
    rows = []
    for column, scored in enumerate(pair.classes):
        means = [_mean(scores.values[measure][:, column]) for measure in MEASURES]
        undefined = int(np.isnan(scores.values[HD95][:, column]).sum())
        marks = f"{scored.tolerance:g} mm" + (", sliced" if scored.sliced else "")
        rows.append(
            "".join(
                f"<td>{escape(cell)}</td>" for cell in (scored.name, *means, str(undefined), marks)
            )
        )
    header = [
        "class",
        *(
            measure.replace("_", " ") + (f", {UNITS[measure]}" if measure in UNITS else "")
            for measure in MEASURES
        ),
    ]
    left = "".join(
        f'<p class="note">Only in the {kind}, not scored: {escape(", ".join(names))}.</p>'
        for kind, names in (("dataset", pair.only_in_dataset), ("model", pair.only_in_model))
        if names
    )
    table = (
        _table([*header, "undefined", "tolerance"], rows) if rows else "<p>No class in common.</p>"
    )
    size = f" <small>({len(scores.cases)} cases, {len(scores.classes)} classes)</small>"
    return (
        f"<details><summary>{escape(pair.model.name)} on"
        f" {escape(pair.dataset.name)}{size}</summary>{table}{left}</details>"
    )


def _warnings(results: Results) -> Iterable[str]:
    lines = [
        f"<li>{escape(one.pair.model.name)} on {escape(one.pair.dataset.name)}, {escape(case)}:"
        f" {escape(warning)}</li>"
        for one in results.scores
        for case, warnings in one.warnings.items()
        for warning in warnings
    ]
    return [f'<ul class="warnings">{"".join(lines)}</ul>'] if lines else []


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return (
        "<figure><div"
        f' class="wide">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _table(header: Sequence[str], rows: Sequence[str], kind: str = "numbers") -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<div class="wide'
        f' {kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _mean(values: np.ndarray) -> str:
    defined = values[np.isfinite(values)]
    return f"{defined.mean():.3f}" if len(defined) else "n/a"


def _p(value: float) -> str:
    if not np.isfinite(value):
        return "n/a"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
