"""Coarser copy of a raw dataset: images smoothed and resampled, labels taken at the nearest voxel.

An experiment on it takes a fraction of the time, and its Dice is that of coarser references.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import SimpleITK as sitk
from common import cases_in, copy_cases, describe, report

from stunet_plugin.errors import PluginError

SMOOTHING = 0.35
"""Standard deviation of the Gaussian before images are resampled, in new voxels."""


def resample(image: sitk.Image, spacing: float, smooth: bool) -> sitk.Image:
    """Return an image with cubic voxels that covers the same region."""
    old = image.GetSpacing()
    grid = sitk.Image(
        [max(round(n * mm / spacing), 1) for n, mm in zip(image.GetSize(), old, strict=True)],
        image.GetPixelID(),
    )
    grid.SetSpacing([spacing] * 3)
    grid.SetDirection(image.GetDirection())
    # The first voxel's corner stays where it is, not its middle.
    middle = [(spacing - mm) / 2 / mm for mm in old]
    grid.SetOrigin(image.TransformContinuousIndexToPhysicalPoint(middle))
    if not smooth:
        return sitk.Resample(image, grid, sitk.Transform(), sitk.sitkNearestNeighbor)
    smoothed = sitk.SmoothingRecursiveGaussian(image, SMOOTHING * spacing)
    return sitk.Resample(smoothed, grid, sitk.Transform(), sitk.sitkLinear, 0, sitk.sitkFloat32)


def carry_out(options: argparse.Namespace) -> None:
    if options.spacing <= 0:
        raise PluginError(f"--spacing must be above 0, not {options.spacing:g}.")
    cases = cases_in(options.data / "labelsTr")
    if not cases:
        raise PluginError(f"--data {options.data} is no raw dataset: it has no labelsTr.")
    copy_cases(
        options.data,
        options.out,
        cases,
        image=lambda image: resample(image, options.spacing, smooth=True),
        label=lambda labels: resample(labels, options.spacing, smooth=False),
    )
    describe(options.data, options.out, len(cases))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(Path(__file__).name, description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="raw dataset with labels")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for the copy")
    add("--spacing", type=float, default=2.0, metavar="MM", help="of the new voxels (default: 2)")
    options = parser.parse_args(arguments)
    return report.run_script(lambda: carry_out(options), parser.prog, "The same line resumes.")


if __name__ == "__main__":
    sys.exit(main())
