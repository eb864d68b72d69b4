"""Small datasets in nnUNet_raw, for the tests of datasets/ and ranking/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk


def write_dataset(
    folder: Path,
    labels: dict[str, Any],
    cases: int,
    channel: str = "CT",
    ending: str = ".nii.gz",
    **more: Any,
) -> Path:
    """Cases of the same names in every dataset; the labels are drawn from all values."""
    rng = np.random.default_rng(list(folder.name.encode()))
    values = sorted({x for entry in labels.values() for x in np.atleast_1d(entry).tolist()})
    for number in range(cases):
        for array, file in (
            (rng.normal(size=(9, 10, 11)).astype(np.float32), f"imagesTr/case{number}_0000"),
            (rng.choice(values, (9, 10, 11)).astype(np.uint8), f"labelsTr/case{number}"),
        ):
            write_array(folder / f"{file}{ending}", array, (number, 5, -3))
    content = {"channel_names": {"0": channel}, "labels": labels, "numTraining": cases}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ending, **more}))
    return folder


def write_array(
    path: Path,
    array: np.ndarray,
    origin: Any = (0, 0, 0),
    spacing: Any = (1, 2, 3),
    direction: Any = (1, 0, 0, 0, 1, 0, 0, 0, 1),
    compress: bool = False,
    vector: bool = False,
) -> Path:
    """Write an image of two to four axes; a fourth has the spacing 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array, isVector=vector)
    image.SetSpacing([*map(float, spacing), 1.0][: image.GetDimension()])
    if image.GetDimension() == 3:
        image.SetOrigin(origin)
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path), compress)
    return path


def read_array(path: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return array


def change_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
