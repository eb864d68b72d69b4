"""Calibration: whether a model is right as often as it is confident, and from which confidence on
its pseudo-labels can be trusted.

The confidence is that of the models that are run here, or of nnU-Net's probabilities beside
finished predictions (``nnUNetv2_predict --save_probabilities``, ``nnUNetv2_train --npz``). That of
a voxel is the probability of its label. Voxels that are background in reference and prediction do
not count: they are nearly all, and nearly all right.
"""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from stunet_plugin.crosseval.models import Model
from stunet_plugin.errors import PluginError
from stunet_plugin.inference import confidence_map
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.utils.figures import distinct_colours, saved_figure
from stunet_plugin.utils.geometry import on_grid_of
from stunet_plugin.utils.images import read_label_map

if TYPE_CHECKING:
    from stunet_plugin.crosseval.comparison import Pair
    from stunet_plugin.crosseval.statistics import Results

BINS = 100
"""Of the confidence, each with voxels, sum of confidences, and voxels that are right."""
SHOWN_BINS = 20
WANTED = 0.95
"""Share of right voxels above the threshold that is recommended."""
SAME = 0.999
"""Share of voxels whose most probable class is the label, at least: rounding in ties."""


def probabilities_beside(prediction: Path, ending: str) -> Path | None:
    """Return nnU-Net's file of probabilities beside a prediction, None if there is none."""
    file = prediction.with_name(f"{prediction.name.removesuffix(ending)}.npz")
    return file if file.is_file() else None


def read_confidence(file: Path, prediction: Path, reference: Any) -> np.ndarray:
    """Return the confidence of each voxel of the reference (an image) from a map of it or from
    nnU-Net's probabilities; raise PluginError if the file is damaged, not of this prediction, or on
    other voxels."""
    if file.suffix == ".npz":
        confidence = _most_probable(file, prediction)
    else:
        steps = read_label_map(file)
        confidence = sitk.GetImageFromArray(
            confidence_map.decode(sitk.GetArrayViewFromImage(steps))
        )
        confidence.CopyInformation(steps)
    turned = on_grid_of(confidence, reference)
    if turned is None:
        raise PluginError(f"{file} is on other voxels than the reference. It is left out.")
    array: np.ndarray = sitk.GetArrayFromImage(turned)
    return array


def _most_probable(file: Path, prediction: Path) -> Any:
    """Return the greatest of nnU-Net's probabilities, as an image."""
    labels = read_label_map(prediction)
    values = sitk.GetArrayViewFromImage(labels)
    try:
        with np.load(file, allow_pickle=False) as content:
            found = content["probabilities"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise PluginError(f"{file} holds no probabilities of nnU-Net ({error}).") from error
    fits = found.dtype.kind == "f" and found.shape[1:] == values.shape and len(found) > 1
    if not fits or float((found.argmax(axis=0) == values).mean()) < SAME:
        raise PluginError(
            f"{file} does not belong to {prediction.name}: other voxels, another order of axes, or"
            " regions. Probabilities are left out."
        )
    confidence = sitk.GetImageFromArray(found.max(axis=0).astype(np.float32))
    confidence.CopyInformation(labels)
    return confidence


def count(
    confidence: np.ndarray, masks: Iterable[tuple[np.ndarray, np.ndarray]]
) -> list[list[float]]:
    """Return voxels, sums of confidence and right voxels of each bin; ``masks``: reference and
    prediction of each class. A voxel is right if it is so for all classes."""
    counted, right = np.zeros(confidence.shape, bool), np.ones(confidence.shape, bool)
    for reference, prediction in masks:
        counted |= reference | prediction
        right &= reference == prediction
    values = confidence[counted]
    places = np.clip((values * BINS).astype(int), 0, BINS - 1)
    weights = (None, values, right[counted])
    return [np.bincount(places, weights=x, minlength=BINS).tolist() for x in weights]


@dataclass(frozen=True)
class Calibration:
    """Of a model on a dataset: counts, sums of confidence and right voxels by bin."""

    counts: np.ndarray
    sums: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, cases: Sequence[Any]) -> Calibration | None:
        """Add up the cases that have probabilities; None if there are no voxels."""
        known = np.sum([case for case in cases if case], axis=0)
        return cls(*known) if np.ndim(known) == 2 and known[0].sum() else None

    def error(self) -> float:
        """Return the expected calibration error (ECE): the mean of the distance between the
        confidence and the share of right voxels, over bins of one twentieth."""
        by_bin = [x.reshape(SHOWN_BINS, -1).sum(axis=1) for x in (self.sums, self.right)]
        return float(np.abs(by_bin[0] - by_bin[1]).sum() / self.counts.sum())

    def threshold(self, wanted: float = WANTED) -> float | None:
        """Return the least confidence from which on so large a share of voxels is right, None if
        there is none."""
        above = np.cumsum(self.counts[::-1])[::-1]
        share = np.cumsum(self.right[::-1])[::-1] / np.maximum(above, 1)
        places = np.flatnonzero((above > 0) & (share >= wanted))
        return float(places[0] / BINS) if len(places) else None

    def describe(self) -> dict[str, Any]:
        """Return what the report says, as JSON has it."""
        threshold = self.threshold()
        kept = None
        if threshold is not None:
            kept = float(self.counts[round(threshold * BINS) :].sum() / self.counts.sum())
        return {"ECE": self.error(), "ignore_below": threshold, "kept": kept, "wanted": WANTED}


def pseudo_label_command(pair: Pair, threshold: float) -> str:
    """Return the command that labels images with a model as it was run here, and takes the
    threshold; the model folder of finished predictions is not known."""
    words, model = ["MODEL_FOLDER"], pair.model
    if isinstance(model, Model):
        words = [str(model.folder), "-f", *model.folds]
        words += ["-chk", model.checkpoint] if model.checkpoint != CHECKPOINT else []
        words += ["--step-size", f"{model.step_size:g}"] if model.step_size != 0.5 else []
        words += [] if model.mirroring else ["--no-mirroring"]
    words += ["-i", "IMAGES", "-d", "ID", "--ignore-below", f"{threshold:.2f}"]
    return f"stunet pseudo-label {shlex.join(words)}"


def describe(results: Results) -> list[str]:
    """Return lines with the threshold of each model on each dataset, as a command."""
    lines = []
    for pair in results.comparison.pairs:
        where = " on ".join(pair.names)
        found = results.calibrations.get(pair.names)
        if found is None:
            if results.comparison.setup.calibration and pair.classes:
                lines.append(f"No calibration of {where}: no CASE.npz beside its predictions.")
        elif (threshold := found.threshold()) is None:
            lines.append(f"{where}: no confidence from which on {WANTED:.0%} of voxels are right.")
        else:
            lines.append(f"{where}: {WANTED:.0%} of voxels are right from {threshold:.2f} on.")
            lines.append(f"  {pseudo_label_command(pair, threshold)}")
    return lines


def save_reliability(results: Results, path: Path) -> None:
    """Write the share of right voxels over the confidence, a line per model and dataset."""
    found: Mapping[str, Calibration] = {
        " on ".join(names): calibration for names, calibration in results.calibrations.items()
    }
    with saved_figure(path, 5.5, 4.5) as figure:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle=":")
        for colour, (name, one) in zip(distinct_colours(len(found)), found.items(), strict=True):
            counts, sums, right = (
                x.reshape(SHOWN_BINS, -1).sum(axis=1) for x in (one.counts, one.sums, one.right)
            )
            seen = counts > 0
            places = sums[seen] / counts[seen], right[seen] / counts[seen]
            axis.plot(*places, marker="o", markersize=3, color=colour, label=name)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share of right voxels")
        axis.legend(fontsize=7, frameon=False)
