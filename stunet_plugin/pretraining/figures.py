"""Figures of Volume Fusion: examples with target and prediction, and a training's progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stunet_plugin.utils.figures import saved_figure

if TYPE_CHECKING:
    from matplotlib.colors import Colormap


def save_fusion_example(
    arrays: Sequence[np.ndarray], class_names: Sequence[str], path: Path
) -> None:
    """Write a PNG, a row per sample: fused image, target and prediction, the three arrays, each
    (sample, *spatial); of three axes the middle slice of axis 0."""
    from matplotlib.patches import Patch

    if arrays[0].ndim == 4:
        arrays = [array[:, array.shape[1] // 2] for array in arrays]
    classes, samples = len(class_names), len(arrays[0])
    colours = _colour_map(classes)
    in_gray: dict[str, Any] = {"cmap": "gray"}
    in_colour = {"cmap": colours, "vmin": 0, "vmax": classes - 1, "interpolation": "nearest"}
    columns = (("fused image", in_gray), ("target", in_colour), ("prediction", in_colour))
    with saved_figure(path, 9, 3 * samples + 0.5) as figure:
        axes = figure.subplots(samples, 3, squeeze=False)
        for column, (array, (title, style)) in enumerate(zip(arrays, columns, strict=True)):
            for axis, sample in zip(axes[:, column], array, strict=True):
                axis.imshow(sample, **style)
                axis.set_title(title, fontsize=9)
                axis.set_axis_off()
        patches = [Patch(color=colours(k), label=f"alpha {class_names[k]}") for k in range(classes)]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(9, classes))


def save_pretext_progress(
    log: Mapping[str, Sequence[Any]], class_names: Sequence[str], path: Path
) -> None:
    """Write a PNG of nnU-Net's log: losses, Dice per fusion class, learning rate, seconds."""
    per_class = np.asarray(log["dice_per_class_or_region"])
    colours = _colour_map(len(class_names))
    with saved_figure(path, 12, 8) as figure:
        losses, dice, rate, seconds = axes = figure.subplots(2, 2).ravel()
        titles = ("loss", "pretext Dice", "learning rate", "seconds per epoch")
        for axis, title in zip(axes, titles, strict=True):
            axis.set(title=title, xlabel="epoch")
            axis.grid(alpha=0.3)
        losses.plot(log["train_losses"], label="training")
        losses.plot(log["val_losses"], label="validation")
        losses.legend(fontsize=8)
        for index, name in enumerate(class_names):
            dice.plot(per_class[:, index], color=colours(index), label=f"alpha {name}")
        dice.plot(np.nanmean(per_class, axis=1), color="black", linewidth=2, label="mean")
        dice.set_ylim(0, 1)
        dice.legend(fontsize=8, ncols=2)
        rate.plot(log["lrs"])
        seconds.plot(np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"]))


def _colour_map(count: int) -> Colormap:
    """Dark to bright, since the classes of Volume Fusion are ordered."""
    from matplotlib import colormaps

    return colormaps["viridis"].resampled(count)
