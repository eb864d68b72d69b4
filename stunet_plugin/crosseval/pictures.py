"""Pictures of a comparison: the matrix as a heat map, box plots over cases, and the worst cases
with both outlines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stunet_plugin.crosseval.comparison import Pair
from stunet_plugin.crosseval.measures import DSC, NSD
from stunet_plugin.crosseval.predictions import Place
from stunet_plugin.crosseval.results import TESTED, Results
from stunet_plugin.crosseval.statistics import mean_by_case
from stunet_plugin.utils.figures import distinct_colours, plain_style, save_atomically
from stunet_plugin.utils.geometry import Grid, on_grid_of, resampled
from stunet_plugin.utils.images import read_label_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS_OF_SHEET = 3
MOST_LEGEND_ENTRIES = 24
BEYOND = 0.35
"""How much further than the labelled voxels a panel of the contact sheet shows, as a share of their
extent."""


def save_heat_map(results: Results, path: Path) -> None:
    """Write the models x datasets matrices of DSC and NSD, a panel for each."""
    rows, columns = len(results.models), len(results.datasets)
    with plain_style():
        figure = _figure(2 * (1.6 + 1.1 * columns) + 1, 1.4 + 0.5 * rows)
        for axis, measure in zip(
            figure.subplots(1, len(TESTED), squeeze=False)[0], TESTED, strict=True
        ):
            matrix = results.matrix(measure)
            shown = axis.imshow(
                np.ma.masked_invalid(matrix), cmap="viridis", vmin=0, vmax=1, aspect="auto"
            )
            for row, column in np.ndindex(rows, columns):
                value = matrix[row, column]
                dark = np.isfinite(value) and value < 0.6
                text = f"{value:.3f}" if np.isfinite(value) else "n/a"
                axis.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                    fontsize=9,
                )
            axis.set_xticks(range(columns), results.datasets, rotation=30, ha="right", fontsize=8)
            axis.set_yticks(range(rows), results.models, fontsize=8)
            axis.set_title(measure)
        figure.colorbar(shown, ax=figure.axes, fraction=0.03)
        save_atomically(figure, path)


def save_box_plots(results: Results, path: Path) -> None:
    """Write a panel per measure and dataset with a box per model, over the cases' means, and the
    cases as points."""
    models, datasets = results.models, results.datasets
    colours = distinct_colours(len(models))
    with plain_style():
        figure = _figure(1.5 + len(datasets) * max(2.0, 0.5 * len(models) + 1), 3.0 * len(TESTED))
        grid = figure.subplots(len(TESTED), len(datasets), squeeze=False, sharey="row")
        for row, measure in zip(grid, TESTED, strict=True):
            for axis, dataset in zip(row, datasets, strict=True):
                values = [
                    mean_by_case(results.find(model, dataset).values[measure]) for model in models
                ]
                values = [one[np.isfinite(one)] for one in values]
                boxes = axis.boxplot(
                    values,
                    widths=0.6,
                    showfliers=False,
                    patch_artist=True,
                    medianprops={"color": "black"},
                )
                for box, colour in zip(boxes["boxes"], colours, strict=True):
                    box.set(facecolor=colour, alpha=0.4)
                for place, one in enumerate(values, 1):
                    # Side by side in the order of the cases, the same in every box, so that nothing
                    # is drawn at random.
                    axis.plot(
                        place + np.linspace(-0.2, 0.2, len(one)),
                        one,
                        ".",
                        color="black",
                        markersize=3,
                        alpha=0.6,
                    )
                axis.set_xticks(
                    range(1, len(models) + 1), models, rotation=45, ha="right", fontsize=8
                )
                axis.set_title(
                    f"{dataset} ({len(results.find(models[0], dataset).cases)} cases)", fontsize=9
                )
                axis.grid(axis="y", alpha=0.3)
            row[0].set_ylabel(measure)
        save_atomically(figure, path)


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
    panels = []
    for scores, row in results.worst():
        value = mean_by_case(scores.values[DSC][row : row + 1])[0]
        surface = mean_by_case(scores.values[NSD][row : row + 1])[0]
        title = (
            f"{scores.pair.model.name} on {scores.pair.dataset.name}\n{scores.cases[row]}: DSC"
            f" {value:.3f}, NSD {surface:.3f}"
        )
        panels.append(_panel(scores.pair, row, out, title))
    names = list(dict.fromkeys(name for panel in panels for name in panel.outlines))
    colours = dict(zip(names, distinct_colours(len(names)), strict=False))
    rows = -(-max(len(panels), 1) // COLUMNS_OF_SHEET)
    from matplotlib.lines import Line2D

    with plain_style():
        figure = _figure(3.4 * COLUMNS_OF_SHEET, 3.6 * rows + 0.8)
        axes = figure.subplots(rows, COLUMNS_OF_SHEET, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, colours)
        lines = [
            Line2D([], [], color=colours[name], label=name) for name in names[:MOST_LEGEND_ENTRIES]
        ]
        kinds = (("-", "reference"), ("--", "prediction"))
        styles = [
            Line2D([], [], color="gray", linestyle=style, label=label) for style, label in kinds
        ]
        figure.legend(
            handles=[*styles, *lines],
            loc="outside lower center",
            ncols=6,
            fontsize=8,
            frameon=False,
        )
        save_atomically(figure, path)


def _draw(axis: Any, panel: _Panel, colours: dict[str, Any]) -> None:
    low, high = np.percentile(panel.image, (1, 99))
    axis.imshow(panel.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=panel.aspect)
    for name, masks in panel.outlines.items():
        for mask, style in zip(masks, ("solid", "dashed"), strict=True):
            if mask.min() != mask.max():
                axis.contour(
                    mask, levels=[0.5], colors=[colours[name]], linewidths=1.1, linestyles=style
                )
    axis.set_title(panel.title, fontsize=7)


def _panel(pair: Pair, row: int, out: Path, title: str) -> _Panel:
    """Read a case and cut the slice out of it."""
    import SimpleITK as sitk

    case = pair.dataset.cases[row]
    reference = read_label_map(case.reference)
    image, prediction = (
        sitk.ReadImage(str(case.images[0])),
        read_label_map(Place.of(out, pair).file(case)),
    )
    turned_image, turned = on_grid_of(image, reference), on_grid_of(prediction, reference)
    image = turned_image if turned_image is not None else sitk.Resample(image, reference)
    prediction = turned if turned is not None else resampled(prediction, reference)
    arrays = [sitk.GetArrayViewFromImage(one) for one in (image, reference, prediction)]
    spacing = reference.GetSpacing()[::-1]
    if len(spacing) == 2:
        arrays, spacing = [array[None] for array in arrays], (1.0, *spacing)
    axial = Grid.of(reference).axial if reference.GetDimension() == 3 else 0
    wanted = np.isin(arrays[1], [value for scored in pair.classes for value in scored.in_reference])
    found = np.isin(arrays[2], [value for scored in pair.classes for value in scored.in_prediction])
    differing = np.zeros(arrays[1].shape[axial], dtype=int)
    for scored in pair.classes:
        wrong = np.isin(arrays[1], scored.in_reference) ^ np.isin(arrays[2], scored.in_prediction)
        differing += wrong.sum(axis=tuple(other for other in range(3) if other != axial))
    index = int(differing.argmax())
    window = _around(np.take(wanted | found, index, axis=axial))
    cut = [np.take(array, index, axis=axial)[window] for array in arrays]
    outlines = {
        scored.name: (np.isin(cut[1], scored.in_reference), np.isin(cut[2], scored.in_prediction))
        for scored in pair.classes
        if np.isin(cut[1], scored.in_reference).any() or np.isin(cut[2], scored.in_prediction).any()
    }
    down, across = (spacing[other] for other in range(3) if other != axial)
    return _Panel(f"{title}, slice {index}", cut[0].astype(float), outlines, down / across)


def _around(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the window around what a slice shows; all of it if that is nothing."""
    if not mask.any():
        return (slice(None), slice(None))
    window = []
    for axis in (0, 1):
        filled = np.flatnonzero(mask.any(axis=1 - axis))
        beyond = int(np.ceil(BEYOND * (filled[-1] - filled[0] + 1))) + 2
        window.append(slice(max(int(filled[0]) - beyond, 0), int(filled[-1]) + beyond + 1))
    return tuple(window)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
