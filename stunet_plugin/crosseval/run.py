"""Run of ``stunet crosseval``: predicts what is missing, scores it, writes tables and a report.

Everything is checked before anything is written, and what is finished when a run is interrupted is
not done again.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from stunet_plugin.crosseval.comparison import Comparison
from stunet_plugin.crosseval.inputs import Setup, read_setup
from stunet_plugin.crosseval.predictions import loaded, predict_missing
from stunet_plugin.crosseval.report import REPORT, write_results
from stunet_plugin.crosseval.scoring import score_all
from stunet_plugin.errors import PluginError, few_lines
from stunet_plugin.utils.geometry import can_be_turned
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
        write_results(score_all(comparison))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"What is finished is in {setup.output}.") from error
    print("\n".join(filter(None, (comparison.dropped(), f"Report: {setup.output / REPORT}"))))
    return 0


def _check_geometry(setup: Setup) -> None:
    """Refuse other numbers of channels, and references that are not on the voxels of their
    images."""
    for dataset in setup.datasets:
        channels = len(dataset.cases[0].images)
        for model in setup.models:
            if channels != len(model.channels):
                takes = f"takes {len(model.channels)} channels ({', '.join(model.channels)})"
                has = f"images of dataset {dataset.name} have {channels}"
                raise PluginError(f"Model {model.name} {takes}, and {has}.")
        grids = {
            x.name: (read_geometry(x.label), read_geometry(x.images[0])) for x in dataset.cases
        }
        differing = [name for name, both in grids.items() if not can_be_turned(*both)]
        if differing and not setup.resample:
            reference, image = grids[differing[0]]
            raise PluginError(
                f"Dataset {dataset.name}: {len(differing)} of {len(grids)} references do not lie on"
                f" the voxels of their image. {differing[0]}: reference {reference}; image {image}."
                " Fix the files, or resample predictions to the references with --resample."
            )


def _check_files(comparison: Comparison) -> None:
    """Load all models, and read all images and references through."""
    setup, problems = comparison.setup, []
    for dataset in setup.datasets:
        for case in dataset.cases:
            try:
                read_label_map(case.label, dataset.labels.values)
            except PluginError as error:
                problems.append(f"Dataset {dataset.name}, {case.name}: {error}")
    images = [case.images for dataset in setup.datasets for case in dataset.cases]
    for model in setup.models:
        try:
            with loaded(model, setup.device) as trained:
                trained.check(images)
        except PluginError as error:
            problems.append(str(error))
    if problems:
        raise PluginError(f"{len(problems)} inputs cannot be used.\n{few_lines(problems)}")
