"""What makes a scan unusable, seen from its header or its voxels. Each check raises
:class:`UnusableError` with a reason that the report counts by and a detail that says what was
found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CT, MR = MODALITIES = "CT", "MR"
LABEL_MAP_VALUES = 16
"""An image with fewer values than this among the sampled voxels is a label map, not a scan."""
MANY_LABELS, EQUAL_NEIGHBOURS = 256, 0.6
"""With fewer values than the first, one is a label map if more than the second of neighbouring
voxels are equal (real scans of 8 bits: under 0.1; maps of organs: over 0.8)."""
COMPARED_SLICES = 16
SAMPLED_VOXELS = 200_000
AIR = (-1100.0, -900.0)
AIR_SHARE = 0.05
"""A CT shows air, and nothing else has so many voxels at these values."""
HIGHEST_CT_MINIMUM = -100.0
"""Fat alone is below it: an image whose lowest value is higher is not in Hounsfield units."""


class UnusableError(Exception):
    """A scan that the dataset cannot take: a reason, one of a few for counting, and what was
    found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def check_voxels(array: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Refuse images (z, y, x) that hold no scan; return the lowest and highest value and a sample
    of the voxels (1D, about ``SAMPLED_VOXELS``)."""
    # NaN spreads through min and max, so they see all values that are not finite.
    low, high = float(array.min()), float(array.max())
    limit = float(np.finfo(np.float32).max)
    if not -limit <= low <= high <= limit:
        raise UnusableError("not finite", "NaN or infinite values")
    if low == high:
        raise UnusableError("constant", f"every voxel is {low:g}")
    step = max(1, int((array.size / SAMPLED_VOXELS) ** (1 / 3)))
    sample = array[::step, ::step, ::step].ravel()
    values = np.unique(sample).size
    if values < LABEL_MAP_VALUES or (
        values < MANY_LABELS and _equal_neighbours(array, low, high) > EQUAL_NEIGHBOURS
    ):
        raise UnusableError("label map", f"{values} different values in large areas")
    return low, high, sample


def _equal_neighbours(array: np.ndarray, low: float, high: float) -> float:
    """Share of neighbours within slices that are equal, of those that are neither at the lowest nor
    the highest value (cut off there)."""
    slices = array[:: max(1, len(array) // COMPARED_SLICES)]
    shares = []
    for one, other in ((slices[:, 1:], slices[:, :-1]), (slices[:, :, 1:], slices[:, :, :-1])):
        inner = (one > low) & (one < high)
        shares.append(float((one == other)[inner].mean()) if inner.any() else 1.0)
    return min(shares)


def looks_like(low: float, sample: np.ndarray) -> str | None:
    """Return ``CT`` or ``MR`` (also: anything else without Hounsfield units), or None where the
    values do not tell."""
    if ((sample >= AIR[0]) & (sample <= AIR[1])).mean() >= AIR_SHARE:
        return CT
    return MR if low > HIGHEST_CT_MINIMUM else None


def check_modality(modality: str, low: float, sample: np.ndarray) -> None:
    """Refuse a scan whose values contradict the modality of the dataset."""
    seen = looks_like(low, sample)
    if (modality, seen) == (CT, MR):
        detail = f"lowest value {low:g}: another modality, or a CT stored with an offset"
        raise UnusableError("not in Hounsfield units", detail)
    if (modality, seen) == (MR, CT):
        detail = "looks like CT: much of it is air in Hounsfield units"
        raise UnusableError("another modality", detail)


def check_tag(allowed: Sequence[str], tag: str) -> None:
    """Refuse a DICOM series by its modality tag (0008,0060)."""
    if tag and tag not in allowed:
        raise UnusableError("another modality", f"DICOM says {tag}")
