"""Finding and reading scans: what is taken, and the reason for what is not;
tests/utils/test_images.py has the damaged files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.unlabeled.checks import (
    CT,
    MR,
    UnusableError,
    check_modality,
    check_tag,
    check_voxels,
    looks_like,
)
from stunet_plugin.unlabeled.image_files import HEADER, place_image, points_to, write_image
from stunet_plugin.unlabeled.reading import read_scan, series_of
from stunet_plugin.utils.discovery import DICOM_FOLDER, Source, Tally, walk
from stunet_plugin.utils.files import OutputError, link_or_copy
from stunet_plugin.utils.geometry import Grid

from unlabeled_helpers import SHAPE, SPACING, ct_array, largest_file, mr_array, write, write_dicom

# --- finding


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_walk_by_names_with_patterns_and_links(tmp_path: Path) -> None:
    here = tmp_path / "here"
    kept = ("a.nii", "z.mha", "a/deep/er/SCAN.NII.GZ", "b/x.nrrd")
    others = ("notes.txt", "p.png", "._a.nii", ".h/x.nii")
    left_out = ("labelsTr/a.nii", "a_seg.nii", "made/imagesTr/a.nii")
    touch(here, *kept, *others, *left_out)
    touch(tmp_path, "elsewhere/c.nii")
    (here / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (here / "circle").symlink_to(here, target_is_directory=True)
    (here / "itself").symlink_to(here / "itself")
    tally = Tally()
    found = walk([str(here)], ("labelsTr", "*_seg.nii"), str(here / "made"), tally)
    assert [os.path.relpath(source.path, here) for source in found] == [*kept, "link/c.nii"]
    assert tally.scans == {".nii": 2, ".mha": 1, ".nii.gz": 1, ".nrrd": 1}
    assert tally.others == {".txt": 1, ".png": 1, "no ending": 1}


def test_a_folder_of_dicom_is_found_by_name_or_by_content(tmp_path: Path) -> None:
    write_dicom(tmp_path / "named", mr_array(1), 1)
    write_dicom(tmp_path / "bare", mr_array(1), 1)
    for number, path in enumerate(sorted((tmp_path / "bare").iterdir())):
        path.rename(path.with_name(f"IM{number:04d}"))
    touch(tmp_path, "neither/README", "neither/1.2.3", "named/DICOMDIR")
    found = list(walk([str(tmp_path)], ()))
    expected = [(str(tmp_path / name), DICOM_FOLDER, SHAPE[0]) for name in ("bare", "named")]
    assert [(source.path, source.kind, len(source.files)) for source in found] == expected


def test_a_changed_raw_file_is_another_scan(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.mhd", mr_array(1))
    (before,) = walk([str(tmp_path)], ())
    os.utime(path.with_suffix(".raw"), (1, 1))
    (after,) = walk([str(tmp_path)], ())
    assert before.signature != after.signature


# --- reading


def test_nifti_voxels_are_those_that_itk_reads(tmp_path: Path) -> None:
    array, affine = mr_array(2).T, np.diag([2.0, 3.0, 4.0, 1.0])
    header = nibabel.Nifti1Image(array, affine).header
    path = str(tmp_path / "big_endian.nii.gz")
    nibabel.Nifti1Image(array, affine, header.as_byteswapped(">")).to_filename(path)
    np.testing.assert_array_equal(read_scan(Source(path)).array, array.T)
    header.set_data_dtype(np.int16)
    path = str(tmp_path / "scaled.nii")
    image = nibabel.Nifti1Image(array * 0.5 - 20.0, affine, header)
    image.header.set_slope_inter(0.5, -20)
    image.to_filename(path)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(path))
    np.testing.assert_array_equal(read_scan(Source(path)).array, expected)
    assert expected.min() < -10


def skewed(folder: Path) -> Path:
    affine = np.eye(4)
    affine[0, 1] = 0.2
    image = nibabel.Nifti1Image(mr_array(1), affine)
    image.set_qform(None, 0)
    image.to_filename(folder / "a.nii.gz")
    return folder / "a.nii.gz"


def organs() -> np.ndarray:
    """A map of some sixty labels."""
    z, y, x = np.indices(SHAPE) // 6
    return (z * 25 + y * 5 + x).astype(np.uint8)


def scan(array: np.ndarray, **options: Any) -> Callable[[Path], Path]:
    """A function that writes a scan to a folder."""
    return lambda folder: write(folder / "a.nii", array, **options)


BAD: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "microns": ("absurd spacing", scan(mr_array(1), spacing=(0.001,) * 3)),
    "skewed": ("skewed axes", skewed),
    "too large a value": ("not finite", scan(mr_array(1) * 1e37)),
    "constant": ("constant", scan(np.full(SHAPE, 7, dtype=np.int16))),
    "organs": ("label map", scan(organs())),
}


@pytest.mark.parametrize("name", BAD)
def test_the_reason_for_a_bad_scan(tmp_path: Path, name: str) -> None:
    reason, make = BAD[name]
    with pytest.raises(UnusableError) as error:
        check_voxels(read_scan(Source(str(make(tmp_path)))).array)
    assert error.value.reason == reason


def test_a_scan_of_eight_bits_is_no_label_map() -> None:
    check_voxels((mr_array(1) // 4).clip(0, 255).astype(np.uint8))


def test_modalities_by_their_values() -> None:
    for array, modality in ((ct_array(1), CT), (mr_array(1), MR)):
        low, _, sample = check_voxels(array)
        assert looks_like(low, sample) == modality
        check_modality(modality, low, sample)
        with pytest.raises(UnusableError):
            check_modality(MR if modality == CT else CT, low, sample)
    # Normalised: could be anything.
    low, _, sample = check_voxels(mr_array(1) - 300.0)
    assert looks_like(low, sample) is None
    with pytest.raises(UnusableError, match="DICOM says PT"):
        check_tag([CT], "PT")


# --- DICOM


def test_series_of_a_folder(tmp_path: Path) -> None:
    """Two good series, and others that are left out."""
    places = [SPACING[2] * index for index in range(SHAPE[0])]
    twice = [places[index // 2] for index in range(SHAPE[0])]
    series: dict[str | None, dict[str, Any]] = {
        "slices missing": {"array": mr_array(3)[1:], "positions": [*places[:5], *places[6:]]},
        "several volumes in one series": {"array": mr_array(4), "positions": twice},
        "one slice": {"array": mr_array(5)[:1]},
    }
    write_dicom(tmp_path, mr_array(1), 1)
    write_dicom(tmp_path, mr_array(2), 2, modality="CT")
    for uid, options in enumerate(series.values(), start=3):
        write_dicom(tmp_path, uid=uid, **options)
    (tmp_path / "report.dcm").write_bytes(bytes(200))
    (folder,) = walk([str(tmp_path)], ())
    found = series_of(folder)
    assert [one.problem and one.problem[0] for one in found] == [None, None, *series]
    ending = "; 1 of the folder's files cannot be read as images"
    assert all(one.problem[1].endswith(ending) for one in found if one.problem), "perhaps the slice"
    assert [one.modality for one in found[:2]] == [MR, CT]
    assert len({one.key for one in found}) == 5
    for seed, one in enumerate(found[:2], start=1):
        scan = read_scan(one)
        np.testing.assert_array_equal(scan.array, mr_array(seed))
        np.testing.assert_allclose(scan.geometry.spacing, SPACING)
        assert not scan.as_it_is


def test_a_tilted_gantry_is_left_out_as_a_skewed_nifti_is(tmp_path: Path) -> None:
    """ITK stacks the slices straight: the last one is far off."""
    for name, degrees in (("rounded", 0.05), ("tilted", 20.0)):
        write_dicom(tmp_path / name, mr_array(1), 1, tilt=degrees)
    rounded, tilted = (series_of(x)[0].problem for x in walk([str(tmp_path)], ()))
    assert rounded is None
    assert tilted is not None
    assert tilted[0] == BAD["skewed"][0]
    assert "20.0 degrees" in tilted[1]
    assert f"{np.sin(np.radians(20)) * SPACING[2] * (SHAPE[0] - 1):.1f} mm" in tilted[1]


# --- placing


@pytest.mark.parametrize(("header", "ending"), [("a.mhd", ".mha"), ("a.nhdr", ".nrrd")])
def test_a_scan_in_two_files_is_linked_by_its_header(
    tmp_path: Path, header: str, ending: str
) -> None:
    """Under its own ending too: a link to it would look for the voxels elsewhere."""
    path = write(tmp_path / "with space" / header, mr_array(1))
    if ending == ".nrrd":
        path = path.rename(path.with_suffix(ending))
    source, target = Source(str(path)), tmp_path / f"case_0000{ending}"
    assert place_image(source, read_scan(source), target, copy=False) == HEADER
    assert target.stat().st_size < 1000
    assert points_to(target) == str(next(path.parent.glob("*.raw*")))
    linked = sitk.ReadImage(str(target))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(linked), mr_array(1))
    np.testing.assert_allclose(linked.GetSpacing(), SPACING)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".nii"])
def test_conversion_keeps_voxels_and_geometry(tmp_path: Path, ending: str) -> None:
    """Also where a header in the dataset would be read as a pattern of names."""
    write(tmp_path / "half" / "scan.mhd", mr_array(1).astype(np.int32))
    path = (tmp_path / "half").rename(tmp_path / "50%") / "scan.mhd"
    source, scan = Source(str(path)), read_scan(Source(str(path)))
    target = tmp_path / f"case_0000{ending}"
    assert place_image(source, scan, target, copy=ending != ".mha") == "converted"
    converted = sitk.ReadImage(str(target))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(converted), mr_array(1))
    assert converted.GetPixelID() == sitk.sitkInt16
    assert Grid.of(converted).agrees(scan.geometry)


def test_links_where_the_file_system_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not on this file system")

    source = tmp_path / "scan.nii"
    source.write_bytes(b"content")
    for how, then_missing in (("link", "symlink"), ("hard link", "link"), ("copy", "link")):
        assert link_or_copy(str(source), tmp_path / how) == how
        assert (tmp_path / how).read_bytes() == b"content"
        monkeypatch.setattr(os, then_missing, refuse)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_full_disk_is_noticed(tmp_path: Path, ending: str) -> None:
    """ITK writes a part of a NIfTI file and says nothing."""
    array = np.random.default_rng(0).integers(0, 30000, (40, 40, 40)).astype(np.int16)
    scan = read_scan(Source(str(write(tmp_path / "scan.nii", array))))
    full = pytest.raises(OutputError, match="part|written|large|failed|open")
    with largest_file(50_000), full:
        write_image(scan.array, scan.geometry, tmp_path / f"out{ending}")
