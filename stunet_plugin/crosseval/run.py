"""Run of ``stunet crosseval``: predicts what is missing, scores it, writes tables and a report.

Everything is checked before anything is written, and what is finished when a run is interrupted is
not done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from stunet_plugin.crosseval.calibration import describe
from stunet_plugin.crosseval.comparison import Comparison
from stunet_plugin.crosseval.inputs import Setup, read_setup
from stunet_plugin.crosseval.predictions import loaded, predict_missing
from stunet_plugin.crosseval.references import Dataset
from stunet_plugin.crosseval.report import REPORT, write_results
from stunet_plugin.crosseval.scoring import score_all
from stunet_plugin.errors import PluginError, few_lines
from stunet_plugin.utils.files import lock
from stunet_plugin.utils.geometry import Grid, can_be_turned
from stunet_plugin.utils.images import read_geometry, read_label_map

if TYPE_CHECKING:
    from stunet_plugin.commands.crosseval import Crosseval


def run_crosseval(options: Crosseval) -> int:
    """Carry out a comparison; return the exit code."""
    setup = read_setup(options)
    comparison = Comparison(setup)
    _check_geometry(setup)
    for library in ("monai.metrics", "scipy.stats", "seaborn"):
        import_module(library)  # a missing one must not show after hours
    print("\n".join(comparison.describe()), flush=True)
    if options.check:
        _check_files(comparison)
        return 0
    setup.output.mkdir(parents=True, exist_ok=True)
    try:
        predict_missing(comparison)
        results = score_all(comparison)
        if results is None:
            return 0
        # Two parts may end together.
        with lock(setup.output / ".report.lock", "part writes the report", wait=True):
            write_results(results)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"What is finished is in {setup.output}.") from error
    ending = (*describe(results), comparison.dropped(), f"Report: {setup.output / REPORT}")
    print("\n".join(filter(None, ending)))
    return 0


def _check_geometry(setup: Setup) -> None:
    """Refuse other numbers of channels, and references that are not on the voxels of their images
    or of finished predictions; from headers alone."""
    for dataset in setup.datasets:
        channels = len(dataset.cases[0].images)
        for model in setup.trained:
            if channels != len(model.channels):
                takes = f"takes {len(model.channels)} channels ({', '.join(model.channels)})"
                has = f"images of dataset {dataset.name} have {channels}"
                raise PluginError(f"Model {model.name} {takes}, and {has}.")
        if setup.resample:
            continue
        others = {"image": [case.images[0] for case in dataset.cases if case.images]}
        for tool in setup.finished:
            files = [tool.files[dataset.name, case.name] for case in dataset.cases]
            others[f"prediction of {tool.name}"] = files
        grids = [read_geometry(case.label) for case in dataset.cases]
        for kind, files in others.items():
            _check_grids(dataset, grids, kind, files)


def _check_grids(
    dataset: Dataset, references: Sequence[Grid], kind: str, files: Sequence[Path]
) -> None:
    """Refuse references whose voxels are not those of the files of their cases."""
    differing = [
        f"{case.name}: reference {reference}; {kind} {grid}"
        for case, reference, grid in zip(
            dataset.cases, references, map(read_geometry, files), strict=bool(files)
        )
        if not can_be_turned(reference, grid)
    ]
    if differing:
        raise PluginError(
            f"Dataset {dataset.name}: {len(differing)} of {len(references)} references do not lie"
            f" on the voxels of their {kind}. {differing[0]}. Fix the files, or resample"
            " predictions to the references with --resample."
        )


def _check_files(comparison: Comparison) -> None:
    """Load all models, and read all images, references and finished predictions through."""
    setup, problems = comparison.setup, []
    for dataset in setup.datasets:
        for case in dataset.cases:
            maps = {f"Dataset {dataset.name}": (case.label, dataset.labels.values)}
            for tool in setup.finished:
                file = tool.files[dataset.name, case.name]
                maps[f"{tool.name} on {dataset.name}"] = file, tool.labels.values
            for where, (file, values) in maps.items():
                try:
                    read_label_map(file, values)
                except PluginError as error:
                    problems.append(f"{where}, {case.name}: {error}")
    images = [case.images for dataset in setup.datasets for case in dataset.cases]
    for model in setup.trained:
        try:
            with loaded(model, setup.device) as trained:
                trained.check(images)
        except PluginError as error:
            problems.append(str(error))
    if problems:
        raise PluginError(f"{len(problems)} inputs cannot be used.\n{few_lines(problems)}")
