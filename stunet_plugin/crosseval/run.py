"""Run of ``stunet crosseval``: predicts what is missing, scores it, writes tables and a report.

Everything is checked before anything is written, and what is finished when a run is interrupted is
not done again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from stunet_plugin import __version__
from stunet_plugin.crosseval import report, results
from stunet_plugin.crosseval.comparison import Pair, describe, dropped, pair_up
from stunet_plugin.crosseval.inputs import Setup, read_setup
from stunet_plugin.crosseval.predictions import check_model, predict_missing
from stunet_plugin.crosseval.scoring import score_pairs
from stunet_plugin.errors import PluginError, few_lines
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.geometry import can_be_turned
from stunet_plugin.utils.images import read_geometry, read_label_map

if TYPE_CHECKING:
    from stunet_plugin.commands.crosseval import Crosseval

CSV, SUMMARY, MATRIX, REPORT = "scores.csv", "summary.json", "matrix.md", "report.html"
HEAT_MAP, BOXES, WORST = "matrix.png", "boxes.png", "worst_cases.png"
CAPTIONS = {
    HEAT_MAP: "Mean scores of every model (rows) on every dataset (columns).",
    BOXES: "Mean scores of the cases: median and quartiles, and every case as a point.",
    WORST: "Cases with the lowest DSC, as many of each model, where reference (solid) and"
    " prediction (dashed) differ most.",
}


def run_crosseval(options: Crosseval) -> int:
    """Carry out a comparison; return the exit code."""
    processes = options.processes
    if processes is None:
        processes = max((os.cpu_count() or 1) // 2, 1)
    if processes < 1:
        raise PluginError(f"-np must be at least 1, not {processes}.")
    setup = read_setup(options)
    pairs = pair_up(setup)
    _check_geometry(setup)
    device = choose_device(options.device)
    _import_all()
    lines = describe(pairs)
    print("\n".join(lines), flush=True)
    if options.check:
        _check_files(pairs, setup, device)
        return 0
    setup.out.mkdir(parents=True, exist_ok=True)
    try:
        predict_missing(pairs, setup.out, device, processes)
        _write(score_pairs(pairs, setup, processes), setup, lines)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"What is finished is in {setup.out}.") from error
    print("\n".join(filter(None, (dropped(pairs), f"Report: {setup.out / REPORT}"))))
    return 0


def _import_all() -> None:
    """Import what the end of a run needs: a missing library must not show after hours."""
    import monai.metrics
    import scipy.stats
    import seaborn

    _ = monai.metrics, scipy.stats, seaborn


def _check_geometry(setup: Setup) -> None:
    """Refuse other numbers of channels, and references that are not on the voxels of their
    images."""
    for dataset in setup.datasets:
        channels = len(dataset.cases[0].images)
        for model in setup.models:
            if model.channels and channels != len(model.channels):
                raise PluginError(
                    f"Model {model.name} takes {len(model.channels)} channels"
                    f" ({', '.join(model.channels)}), and images of dataset {dataset.name} have"
                    f" {channels}."
                )
        grids = {
            case.name: (read_geometry(case.reference), read_geometry(case.images[0]))
            for case in dataset.cases
        }
        differing = [name for name, both in grids.items() if not can_be_turned(*both)]
        if differing and not setup.resample:
            reference, image = grids[differing[0]]
            raise PluginError(
                f"Dataset {dataset.name}: {len(differing)} of {len(grids)} references do not lie on"
                f" the voxels of their image. {differing[0]}: reference {reference}; image {image}."
                " Fix the files, or resample predictions to the references with --resample."
            )


def _check_files(pairs: Sequence[Pair], setup: Setup, device: str) -> None:
    """Load all models, and read all images and references through."""
    problems = []
    for dataset in setup.datasets:
        for case in dataset.cases:
            try:
                read_label_map(case.reference, dataset.labels.values)
            except PluginError as error:
                problems.append(f"Dataset {dataset.name}, {case.name}: {error}")
    for model in setup.models:
        try:
            cases = {pair: pair.dataset.cases for pair in pairs if pair.model is model}
            check_model(model, cases, device)
        except PluginError as error:
            problems.append(str(error))
    if problems:
        raise PluginError(f"{len(problems)} inputs cannot be used.\n{few_lines(problems)}")


def _write(scores: results.Results, setup: Setup, lines: Sequence[str]) -> None:
    """Write all files that people look at."""
    out = setup.out
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    classes = [scored for pair in scores.pairs for scored in pair.classes]
    about: dict[str, Any] = {
        "date": date,
        "stunet_plugin": __version__,
        "models": {model.name: model.describe() for model in setup.models},
        "datasets": {dataset.name: dataset.describe() for dataset in setup.datasets},
        "tolerances_mm": {scored.name: scored.tolerance for scored in classes},
        "sliced": sorted({scored.name for scored in classes if scored.sliced}),
    }
    results.write_csv(scores, out / CSV)
    results.write_summary(scores, about, out / SUMMARY)
    results.write_matrix(scores, out / MATRIX)
    report.save_heat_map(scores, out / HEAT_MAP)
    report.save_box_plots(scores, out / BOXES)
    report.save_worst_cases(scores, out, out / WORST)
    cases = sum(len(dataset.cases) for dataset in setup.datasets)
    counts = f"Models: {len(setup.models)}. Datasets: {len(setup.datasets)}. Cases: {cases}."
    heading = f"{counts} {date}, stunet-plugin {__version__}."
    captions = {out / name: caption for name, caption in CAPTIONS.items()}
    report.write_report(scores, [heading, *lines], about, captions, out / REPORT)
    print((out / MATRIX).read_text())
