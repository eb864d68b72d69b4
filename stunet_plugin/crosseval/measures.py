"""Measures of one class in one case: overlap, surface distances, volumes.

Surfaces, their areas and the distances between them are MONAI's, at subvoxel resolution: the
surface runs through the corners of the voxels, and each of its elements counts with its area in mm2
(the definition of Nikolov et al., arXiv:1809.04430, which the FLARE22 protocol and A-Eval,
arXiv:2309.03906, use). All three surface measures come from one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stunet_plugin.datasets.label_systems import SIDES

DSC, NSD, HD95, ASSD = "DSC", "NSD", "HD95", "ASSD"
REFERENCE_VOLUME, PREDICTION_VOLUME = "reference_volume", "prediction_volume"
MEASURES = (DSC, NSD, HD95, ASSD, REFERENCE_VOLUME, PREDICTION_VOLUME)
UNITS = {HD95: "mm", ASSD: "mm", REFERENCE_VOLUME: "ml", PREDICTION_VOLUME: "ml"}
NAMES = {
    DSC: "Dice similarity coefficient (DSC)",
    NSD: "normalised surface Dice (NSD)",
    HD95: "95th percentile of the Hausdorff distance (HD95)",
    ASSD: "average symmetric surface distance (ASSD)",
    REFERENCE_VOLUME: "volume of the reference",
    PREDICTION_VOLUME: "volume of the prediction",
}
LARGER_IS_BETTER = {DSC: True, NSD: True, HD95: False, ASSD: False}
PERCENTILE = 95.0
MM3_PER_ML = 1000.0

TOLERANCES = {
    "liver": 5.0,
    "kidney": 3.0,
    "spleen": 3.0,
    "pancreas": 5.0,
    "aorta": 2.0,
    "inferior_vena_cava": 2.0,
    "adrenal_gland": 2.0,
    "gallbladder": 2.0,
    "esophagus": 3.0,
    "stomach": 5.0,
    "duodenum": 7.0,
}
"""Tolerance of the NSD in mm by organ, both sides alike: FLARE22's protocol."""
DEFAULT_TOLERANCE = 2.0
"""For classes that the protocol does not know."""
TUBULAR = ("aorta", "inferior_vena_cava", "esophagus")
"""Scored between the first and the last slice of the reference alone, where that is asked for: how
far along them somebody drew differs from data set to data set."""


def tolerance_of(name: str, own: Mapping[str, float], default: float = DEFAULT_TOLERANCE) -> float:
    """Return the tolerance in mm of a class, given by its canonical name: a user's own, the
    protocol's, or the default."""
    organ = name
    for side in SIDES:
        organ = organ.removesuffix(f"_{side}")
    for table in (own, TOLERANCES):
        for key in (name, organ):
            if key in table:
                return float(table[key])
    return default


@dataclass(frozen=True)
class Surfaces:
    """Two surfaces: distances in mm from the elements of each to the other surface, and the
    elements' areas in mm2 (lengths in mm in 2D).

    An element is where eight voxels meet that are not all alike. So the surface of a ball of voxels
    has an area about a tenth too large, and two surfaces are up to half a voxel nearer than the
    shapes that the voxels stand for.
    """

    from_reference: np.ndarray
    from_prediction: np.ndarray
    reference_areas: np.ndarray
    prediction_areas: np.ndarray

    @classmethod
    def between(
        cls, reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
    ) -> Surfaces:
        """Find the surfaces of two masks, neither of them empty.

        Args:
            reference, prediction: booleans of the same shape, in 2D or 3D.
            spacing: in mm, one number per axis.
        """
        import torch
        from monai.metrics.utils import get_mask_edges, get_surface_distance

        masks = (torch.from_numpy(prediction), torch.from_numpy(reference))
        in_prediction, in_reference, prediction_areas, reference_areas = get_mask_edges(
            *masks, spacing=list(spacing)
        )
        return cls(
            from_reference=_array(
                get_surface_distance(in_reference, in_prediction, spacing=list(spacing))
            ),
            from_prediction=_array(
                get_surface_distance(in_prediction, in_reference, spacing=list(spacing))
            ),
            reference_areas=_array(reference_areas[in_reference]),
            prediction_areas=_array(prediction_areas[in_prediction]),
        )

    def dice(self, tolerance: float) -> float:
        """Normalised surface Dice: the share of both surfaces that lies within a tolerance (mm) of
        the other one."""
        near = self.reference_areas[self.from_reference <= tolerance].sum()
        near += self.prediction_areas[self.from_prediction <= tolerance].sum()
        return float(near / (self.reference_areas.sum() + self.prediction_areas.sum()))

    def hausdorff(self, percentile: float = PERCENTILE) -> float:
        """The distance (mm) within which that much of each surface lies from the other; the larger
        of the two directions."""
        return max(
            _weighted_percentile(self.from_reference, self.reference_areas, percentile),
            _weighted_percentile(self.from_prediction, self.prediction_areas, percentile),
        )

    def average(self) -> float:
        """Average symmetric surface distance in mm, over the area of both surfaces."""
        weighted = (self.from_reference * self.reference_areas).sum() + (
            self.from_prediction * self.prediction_areas
        ).sum()
        return float(weighted / (self.reference_areas.sum() + self.prediction_areas.sum()))


def score(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """Measure one class.

    Args:
        reference, prediction: booleans of the same shape, in 2D or 3D.
        spacing: in mm, one number per axis.
        tolerance: of the NSD, in mm.

    Returns:
        A value for each of :data:`MEASURES`. Both empty: DSC and NSD are 1; one of them empty: 0.
        Distances to an empty mask are not defined (NaN). Volumes are in ml.
    """
    voxel = math.prod(spacing) / MM3_PER_ML
    in_reference, in_prediction = int(reference.sum()), int(prediction.sum())
    volumes = {REFERENCE_VOLUME: in_reference * voxel, PREDICTION_VOLUME: in_prediction * voxel}
    if not in_reference or not in_prediction:
        agreement = 1.0 if in_reference == in_prediction else 0.0
        return {DSC: agreement, NSD: agreement, HD95: math.nan, ASSD: math.nan, **volumes}
    box = _bounding_box(reference | prediction)
    reference, prediction = (
        np.ascontiguousarray(reference[box]),
        np.ascontiguousarray(prediction[box]),
    )
    surfaces = Surfaces.between(reference, prediction, spacing)
    return {
        DSC: 2 * int((reference & prediction).sum()) / (in_reference + in_prediction),
        NSD: surfaces.dice(tolerance),
        HD95: surfaces.hausdorff(),
        ASSD: surfaces.average(),
        **volumes,
    }


def between_first_and_last(reference: np.ndarray, axis: int) -> tuple[slice, ...]:
    """Return the slices of an array along an axis from the first to the last one that a mask has
    something in; all of them if it is empty."""
    filled = np.flatnonzero(
        reference.any(axis=tuple(other for other in range(reference.ndim) if other != axis))
    )
    along = slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(None)
    return tuple(along if other == axis else slice(None) for other in range(reference.ndim))


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box: tuple[slice, ...] = (slice(None),) * mask.ndim
    for axis in range(mask.ndim):
        box = tuple(
            found if other == axis else kept
            for other, (found, kept) in enumerate(
                zip(between_first_and_last(mask, axis), box, strict=True)
            )
        )
    return box


def _array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _weighted_percentile(distances: np.ndarray, areas: np.ndarray, percentile: float) -> float:
    order = np.argsort(distances)
    reached = np.cumsum(areas[order]) / areas.sum()
    # The last sum may miss 1 by rounding.
    return float(
        distances[order][min(int(np.searchsorted(reached, percentile / 100)), len(order) - 1)]
    )
