"""Frames of coordinates: voxels of the file, or millimetres as RAS or LPS, to voxels of the array
that a model's reader makes of the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.geometry import Grid

VOXEL, RAS, LPS = "voxel", "ras", "lps"
FRAMES = (VOXEL, RAS, LPS)
"""x, y, z: indices in the file, the first 0; mm towards right, anterior, superior (3D Slicer's
display, nibabel); mm towards left, posterior, superior (ITK, DICOM)."""
_FLIP = np.array([-1.0, -1.0, 1.0])


class Frame:
    """Where the voxels of a scan are.

    Args:
        grid: of the file.
        properties: of nnU-Net's reader, which may have turned the voxels.
    """

    def __init__(self, grid: Grid, properties: Mapping[str, Any]) -> None:
        self.grid = grid
        self.axes = len(grid.size)
        stuff = properties.get("nibabel_stuff", {})
        self._turn = np.eye(4)
        if "reoriented_affine" in stuff:
            turned = np.linalg.inv(stuff["reoriented_affine"]) @ stuff["original_affine"]
            self._turn = np.asarray(turned)

    def voxel(self, values: Sequence[float], frame: str, what: str) -> tuple[int, int, int]:
        """Return the voxel (z, y, x) of the reader's array for x, y, z in a frame.

        Raises:
            PluginError: it is outside of the image, or not as many numbers as axes.
        """
        if len(values) != self.axes or not all(map(math.isfinite, values)):
            raise PluginError(
                f"{what} must be {self.axes} numbers, x,y{',z' if self.axes == 3 else ''}, not"
                f" {_text(values)}."
            )
        if self.axes == 2 and frame != VOXEL:
            raise PluginError(
                f"A picture has no millimetres: give {what} with --coordinates voxel."
            )
        index = self._index(values, frame)
        if not self._is_inside(index):
            raise PluginError(f"{what} {_text(values)} ({frame}) {self._outside(values, frame)}")
        whole = np.append(np.rint(index), np.zeros(3 - self.axes))
        x, y, z = np.rint(self._turn[:3, :3] @ whole + self._turn[:3, 3]).astype(int).tolist()
        return z, y, x

    def describe(self, voxel: Sequence[int]) -> str:
        """Say where a voxel (z, y, x) of the reader's array is, in voxels of the file and in mm."""
        back = np.linalg.inv(self._turn)
        index = (back[:3, :3] @ np.array(voxel[::-1]) + back[:3, 3])[: self.axes]
        text = f"voxel {_text(np.rint(index))}"
        if self.axes == 3:
            text += f", RAS {_text(self._world(index) * _FLIP)} mm"
        return text

    def _index(self, values: Sequence[float], frame: str) -> np.ndarray:
        given = np.array(values, dtype=float)
        if frame == VOXEL:
            return given
        lps = given * _FLIP if frame == RAS else given
        direction = np.reshape(self.grid.direction, (3, 3)) * np.array(self.grid.spacing)
        return np.asarray(np.linalg.solve(direction, lps - self.grid.origin))

    def _world(self, index: np.ndarray) -> np.ndarray:
        direction = np.reshape(self.grid.direction, (3, 3)) * np.array(self.grid.spacing)
        return np.asarray(direction @ index + self.grid.origin)

    def _is_inside(self, index: np.ndarray) -> bool:
        return bool((index >= -0.5).all() and (index < np.array(self.grid.size) - 0.5).all())

    def _outside(self, values: Sequence[float], frame: str) -> str:
        """Say what is inside, and whether another frame was meant."""
        ends = np.array(self.grid.size) - 1
        if frame == VOXEL:
            low, high = np.zeros(self.axes), ends.astype(float)
        else:
            corners = np.array([self._world(ends * np.array(x)) for x in np.ndindex(2, 2, 2)])
            corners = corners * _FLIP if frame == RAS else corners
            low, high = corners.min(0), corners.max(0)
        ranges = [f"{name} {x:g} to {y:g}" for name, x, y in zip("xyz", low, high, strict=False)]
        text = f"is outside of the image: {', '.join(ranges)}."
        others = [x for x in FRAMES if x != frame] if self.axes == 3 else []
        meant = [x for x in others if self._is_inside(self._index(values, x))]
        return text + (f" Did you mean --coordinates {' or '.join(meant)}?" if meant else "")


def _text(values: Sequence[float] | np.ndarray) -> str:
    return ",".join(f"{float(value) + 0.0:.6g}" for value in values)
