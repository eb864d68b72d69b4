"""Geometry of images: whether two have the same voxels, and what to do where they have not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.spatial.distance import cdist

NEAR = 1e-3
"""Headers agree if spacings, directions and (in voxels) origins do to this; programs write other
last digits."""


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an image lie, in ITK's terms (millimetres, LPS, x first)."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: Any) -> Grid:
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    def apply_to(self, image: Any) -> None:
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)

    @property
    def axial(self) -> int:
        """The axis of an array (z, y, x) that runs most along the patient."""
        return 2 - int(np.argmax(np.abs(self.direction[6:9])))

    def agrees(self, other: Grid) -> bool:
        """Whether both have the same voxels in the same order."""
        return self.size == other.size and all(
            np.allclose(mine, theirs, rtol=0, atol=NEAR * scale)
            for mine, theirs, scale in (
                (self.spacing, other.spacing, min(self.spacing)),
                (self.origin, other.origin, 10 * min(self.spacing)),
                (self.direction, other.direction, 1.0),
            )
        )

    @property
    def orientation(self) -> str:
        """Three letters such as LPS, as ITK names them: where each axis comes closest to."""
        if len(self.size) != 3:
            return "2D"
        name = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines
        return str(name(self.direction))

    def __str__(self) -> str:
        return (
            f"{' x '.join(map(str, self.size))} voxels, spacing {_short(self.spacing)},"
            f" origin {_short(self.origin)}, orientation {self.orientation}"
        )


def on_grid_of(prediction: Any, reference: Any) -> Any | None:
    """Return the prediction in the order of the reference's voxels (RAS turned to LPS), which
    changes none; None if they have not the same voxels."""
    wanted = Grid.of(reference)
    if Grid.of(prediction).agrees(wanted):
        return prediction
    if reference.GetDimension() != 3 or prediction.GetDimension() != 3:
        return None
    turned = sitk.DICOMOrient(prediction, wanted.orientation)
    return turned if Grid.of(turned).agrees(wanted) else None


def resampled(prediction: Any, reference: Any) -> Any:
    """Return labels on the reference's grid, each from the nearest voxel; 0 outside."""
    how = (sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    return sitk.Resample(prediction, reference, *how, prediction.GetPixelID())


def can_be_turned(one: Grid, other: Grid) -> bool:
    """Whether two grids have the same voxels, perhaps in another order; from headers alone."""
    if one.agrees(other):
        return True
    if len(one.size) != 3 or len(other.size) != 3:
        return False
    # The outermost voxels lie in the same places, whatever order they are stored in.
    farthest = cdist(_corners(one), _corners(other)).min(axis=0).max()
    return sorted(one.size) == sorted(other.size) and farthest <= 10 * NEAR * min(one.spacing)


def _corners(grid: Grid) -> np.ndarray:
    """Centres of the eight outermost voxels in mm, one per row."""
    ends = np.array(np.meshgrid(*((0, size - 1) for size in grid.size))).reshape(3, -1)
    steps = ends * np.reshape(grid.spacing, (3, 1))
    places: np.ndarray = (np.reshape(grid.direction, (3, 3)) @ steps).T + grid.origin
    return places


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
