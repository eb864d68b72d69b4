"""Lesions as instances: which were found, detection F1, panoptic quality, false positives.

An instance is a connected component (corners count). Instances of reference and prediction are
matched one to one, those with the greatest overlap first, if their intersection over union (IoU)
reaches a threshold: 0.5 for the panoptic quality (Kirillov et al., arXiv:1801.00868), 0.1 for
detection, as lesions are small and their borders are uncertain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stunet_plugin.utils.measures import MM3_PER_ML, bounding_box

F1, PQ, FALSE_POSITIVES, FOUND = "F1", "PQ", "false_positives", "lesions"
DETECTION_IOU, PANOPTIC_IOU = 0.1, 0.5
SIZES_ML = {"below 0.1 ml": (0, 0.1), "0.1 to 1 ml": (0.1, 1), "1 ml and more": (1, math.inf)}
"""Volumes of lesions in the reference, for the sensitivity by size."""
_NAMES = re.compile(
    r"(^|_)(lesions?|tumou?rs?|metastas[ei]s|nodules?|cysts?|cancers?|carcinomas?|polyps?|plaques?"
    r"|infarcts?|h(a?)emorrhages?|aneurysms?)(_|$)"
)


def is_lesion(name: str) -> bool:
    """Whether a canonical name is one of lesions; ``liver_without_tumour`` is none."""
    return bool(_NAMES.search(name)) and "without" not in name.split("_")


def match_lesions(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> dict[str, Any]:
    """Return the measures of one class in one case.

    Args:
        reference, prediction: booleans of the same shape.
        spacing: in mm, one number per axis.

    Returns:
        ``F1`` and ``PQ`` (NaN where neither has a lesion), ``false_positives``, and ``lesions``:
        (volume in ml, whether it was found) of each in the reference.
    """
    from scipy.ndimage import label

    box = bounding_box(reference | prediction)
    corners = np.ones((3,) * reference.ndim, int)
    (truth, wanted), (found, predicted) = (label(x[box], corners) for x in (reference, prediction))
    sizes = np.bincount(truth.ravel(), minlength=wanted + 1)
    pairs = truth.astype(np.int64) * (predicted + 1) + found
    both, shared = np.unique(pairs[(truth > 0) & (found > 0)], return_counts=True)
    rows, columns = np.divmod(both, predicted + 1)
    iou = shared / (sizes[rows] + np.bincount(found.ravel())[columns] - shared)
    detected, matched = (_matches(rows, columns, iou, x) for x in (DETECTION_IOU, PANOPTIC_IOU))
    number = (wanted + predicted) / 2
    voxel = math.prod(spacing) / MM3_PER_ML
    return {
        F1: len(detected) / number if number else math.nan,
        PQ: sum(matched.values()) / number if number else math.nan,
        FALSE_POSITIVES: predicted - len(detected),
        FOUND: [(float(sizes[x] * voxel), x in detected) for x in range(1, wanted + 1)],
    }


def _matches(
    rows: np.ndarray, columns: np.ndarray, iou: np.ndarray, least: float
) -> dict[int, float]:
    """Return the instances of the reference (rows) that have a match, with its IoU, the best
    matches first."""
    matches: dict[int, float] = {}
    taken = set[int]()
    for place in np.argsort(-iou, kind="stable"):
        row, column = int(rows[place]), int(columns[place])
        if iou[place] >= least and row not in matches and column not in taken:
            matches[row] = float(iou[place])
            taken.add(column)
    return matches


def summary(cases: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the cases of a class come to: number of lesions, sensitivity (all, and by size,
    None where there is no lesion), and means over cases of F1, PQ and false positives."""
    cases = list(cases)
    lesions = [(volume, found) for case in cases for volume, found in case[FOUND]]
    by_size = {
        name: [found for volume, found in lesions if low <= volume < high]
        for name, (low, high) in SIZES_ML.items()
    }
    return {
        "lesions": len(lesions),
        **{name: _mean([case[name] for case in cases]) for name in (F1, PQ, FALSE_POSITIVES)},
        "sensitivity": _mean([found for _, found in lesions]),
        "sensitivity_by_size": {name: _mean(found) for name, found in by_size.items()},
        "lesions_by_size": {name: len(found) for name, found in by_size.items()},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [float(x) for x in values if x is not None and math.isfinite(x)]
    return sum(defined) / len(defined) if defined else None
