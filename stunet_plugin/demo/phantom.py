"""Phantoms: a small CT-like dataset made from a seed, abdomens of ellipsoids and tubes with
Hounsfield values, noise and anisotropic spacing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

LABELS = {"background": 0, "liver": 1, "kidneys": 2, "spleen": 3, "aorta": 4, "vertebrae": 5}
HOUNSFIELD = {"air": -1000.0, "fat": -100.0, "muscle": 45.0, "liver": 105.0, "kidneys": 175.0}
HOUNSFIELD |= {"spleen": 130.0, "aorta": 250.0, "vertebrae": 480.0}
FIELD_OF_VIEW = (180.0, 230.0, 300.0)
"""Millimetres on the axes (z, y, x)."""
NUM_CASES = 16
NOISE = 22.0
"""Standard deviation in Hounsfield units before the slight blur of a reconstruction."""


def write_dataset(folder: Path, num_cases: int = NUM_CASES, seed: int = 0) -> None:
    """Write an nnU-Net v2 raw dataset of phantoms, the same for the same seed, to a new folder
    ``DatasetXXX_NAME``."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for index, generator in enumerate(np.random.default_rng(seed).spawn(num_cases)):
        image, labels, spacing = make_case(generator)
        name = f"phantom_{index:03d}"
        arrays = {f"imagesTr/{name}_0000": image.astype(np.int16), f"labelsTr/{name}": labels}
        for file, array in arrays.items():
            written = sitk.GetImageFromArray(array)
            written.SetSpacing([float(step) for step in spacing[::-1]])
            sitk.WriteImage(written, str(folder / f"{file}.nii.gz"))
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": num_cases}
    description = json.dumps({**content, "file_ending": ".nii.gz"}, indent=2)
    (folder / "dataset.json").write_text(description, encoding="utf-8")


def make_case(
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Return one phantom: image in Hounsfield units (float32), labels (uint8) and spacing in mm,
    all (z, y, x)."""
    in_plane = generator.uniform(4.6, 5.4)
    spacing = (generator.uniform(4.5, 6.0), in_plane, in_plane)
    shape = [round(extent / step) for extent, step in zip(FIELD_OF_VIEW, spacing, strict=True)]
    grid = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")

    def jitter(centre: Sequence[float], radii: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        moved = np.asarray(centre) + generator.normal(0, 0.03, 3)
        return moved, np.asarray(radii) * generator.uniform(0.85, 1.15, 3)

    def ellipsoid(centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        parts = zip(grid, *jitter(centre, radii), strict=True)
        return sum(((axis - c) / r) ** 2 for axis, c, r in parts) < 1

    def tube(centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        moved, scaled = jitter(centre, radii)
        bend = 0.04 * np.sin(grid[0] * generator.uniform(1, 3) + generator.uniform(0, 6))
        y, x = (grid[1] - moved[1]) / scaled[1], (grid[2] - moved[2] - bend) / scaled[2]
        return y**2 + x**2 < 1

    image = np.full(shape, HOUNSFIELD["air"])
    labels = np.zeros(shape, dtype=np.uint8)
    body = tube((0, 0, 0), (1, 0.82, 0.86))
    image[body] = HOUNSFIELD["fat"]
    image[body & tube((0, 0, 0), (1, 0.68, 0.74))] = HOUNSFIELD["muscle"]
    organs = {
        "liver": ellipsoid((0.15, -0.1, -0.36), (0.62, 0.42, 0.30)),
        "spleen": ellipsoid((0.25, 0.1, 0.50), (0.40, 0.24, 0.15)),
        "kidneys": ellipsoid((-0.3, 0.28, -0.32), (0.38, 0.17, 0.13))
        | ellipsoid((-0.25, 0.28, 0.32), (0.38, 0.17, 0.13)),
        "aorta": tube((0, 0.16, 0.04), (1, 0.10, 0.075)),
        "vertebrae": tube((0, 0.44, 0), (1, 0.17, 0.14)),
    }
    for name, mask in organs.items():
        mask &= body
        image[mask] = HOUNSFIELD[name] + generator.normal(0, 10)
        labels[mask] = LABELS[name]
    image = gaussian_filter(image, 0.5) + gaussian_filter(generator.normal(0, NOISE, shape), 0.3)
    return image.astype(np.float32), labels, spacing
