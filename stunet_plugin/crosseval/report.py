"""Report of a comparison: one HTML file without scripts or anything from a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.crosseval.measures import HD95, LARGER_IS_BETTER, MEASURES, NAMES, NSD, UNITS
from stunet_plugin.crosseval.results import SIGNIFICANT, PairedTest, Results
from stunet_plugin.errors import few
from stunet_plugin.utils.files import write_atomically


def write_report(
    results: Results,
    lines: Sequence[str],
    about: Mapping[str, Any],
    pictures: Mapping[Path, str],
    path: Path,
) -> None:
    """Write the report.

    Args:
        results: scores.
        lines: on what was compared and how.
        about: ``models`` and ``datasets`` by name as they describe themselves, ``tolerances_mm``.
        pictures: PNG files with their captions; they are put into the page.
        path: of the HTML file.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stunet_plugin.crosseval", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"few": few, "p": _p, "number": _number}
    tests = results.tests()
    page = environment.get_template("report.html.j2").render(
        lines=lines,
        about=about,
        warnings=results.warnings,
        datasets=results.datasets,
        matrices=[_matrix(results, measure, tests) for measure in LARGER_IS_BETTER],
        pictures=[
            (base64.b64encode(file.read_bytes()).decode(), caption)
            for file, caption in pictures.items()
        ],
        tests=tests,
        significant=SIGNIFICANT,
        measures=[_title(measure) for measure in MEASURES],
        pairs=[_by_class(results, pair) for pair in results.pairs],
    )
    write_atomically(path, page)


def _matrix(results: Results, measure: str, tests: Sequence[PairedTest]) -> dict[str, Any]:
    """Return the table of a measure: title, and per model its cells.

    A cell is in bold only where tests say that the model is better than every other one.
    """
    undefined = results.undefined(measure)
    rows = []
    for model in results.models:
        cells = []
        for dataset in results.datasets:
            cell = results.cell(model, dataset, measure)
            count = int(undefined.loc[model, dataset])
            others = [
                test
                for test in tests
                if (test.measure, test.dataset) == (measure, dataset)
                and model in (test.first, test.second)
            ]
            alone = len(others) == len(results.models) - 1 > 0
            best = alone and all(test.better == model for test in others)
            cells.append({"estimate": cell, "undefined": count, "best": best})
        rows.append((model, cells))
    better = "larger" if LARGER_IS_BETTER[measure] else "smaller"
    title = f"{_title(measure)}: {better} is better"
    tolerances = {s.name: s.tolerance for pair in results.pairs for s in pair.classes}
    shown = ", ".join(f"{name} {value:g}" for name, value in tolerances.items())
    note = f"Tolerance in mm: {shown}." if measure == NSD else ""
    return {"title": title, "rows": rows, "note": note}


def _by_class(results: Results, pair: Any) -> dict[str, Any]:
    part = results.part(pair.model.name, pair.dataset.name)
    grouped = part.groupby("class", sort=False)
    means = grouped[list(MEASURES)].mean()
    undefined = grouped[HD95].agg(lambda values: int(values.isna().sum()))
    rows = [
        (scored, list(means.loc[scored.name]), int(undefined[scored.name]))
        for scored in pair.classes
    ]
    return {"pair": pair, "rows": rows, "cases": len(pair.dataset.cases)}


def _title(measure: str) -> str:
    unit = f", {UNITS[measure]}" if measure in UNITS else ""
    return f"{NAMES[measure]}{unit}"


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "n/a"


def _p(value: float) -> str:
    if not np.isfinite(value):
        return "n/a"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
