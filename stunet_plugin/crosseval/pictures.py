"""Pictures of a comparison: heat maps, box plots over cases, and the worst cases with outlines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.crosseval.comparison import ScoredClass
from stunet_plugin.crosseval.scoring import CaseTask, read_both
from stunet_plugin.crosseval.statistics import TESTED, Results, number
from stunet_plugin.utils.figures import distinct_colours, saved_figure
from stunet_plugin.utils.geometry import Grid, on_grid_of
from stunet_plugin.utils.images import read_image
from stunet_plugin.utils.measures import DSC, NSD, bounding_box

COLUMNS_OF_SHEET = 3
MOST_LEGEND_ENTRIES = 24
BEYOND = 0.35
"""How much further than the labelled voxels a panel shows, as a share of their extent."""


def save_heat_map(results: Results, path: Path) -> None:
    """Write the models x datasets matrices of DSC and NSD, a panel for each."""
    import seaborn

    rows, columns = len(results.models), len(results.datasets)
    with saved_figure(path, 2 * (1.6 + 1.1 * columns) + 1, 1.4 + 0.5 * rows) as figure:
        axes = figure.subplots(1, len(TESTED), squeeze=False)[0]
        for axis, measure in zip(axes, TESTED, strict=True):
            means = results.matrix(measure).map(lambda estimate: estimate.mean)
            shown = {"annot": means.map(number), "fmt": "", "annot_kws": {"fontsize": 9}}
            colours = {"cmap": "viridis", "vmin": 0, "vmax": 1, "cbar": axis is axes[-1]}
            seaborn.heatmap(means.fillna(0), ax=axis, **shown, **colours)
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
    cases = results.by_case()
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


def save_worst_cases(results: Results, path: Path) -> None:
    """Write a contact sheet of the cases with the lowest DSC: reference in solid lines, prediction
    in dashed ones.

    Each on the slice along the patient where the two differ most. One case at a time is in memory.
    """
    from matplotlib.lines import Line2D

    comparison = results.comparison
    cases = {(*pair.names, case.name): (pair, case) for pair, case in comparison.cases}
    worst = results.worst().to_dict("records")
    classes = comparison.classes
    colours = dict(zip(classes, distinct_colours(len(classes)), strict=True))
    rows = -(-max(len(worst), 1) // COLUMNS_OF_SHEET)
    with saved_figure(path, 3.4 * COLUMNS_OF_SHEET, 3.6 * rows + 0.8) as figure:
        axes = figure.subplots(rows, COLUMNS_OF_SHEET, squeeze=False).ravel()
        drawn: set[str] = set()
        for axis in axes:
            axis.set_axis_off()
        for axis, scores in zip(axes, worst, strict=False):
            pair, case = cases[scores["model"], scores["dataset"], scores["case"]]
            task = CaseTask.of(comparison, pair, case)
            index, names = _draw_case(axis, task, case.images[:1], colours)
            drawn |= names
            where = f"{case.name}: DSC {scores[DSC]:.3f}, NSD {scores[NSD]:.3f}, slice {index}"
            axis.set_title(f"{' on '.join(pair.names)}\n{where}", fontsize=7)
        kinds = {"-": "reference", "--": "prediction"}
        lines = [Line2D([], [], color="gray", linestyle=x, label=kinds[x]) for x in kinds]
        lines += [Line2D([], [], color=colours[x], label=x) for x in classes if x in drawn]
        look = {"loc": "outside lower center", "ncols": 6, "fontsize": 8, "frameon": False}
        figure.legend(handles=lines[: MOST_LEGEND_ENTRIES + len(kinds)], **look)


def _draw_case(
    axis: Any, task: CaseTask, images: Sequence[Path], colours: Mapping[str, Any]
) -> tuple[int, set[str]]:
    """Draw the slice of a case where reference and prediction differ most, on black if there are no
    ``images``; return its index, and the classes that are on it."""
    reference, prediction, _ = read_both(task)
    image = read_image(images[0]) if images else reference * 0
    turned = on_grid_of(image, reference)
    image = turned if turned is not None else sitk.Resample(image, reference)
    arrays = [sitk.GetArrayViewFromImage(one) for one in (image, reference, prediction)]
    spacing, axial = reference.GetSpacing()[::-1], 0
    if len(spacing) == 3:
        axial = Grid.of(reference).axial
    else:
        arrays, spacing = [array[None] for array in arrays], (1.0, *spacing)
    others = tuple(axis for axis in range(3) if axis != axial)
    shown = np.zeros(arrays[0].shape, bool)
    differing = np.zeros(arrays[0].shape[axial], dtype=int)
    for scored in task.classes:
        truth, found = _masks(scored, arrays)
        shown |= truth | found
        differing += (truth ^ found).sum(axis=others)
    index = int(differing.argmax())
    labelled = np.take(shown, index, axis=axial)
    window = tuple(map(_wider, bounding_box(labelled), labelled.shape))
    cut = [np.take(array, index, axis=axial)[window] for array in arrays]
    gray = cut[0].astype(float)
    low, high = np.percentile(gray, (1, 99))
    aspect = spacing[others[0]] / spacing[others[1]]
    axis.imshow(gray, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
    outlines = {scored.name: _masks(scored, cut) for scored in task.classes}
    for name, masks in outlines.items():
        for mask, style in zip(masks, ("solid", "dashed"), strict=True):
            if mask.min() != mask.max():
                line = {"colors": [colours[name]], "linewidths": 1.1, "linestyles": style}
                axis.contour(mask, levels=[0.5], **line)
    return index, {name for name, masks in outlines.items() if np.any(masks)}


def _masks(scored: ScoredClass, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return where a class is in reference and prediction, of (image, reference, prediction)."""
    return np.isin(arrays[1], scored.in_reference), np.isin(arrays[2], scored.in_prediction)


def _wider(part: slice, size: int) -> slice:
    start, stop, _ = part.indices(size)
    beyond = int(np.ceil(BEYOND * (stop - start))) + 2
    return slice(max(start - beyond, 0), stop + beyond)


PICTURES = {
    "matrix.png": save_heat_map,
    "boxes.png": save_box_plots,
    "worst_cases.png": save_worst_cases,
}
