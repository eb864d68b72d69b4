"""Scans to segment: names, channels, DICOM series, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk

from stunet_plugin.errors import PluginError
from stunet_plugin.segmentation.scans import find_scans

from unlabeled_helpers import SHAPE, SPACING, ct_array, truncate, write, write_dicom


def names(given: Path, channels: int = 1, modality: str = "") -> dict[str, list[str]]:
    """The scans found, and the names of their images."""
    found = find_scans(str(given), channels, modality)
    return {x.name: [y.name if isinstance(y, Path) else y.number for y in x.images] for x in found}


def refusal(given: Path, channels: int = 1, modality: str = "") -> str:
    with pytest.raises(PluginError) as caught:
        find_scans(str(given), channels, modality)
    return str(caught.value)


def position(file: Path) -> float:
    return float(sitk.ReadImage(str(file)).GetOrigin()[2])


def touch(folder: Path, *files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file).touch()
    return folder


def test_names_of_files(tmp_path: Path) -> None:
    here = touch(
        tmp_path / "a b é", "x_0000.nii", ".x_0001.nii", "scan_2021.nrrd", "ö.nii.gz", "n.txt"
    )
    expected = {"scan_2021": ["scan_2021.nrrd"], "x": ["x_0000.nii"], "ö": ["ö.nii.gz"]}
    assert names(here) == expected
    for name, images in expected.items():
        assert names(here / images[0]) == {name: images}
    assert "SCAN_0000.nii.gz" in refusal(here / "ö.nii.gz", 2)
    assert "2 channels, in files named" in refusal(here, 2)
    (here / "scan_2021.nrrd").unlink()
    (here / "ö.nii.gz").unlink()
    assert "x has 1 image(s), and the model takes 2. Expected x_0000" in refusal(here, 2)
    touch(here, "x_0001.nii", "x_b_0000.nii")
    assert names(here / "x_0000.nii", 2) == {"x": ["x_0000.nii", "x_0001.nii"]}
    assert "x has 2 image(s)" in refusal(here)
    (here / "x_0001.nii").unlink()
    touch(here, "x.mha")
    assert "are both scan x" in refusal(here)


def test_dicom_series_are_named_after_their_folders(tmp_path: Path) -> None:
    study = tmp_path / "study"
    write_dicom(study / "thorax", ct_array(1), 1, "CT")
    assert names(study / "thorax") == {"thorax": ["1"]}
    assert names(study) == {"thorax": ["1"]}
    write_dicom(study / "abdomen" / "venous", ct_array(2), 2, "CT")
    write_dicom(study / "abdomen" / "venous", ct_array(3), 3, "CT")
    expected = {"abdomen_venous_2": ["2"], "abdomen_venous_3": ["3"], "thorax": ["1"]}
    assert names(study, modality="CT") == expected
    assert "which series is which" in refusal(study, 2)


def test_what_is_no_volume_is_left_out_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dicom(tmp_path / "ct", ct_array(1), 1, "CT")
    write_dicom(tmp_path / "ct", ct_array(1)[:2], 2, "CT")
    write_dicom(tmp_path / "mr", ct_array(2), 3, "MR")
    assert names(tmp_path, modality="CT") == {"ct": ["1"]}
    said = capsys.readouterr().out
    assert "ct, series 2: too few slices" in said
    assert "series 3: DICOM says MR, the model takes CT" in said
    assert names(tmp_path) == {"ct": ["1"], "mr": ["3"]}
    said = refusal(tmp_path / "mr", modality="CT")
    assert "no DICOM series that can be segmented" in said
    assert said.endswith("Of another modality: go on with --force.")
    places = [SPACING[2] * index for index in range(SHAPE[0])]
    write_dicom(tmp_path / "ct", ct_array(4)[1:], 4, "CT", [*places[:5], *places[6:]])
    write_dicom(tmp_path / "ct", ct_array(5), 5, "CT", tilt=20)
    said = refusal(tmp_path, modality="CT")
    assert re.search("ct, series 4: slices missing .*\n.*ct, series 5: skewed axes", said)
    write(tmp_path / "ct" / "image.nii.gz", ct_array(1))
    assert "holds both images (image.nii.gz) and DICOM" in refusal(tmp_path / "ct")
    # The last slice of a series, where no gap tells that it lacks.
    write_dicom(tmp_path / "cut", ct_array(6), 6, "CT")
    truncate(max((tmp_path / "cut").iterdir(), key=position), 0.7)
    (tmp_path / "cut" / "report.dcm").write_bytes(bytes(200))
    assert "cut: 1 DICOM image(s) cannot be read: 6_" in refusal(tmp_path / "cut")
    for file in sorted((tmp_path / "mr").iterdir()):
        truncate(file, 0.1)
    assert "no image (none of 14 DICOM files can be read" in refusal(tmp_path / "mr")


@pytest.mark.parametrize("given", ["none", "empty", "text.txt", "slice.dcm"])
def test_no_scans(given: str, tmp_path: Path) -> None:
    touch(tmp_path, "text.txt", "slice.dcm")
    touch(tmp_path / "empty", "notes.txt")
    expected: dict[str, Any] = {"none": "does not exist", "empty": "holds no scans"}
    assert expected.get(given, "or the folder of a DICOM series") in refusal(tmp_path / given)
