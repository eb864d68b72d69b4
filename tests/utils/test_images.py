"""The one reader of images and label maps."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.image_files import (
    CANNOT_OPEN,
    ImageError,
    hash_of_image,
    place_image,
    side_files,
)
from stunet_plugin.utils.images import (
    NOT_FINITE,
    check_image,
    read_geometry,
    read_image,
    read_label_array,
    read_label_map,
)

from damage import damaged_files
from dataset_helpers import write_array

ENDINGS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".gipl")
READERS = (read_image, check_image, read_geometry, read_label_map)


def volume(dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (5, 7, 9)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_images_are_read_whole(tmp_path: Path, ending: str, compress: bool, dtype: type) -> None:
    path = write_array(tmp_path / f"image{ending}", volume(dtype), compress=compress)
    image = read_image(path)
    assert np.array_equal(sitk.GetArrayFromImage(image), volume())
    assert image.GetSpacing() == (1.0, 2.0, 3.0)
    assert read_geometry(path).size == (9, 7, 5)
    check_image(path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_files_that_end_early_or_late_are_refused(
    tmp_path: Path, ending: str, compress: bool
) -> None:
    path = write_array(tmp_path / f"image{ending}", volume(), compress=compress)
    data = (*side_files(path), path)[0]
    whole = data.read_bytes()
    contents = [whole[:-3], whole[: len(whole) // 2]]
    if not compress and ending != ".nii.gz":  # what follows a compressed stream is not read
        contents.append(whole + b"\0" * 4096)
    for content in contents:
        data.write_bytes(content)
        for read in (read_image, check_image, read_label_map):
            with pytest.raises(ImageError):
                read(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_damaged_files_end_in_a_sentence_or_the_right_result(tmp_path: Path, ending: str) -> None:
    path = write_array(tmp_path / f"image{ending}", volume(np.uint8))
    for kind, content in damaged_files(path, 200):
        path.write_bytes(content)
        try:
            image = read_label_map(path)
        except PluginError:
            continue
        array = sitk.GetArrayFromImage(image)
        assert array.size == volume().size, kind
        assert array.dtype.kind in "iu"
        assert min(image.GetSpacing()) > 0
        if kind != "header":
            assert np.array_equal(array, volume()), kind


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd", ".tif"])
def test_voxels_that_are_not_finite_are_refused(tmp_path: Path, ending: str) -> None:
    array = volume(np.float32)
    array[0, 0, :2] = np.nan, np.inf
    path = write_array(tmp_path / f"image{ending}", array)
    with pytest.raises(ImageError, match="2 of 315") as caught:
        check_image(path)
    assert caught.value.reason == NOT_FINITE


def test_axes_and_components(tmp_path: Path) -> None:
    """An axis of length 1 after the third is dropped; more volumes or components are refused."""
    for ending in (".nii.gz", ".mha", ".nrrd"):
        one = write_array(tmp_path / f"one{ending}", volume()[None])
        assert np.array_equal(sitk.GetArrayFromImage(read_image(one)), volume())
        two = write_array(tmp_path / f"two{ending}", np.stack([volume()] * 2))
        layers = write_array(tmp_path / f"rgb{ending}", np.stack([volume()] * 2, -1), vector=True)
        for path in (two, layers):
            for read in READERS:
                with pytest.raises(ImageError, match="axes|several values"):
                    read(path)


def test_negative_pixdim_is_taken_as_its_size(tmp_path: Path) -> None:
    path = tmp_path / "image.nii.gz"
    array = volume().T
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), path)
    expected = read_geometry(path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:84] = struct.pack("<f", -2.0)
    path.write_bytes(gzip.compress(bytes(content)))
    assert read_geometry(path).agrees(expected)
    assert read_image(path).GetSpacing() == (2.0, 2.0, 3.0)
    content[80:84] = struct.pack("<f", np.nan)
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ImageError):
        check_image(path)


def test_label_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = write_array(tmp_path / "noisy.nii.gz", volume(np.float32) - np.float32(1e-4))
    assert np.array_equal(sitk.GetArrayFromImage(read_label_map(noisy, (0, 1, 2))), volume())
    read_label_map(noisy)
    assert capsys.readouterr().out.count("rounded") <= 1
    for other in (0.01, 2.0**31):
        odd = write_array(tmp_path / "odd.nii.gz", volume(np.float32) + np.float32(other))
        with pytest.raises(ImageError, match="label map"):
            read_label_map(odd)
    declared = write_array(tmp_path / "case.nii.gz", volume())
    with pytest.raises(ImageError, match=rf"case.*2 \({(volume() == 2).sum()} voxels\)"):
        read_label_map(declared, (0, 1))


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_files_of_nnunets_other_readers(tmp_path: Path, ending: str) -> None:
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    labels = volume(np.uint8)[0]
    path, colours = tmp_path / f"a{ending}", tmp_path / f"c{ending}"
    io.imsave(path, labels, check_contrast=False)
    io.imsave(colours, np.stack([labels] * 3, -1), check_contrast=False)
    found, _, _ = read_label_array(path, NaturalImage2DIO(), (0, 1, 2))
    assert np.array_equal(found[0], labels)
    check_image(colours)
    with pytest.raises(ImageError, match="colours"):
        read_label_array(colours, NaturalImage2DIO())
    for size in (10, path.stat().st_size // 2, path.stat().st_size - 20):
        cut = tmp_path / f"cut{ending}"
        cut.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ImageError):
            check_image(cut)


@pytest.mark.parametrize("how", ["link", "copy", "move"])
@pytest.mark.parametrize("name", ["image.mhd", "other.mhd", "image.nhdr", "other.nhdr"])
def test_voxels_of_detached_headers_travel(tmp_path: Path, how: str, name: str) -> None:
    ending = Path(name).suffix
    source = write_array(tmp_path / f"image{ending}", volume())
    (data,) = side_files(source)
    target = tmp_path / "new" / name
    target.parent.mkdir()
    place_image(source, target, how)
    assert np.array_equal(sitk.GetArrayFromImage(read_image(target)), volume())
    assert side_files(target) == [target.with_suffix(data.suffix)]
    assert source.exists() == data.exists() == (how != "move")
    place_image(target, target, how)
    before = hash_of_image(target)
    side_files(target)[0].write_bytes(b"other")
    assert hash_of_image(target) != before
    side_files(target)[0].unlink()
    with pytest.raises(ImageError, match="not there|couldn't open"):
        read_image(target)


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_image(tmp_path: Path, read: Callable[[Path], object]) -> None:
    write_array(tmp_path / "image.nii", volume()).rename(tmp_path / "image.nii.gz")
    for name, message in (
        ("none.nii.gz", CANNOT_OPEN),
        ("\udcff.nii.gz", "UTF-8"),
        ("image.nii.gz", "not gzip"),
    ):
        with pytest.raises(ImageError, match=message):
            read(tmp_path / name)
