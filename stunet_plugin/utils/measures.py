"""Measures of one class in one case: overlap, surface distances, volumes.

Surfaces and the distances between them are MONAI's, at subvoxel resolution: the surface runs
through the corners of the voxels, and each of its elements counts with its area in mm2 (Nikolov et
al., arXiv:1809.04430, as in the FLARE22 protocol and A-Eval, arXiv:2309.03906).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from stunet_plugin.utils.label_systems import SIDES

DSC, NSD, HD95, ASSD = "DSC", "NSD", "HD95", "ASSD"
REFERENCE_VOLUME, PREDICTION_VOLUME = "reference_volume", "prediction_volume"
TITLES = {
    DSC: "Dice similarity coefficient (DSC)",
    NSD: "normalised surface Dice (NSD)",
    HD95: "95th percentile of the Hausdorff distance (HD95), mm",
    ASSD: "average symmetric surface distance (ASSD), mm",
    REFERENCE_VOLUME: "volume of the reference, ml",
    PREDICTION_VOLUME: "volume of the prediction, ml",
}
MEASURES = tuple(TITLES)
LARGER_IS_BETTER = {DSC: True, NSD: True, HD95: False, ASSD: False}
MM3_PER_ML = 1000.0

TOLERANCES = {
    **dict.fromkeys(("liver", "pancreas", "stomach"), 5.0),
    **dict.fromkeys(("kidney", "spleen", "esophagus"), 3.0),
    **dict.fromkeys(("aorta", "inferior_vena_cava", "adrenal_gland", "gallbladder"), 2.0),
    "duodenum": 7.0,
}
"""Tolerance of the NSD in mm by organ, both sides alike: FLARE22's protocol."""
DEFAULT_TOLERANCE = 2.0
"""For classes that the protocol does not know."""
TUBULAR = ("aorta", "inferior_vena_cava", "esophagus")
"""Scored between the first and the last slice of the reference alone, where that is asked for: how
far along them somebody drew differs from dataset to dataset."""


def tolerance_of(name: str, tolerances: Mapping[str, float], default: float) -> float:
    """Return the tolerance in mm of a class, given by its canonical name: its own, or that of the
    organ without its side."""
    organ = name
    for side in SIDES:
        organ = organ.removesuffix(f"_{side}")
    return float(tolerances.get(name, tolerances.get(organ, default)))


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
    box = bounding_box(reference | prediction)
    one, other = (np.ascontiguousarray(mask[box]) for mask in (reference, prediction))
    surfaces = surface_distances(one, other, spacing)
    distances, areas = (np.concatenate(both) for both in zip(*surfaces, strict=True))
    return {
        DSC: 2 * int((one & other).sum()) / (in_reference + in_prediction),
        NSD: float(areas[distances <= tolerance].sum() / areas.sum()),
        HD95: max(_weighted_percentile(*surface, 0.95) for surface in surfaces),
        ASSD: float((distances * areas).sum() / areas.sum()),
        **volumes,
    }


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for the surface of the reference, and for that of the prediction, the distance in mm
    from each element to the other surface, and the element's area in mm2 (length in mm in 2D).

    An element is where eight voxels meet that are not all alike. So the surface of a ball of voxels
    has an area about a tenth too large, and two surfaces are up to half a voxel nearer than the
    shapes that the voxels stand for. Arguments are as in :func:`score`; no mask is empty.
    """
    import torch
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    steps = list(spacing)
    masks = (torch.from_numpy(mask) for mask in (reference, prediction))
    one, other, one_areas, other_areas = get_mask_edges(*masks, spacing=steps)
    return [
        (
            np.asarray(get_surface_distance(mine, theirs, spacing=steps), np.float64),
            np.asarray(areas[mine], np.float64),
        )
        for mine, theirs, areas in ((one, other, one_areas), (other, one, other_areas))
    ]


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the slices of an array that hold a mask; all of it if the mask is empty."""
    from scipy.ndimage import find_objects

    found = find_objects(mask.view(np.uint8))
    return found[0] if found else (slice(None),) * mask.ndim


def _weighted_percentile(distances: np.ndarray, areas: np.ndarray, share: float) -> float:
    """Return the distance within which that share of a surface lies."""
    order = np.argsort(distances)
    reached = np.cumsum(areas[order]) / areas.sum()
    # The last sum may miss 1 by rounding.
    return float(distances[order][min(int(np.searchsorted(reached, share)), len(order) - 1)])
