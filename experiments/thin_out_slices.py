"""Make an anisotropic copy of a raw dataset: every n-th slice along one axis, spacing set
accordingly.

For docs/experiments/hippocampus.md, where the modes 1 and 2 of PCT-Net and FMUNet train on such
copies.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import SimpleITK as sitk


def thin_out(source: Path, target: Path, every: int, axis: int) -> None:
    """Write every ``every``-th slice along an axis (of SimpleITK: x, y, z) of an image; SimpleITK
    sets the spacing."""
    steps = [slice(None)] * 3
    steps[axis] = slice(None, None, every)
    sitk.WriteImage(sitk.ReadImage(str(source))[tuple(steps)], str(target))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=(
            "Example: python experiments/thin_out_slices.py --raw $nnUNet_raw/Dataset004_Hippocampus"
            " --out $nnUNet_raw/Dataset024_HippocampusEvery4th --every 4 --axis 1"
        ),
    )
    parser.add_argument("--raw", type=Path, required=True, help="a raw dataset with .nii.gz files")
    parser.add_argument(
        "--out", type=Path, required=True, help="raw dataset to make; must not be there"
    )
    parser.add_argument(
        "--every", type=int, required=True, help="which slices to keep: 2 for every second"
    )
    parser.add_argument("--axis", type=int, choices=(0, 1, 2), default=2, help="along x, y or z")
    options = parser.parse_args()
    if options.out.exists():
        print(f"{options.out} is there already.", file=sys.stderr)
        return 2
    for part in ("imagesTr", "labelsTr"):
        (options.out / part).mkdir(parents=True)
        for file in sorted((options.raw / part).glob("*.nii.gz")):
            thin_out(file, options.out / part / file.name, options.every, options.axis)
    shutil.copyfile(options.raw / "dataset.json", options.out / "dataset.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
