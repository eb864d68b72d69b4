"""Report of a comparison: one HTML file without scripts or anything from a network, and its
pictures: heat maps, box plots over cases, and the worst cases with outlines."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.crosseval.comparison import Pair
from stunet_plugin.crosseval.inputs import Case
from stunet_plugin.crosseval.measures import DSC, LARGER_IS_BETTER, NSD, TITLES, bounding_box
from stunet_plugin.crosseval.predictions import prediction_file
from stunet_plugin.crosseval.results import SIGNIFICANT, TESTED, Results
from stunet_plugin.errors import few
from stunet_plugin.utils.figures import distinct_colours, saved_figure
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.utils.geometry import Grid, on_grid_of, resampled
from stunet_plugin.utils.images import read_image, read_label_map

COLUMNS_OF_SHEET = 3
MOST_LEGEND_ENTRIES = 24
BEYOND = 0.35
"""How much further than the labelled voxels a panel shows, as a share of their extent."""


def write_report(
    results: Results,
    lines: Sequence[str],
    about: Mapping[str, Any],
    pictures: Mapping[Path, str],
    path: Path,
) -> None:
    """Write the report.

    Args:
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
    shown = ", ".join(f"{name} {value:g}" for name, value in about["tolerances_mm"].items())
    matrices = [
        {
            "title": f"{TITLES[measure]}: {'larger' if larger else 'smaller'} is better",
            "rows": _rows(results, measure),
            "note": f"Tolerance in mm: {shown}." if measure == NSD else "",
        }
        for measure, larger in LARGER_IS_BETTER.items()
    ]
    pairs = [(pair, results.by_class(pair)) for pair in results.pairs]
    page = environment.get_template("report.html.j2").render(
        lines=lines,
        about=about,
        warnings=results.warnings,
        datasets=results.datasets,
        matrices=matrices,
        pictures=[
            (base64.b64encode(file.read_bytes()).decode(), caption)
            for file, caption in pictures.items()
        ],
        tests=results.tests,
        significant=SIGNIFICANT,
        measures=TITLES,
        pairs=[
            {"pair": pair, "rows": [(scored, means.loc[scored.name]) for scored in pair.classes]}
            for pair, means in pairs
        ],
    )
    write_atomically(path, page)


def _rows(results: Results, measure: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return per model its cells, in bold only where tests say that the model is better than every
    other one."""
    undefined = results.undefined(measure)
    rows = []
    for model in results.models:
        cells = []
        for dataset in results.datasets:
            won = [
                test.better == model
                for test in results.tests
                if (test.measure, test.dataset) == (measure, dataset)
                and model in (test.first, test.second)
            ]
            best = len(won) == len(results.models) - 1 > 0 and all(won)
            count = int(undefined.loc[model, dataset])
            cell = results.cell(model, dataset, measure)
            cells.append({"estimate": cell, "undefined": count, "best": best})
        rows.append((model, cells))
    return rows


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "n/a"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else _number(value)


# --- pictures


def save_heat_map(results: Results, path: Path) -> None:
    """Write the models x datasets matrices of DSC and NSD, a panel for each."""
    import seaborn

    rows, columns = len(results.models), len(results.datasets)
    with saved_figure(path, 2 * (1.6 + 1.1 * columns) + 1, 1.4 + 0.5 * rows) as figure:
        axes = figure.subplots(1, len(TESTED), squeeze=False)[0]
        for axis, measure in zip(axes, TESTED, strict=True):
            matrix = results.matrix(measure)
            shown = {"annot": matrix.map(_number), "fmt": "", "annot_kws": {"fontsize": 9}}
            colours = {"cmap": "viridis", "vmin": 0, "vmax": 1, "cbar": axis is axes[-1]}
            seaborn.heatmap(matrix.fillna(0), ax=axis, **shown, **colours)
            axis.set(title=measure, xlabel="", ylabel="")
            _slant(axis)
            axis.tick_params(axis="y", rotation=0, labelsize=8)


def save_box_plots(results: Results, path: Path) -> None:
    """Write a panel per measure and dataset with a box per model, over the cases' means, and the
    cases as points."""
    import seaborn

    models, datasets = results.models, results.datasets
    colours = dict(zip(models, distinct_colours(len(models)), strict=True))
    box = {"showfliers": False, "width": 0.6, "boxprops": {"alpha": 0.4}, "legend": False}
    points = {"color": "black", "size": 2.5, "alpha": 0.6, "jitter": False}
    cases = results.by_case().reset_index()
    width = 1.5 + len(datasets) * max(2.0, 0.5 * len(models) + 1)
    with saved_figure(path, width, 3.0 * len(TESTED)) as figure:
        grid = figure.subplots(len(TESTED), len(datasets), squeeze=False, sharey="row")
        for row, measure in zip(grid, TESTED, strict=True):
            for axis, dataset in zip(row, datasets, strict=True):
                part = cases[cases["dataset"] == dataset]
                common = {"data": part, "x": "model", "y": measure, "order": models, "ax": axis}
                seaborn.boxplot(**common, hue="model", palette=colours, **box)
                seaborn.stripplot(**common, **points)
                axis.set_title(f"{dataset} ({part['case'].nunique()} cases)", fontsize=9)
                axis.set(xlabel="")
                _slant(axis)
                axis.grid(axis="y", alpha=0.3)


def _slant(axis: Any) -> None:
    for label in axis.get_xticklabels():
        label.set(rotation=35, ha="right", rotation_mode="anchor", fontsize=8)


@dataclass(frozen=True)
class _Panel:
    """A slice of a case, with axes (y, x): the image, and for each class where it is in reference
    and prediction."""

    title: str
    image: np.ndarray
    outlines: dict[str, tuple[np.ndarray, np.ndarray]]
    aspect: float


def save_worst_cases(results: Results, out: Path, path: Path) -> None:
    """Write a contact sheet of the cases with the lowest DSC: reference in solid lines, prediction
    in dashed ones.

    Each on the slice along the patient where the two differ most. One case at a time is in memory.
    """
    from matplotlib.lines import Line2D

    cases = {pair.key(case): (pair, case) for pair in results.pairs for case in pair.scored_cases}
    panels = []
    for worst in results.worst().to_dict("records"):
        key = (worst["model"], worst["dataset"], worst["case"])
        scores = f"{worst['case']}: DSC {worst[DSC]:.3f}, NSD {worst[NSD]:.3f}"
        panels.append(_panel(*cases[key], out, f"{key[0]} on {key[1]}\n{scores}"))
    names = list(dict.fromkeys(name for panel in panels for name in panel.outlines))
    colours = dict(zip(names, distinct_colours(len(names)), strict=False))
    rows = -(-max(len(panels), 1) // COLUMNS_OF_SHEET)
    with saved_figure(path, 3.4 * COLUMNS_OF_SHEET, 3.6 * rows + 0.8) as figure:
        axes = figure.subplots(rows, COLUMNS_OF_SHEET, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, colours)
        kinds = {"-": "reference", "--": "prediction"}
        lines = [Line2D([], [], color="gray", linestyle=x, label=kinds[x]) for x in kinds]
        lines += [Line2D([], [], color=colours[one], label=one) for one in names]
        figure.legend(
            handles=lines[: MOST_LEGEND_ENTRIES + len(kinds)],
            loc="outside lower center",
            ncols=6,
            fontsize=8,
            frameon=False,
        )


def _draw(axis: Any, panel: _Panel, colours: dict[str, Any]) -> None:
    low, high = np.percentile(panel.image, (1, 99))
    axis.imshow(panel.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=panel.aspect)
    for name, masks in panel.outlines.items():
        for mask, style in zip(masks, ("solid", "dashed"), strict=True):
            if mask.min() != mask.max():
                line = {"colors": [colours[name]], "linewidths": 1.1, "linestyles": style}
                axis.contour(mask, levels=[0.5], **line)
    axis.set_title(panel.title, fontsize=7)


def _panel(pair: Pair, case: Case, out: Path, title: str) -> _Panel:
    """Read a case and cut the slice out of it."""
    reference = read_label_map(case.reference)
    image = read_image(case.images[0])
    prediction = read_label_map(prediction_file(out, pair, case))
    turned_image, turned = on_grid_of(image, reference), on_grid_of(prediction, reference)
    image = turned_image if turned_image is not None else sitk.Resample(image, reference)
    prediction = turned if turned is not None else resampled(prediction, reference)
    arrays = [sitk.GetArrayViewFromImage(one) for one in (image, reference, prediction)]
    spacing = reference.GetSpacing()[::-1]
    if len(spacing) == 2:
        arrays, spacing = [array[None] for array in arrays], (1.0, *spacing)
    axial = Grid.of(reference).axial if reference.GetDimension() == 3 else 0
    others = tuple(axis for axis in range(3) if axis != axial)
    shown = np.zeros(arrays[1].shape, bool)
    differing = np.zeros(arrays[1].shape[axial], dtype=int)
    for scored in pair.classes:
        truth = np.isin(arrays[1], scored.in_reference)
        found = np.isin(arrays[2], scored.in_prediction)
        shown |= truth | found
        differing += (truth ^ found).sum(axis=others)
    index = int(differing.argmax())
    labelled = np.take(shown, index, axis=axial)
    window = tuple(map(_wider, bounding_box(labelled), labelled.shape))
    cut = [np.take(array, index, axis=axial)[window] for array in arrays]
    outlines = {}
    for scored in pair.classes:
        masks = (np.isin(cut[1], scored.in_reference), np.isin(cut[2], scored.in_prediction))
        if masks[0].any() or masks[1].any():
            outlines[scored.name] = masks
    down, across = (spacing[axis] for axis in others)
    return _Panel(f"{title}, slice {index}", cut[0].astype(float), outlines, down / across)


def _wider(part: slice, size: int) -> slice:
    start, stop, _ = part.indices(size)
    beyond = int(np.ceil(BEYOND * (stop - start))) + 2
    return slice(max(start - beyond, 0), stop + beyond)
