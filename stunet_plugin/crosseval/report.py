"""Report of a comparison: the table of scores as CSV, a summary as JSON, the matrices as Markdown,
and one HTML file without scripts or anything from a network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stunet_plugin import __version__
from stunet_plugin.crosseval.calibration import describe, save_reliability
from stunet_plugin.crosseval.pictures import PICTURES
from stunet_plugin.crosseval.statistics import COLUMNS, Results, number
from stunet_plugin.errors import few
from stunet_plugin.utils.files import without_nan, write_atomically
from stunet_plugin.utils.measures import LARGER_IS_BETTER, MEASURES, TITLES
from stunet_plugin.utils.paired_tests import SIGNIFICANT

REPORT, RELIABILITY = "report.html", "reliability.png"


def write_results(results: Results) -> None:
    """Write all files that people look at, and print the matrices."""
    setup, classes = results.comparison.setup, results.comparison.classes
    out = setup.output
    about: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "stunet_plugin": __version__,
        "models": {model.name: model.describe() for model in setup.models},
        "datasets": {dataset.name: dataset.describe() for dataset in setup.datasets},
        "tolerances_mm": {name: scored.tolerance for name, scored in classes.items()},
        "sliced": sorted(name for name, scored in classes.items() if scored.sliced),
    }
    # One row per measure, no value where undefined.
    table = results.table.set_index(COLUMNS).rename_axis(columns="measure").stack()
    scores = table.rename("value").reset_index().to_csv(index=False, float_format="%.6g")
    write_atomically(out / "scores.csv", scores)
    summary = json.dumps(without_nan(_summary(results, about)), indent=1, allow_nan=False)
    write_atomically(out / "summary.json", summary + "\n")
    matrices = _matrices(results)
    write_atomically(out / "matrix.md", matrices)
    for name, save in PICTURES.items():
        save(results, out / name)
    if results.calibrations:
        save_reliability(results, out / RELIABILITY)
    write_atomically(out / REPORT, _page(results, about))
    print(matrices)


def _summary(results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the means, intervals, tests and what was left out."""
    pairs = []
    for pair in results.comparison.pairs:
        by_class = results.by_class(pair)
        means = {name: asdict(results.cell(*pair.names, name)) for name in LARGER_IS_BETTER}
        pairs.append(
            {
                "model": pair.model.name,
                "dataset": pair.dataset.name,
                "cases": len(pair.dataset.cases),
                "classes": [scored.name for scored in pair.classes],
                "mean": means,
                "by_class": by_class[list(MEASURES)].to_dict("index"),
                "lesions": results.lesions_of(pair),
                "calibration": found.describe()
                if (found := results.calibrations.get(pair.names))
                else None,
                "undefined_distances": by_class["undefined"].to_dict(),
                "only_in_dataset": pair.only_in_dataset,
                "only_in_model": pair.only_in_model,
                "warnings": {x[2]: y for x, y in results.warnings.items() if x[:2] == pair.names},
            }
        )
    tests = results.tests.drop(columns="better").to_dict("records")
    return {**about, "pairs": pairs, "tests": tests}


def _matrices(results: Results) -> str:
    """Return the models x datasets matrix of each measure as Markdown."""
    note = "Mean over classes of the mean over cases, with the 95 % bootstrap interval over cases."
    blocks = ["# Models and datasets", note]
    for measure, larger in LARGER_IS_BETTER.items():
        cells = results.matrix(measure).map(str).rename_axis("model").reset_index()
        rows = [cells.columns, ["---", *("---:" for _ in results.datasets)], *cells.to_numpy()]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        better = "larger" if larger else "smaller"
        blocks.append(f"## {measure} ({better} is better)\n\n{table}")
    return "\n\n".join(blocks) + "\n"


def _page(results: Results, about: Mapping[str, Any]) -> str:
    """Return the report as HTML, with the pictures in it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("stunet_plugin.crosseval", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"few": few, "number": number}
    environment.filters["maybe"] = lambda x: number(math.nan if x is None else x)
    environment.filters["p"] = lambda p: "< 0.001" if p < 0.001 else number(p)
    out = results.comparison.setup.output
    return environment.get_template("report.html.j2").render(
        results=results,
        comparison=results.comparison,
        about=about,
        pictures={x: _encoded(out / x) for x in PICTURES},
        reliability=_encoded(out / RELIABILITY) if results.calibrations else "",
        thresholds=describe(results),
        significant=SIGNIFICANT,
        titles=TITLES,
        larger_is_better=LARGER_IS_BETTER,
    )


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()
