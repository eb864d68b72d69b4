"""The mask of the body: what it takes in, and what it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.unlabeled.body_mask import body_mask
from stunet_plugin.unlabeled.checks import CT, MR


def thorax(spacing: tuple[float, float, float]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A chest in Hounsfield units on a table, 120 x 300 x 360 mm, with a windpipe that leaves it at
    the top."""
    generator = np.random.default_rng(0)
    shape = tuple(
        round(extent / step) for extent, step in zip((120, 300, 360), spacing, strict=True)
    )
    z, y, x = (
        np.arange(size).reshape([-1 if axis == own else 1 for axis in range(3)]) * spacing[own]
        for own, size in enumerate(shape)
    )
    everywhere = np.ones(shape, dtype=bool)

    def tube(centre_y: float, centre_x: float, radius_y: float, radius_x: float) -> np.ndarray:
        return everywhere & (
            ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 < 1
        )

    parts = {
        "body": tube(130, 180, 95, 140),
        "lung": tube(120, 110, 50, 40) & (z < 90),
        "airway": tube(120, 180, 12, 12),
        "table": (
            everywhere & (((y > 226) & (y < 230)) | ((y > 250) & (y < 254))) & (x > 40) & (x < 320)
        ),
    }
    image = np.full(shape, -1000.0)
    image[parts["body"]] = 30
    image[parts["lung"]] = -850
    image[parts["airway"]] = -1000
    image[parts["table"]] = 150
    return (image + generator.normal(0, 25, shape)).astype(np.int16), parts


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (2.5, 0.9, 0.9)])
def test_ct_lungs_are_in_and_the_table_is_out(spacing: tuple[float, float, float]) -> None:
    image, parts = thorax(spacing)
    mask = body_mask(image, spacing, 0, CT)
    assert mask is not None
    assert mask.dtype == np.uint8
    assert mask.shape == image.shape
    for inner in ("lung", "airway"):
        assert mask[parts[inner]].mean() > 0.999
    dice = 2 * (mask & parts["body"]).sum() / (mask.sum() + parts["body"].sum())
    assert dice > 0.985
    assert mask[parts["table"] & ~parts["body"]].mean() < 0.15


def test_ct_is_filled_in_the_axial_plane_wherever_that_axis_is() -> None:
    image, _ = thorax((3.0, 3.0, 3.0))
    coronal = np.ascontiguousarray(np.moveaxis(image, 0, 1))
    mask = body_mask(coronal, (3.0, 3.0, 3.0), 1, CT)
    assert mask is not None
    np.testing.assert_array_equal(np.moveaxis(mask, 1, 0), body_mask(image, (3.0, 3.0, 3.0), 0, CT))


def mr(shape: tuple[int, int, int] = (20, 80, 90)) -> tuple[np.ndarray, np.ndarray]:
    """A body with bright fat, dark muscle and a hollow, in Rayleigh noise, with a slope of
    sensitivity."""
    generator = np.random.default_rng(1)
    _, y, x = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
    radius = np.broadcast_to((x / 0.85) ** 2 + (y / 0.8) ** 2, shape)
    body = radius < 1
    image = np.zeros(shape)
    image[body] = 900
    image[radius < 0.75] = 160
    image[radius < 0.1] = 0
    image *= 1 + 0.5 * x
    noise = generator.normal(0, 15, (2, *shape))
    return np.hypot(image + noise[0], noise[1]).astype(np.float32), body


def test_mr_dark_muscle_is_body_and_holes_are_filled() -> None:
    image, body = mr()
    mask = body_mask(image, (3.0, 3.0, 3.0), 0, MR)
    assert mask is not None
    assert 2 * (mask & body).sum() / (mask.sum() + body.sum()) > 0.98
    # The scale means nothing in MR.
    np.testing.assert_array_equal(mask, body_mask(image * 1e-4, (3.0, 3.0, 3.0), 0, MR))
    # Normalised images have negative values.
    shifted = body_mask((image - image.mean()) / image.std(), (3.0, 3.0, 3.0), 0, MR)
    assert shifted is not None
    assert (shifted == mask).mean() > 0.99


def test_two_legs_are_a_body_and_a_bottle_is_not() -> None:
    generator = np.random.default_rng(2)
    image = np.abs(generator.normal(0, 10, (10, 60, 90)))
    image[:, 15:45, 8:35] = 400
    image[:, 15:45, 50:76] = 420
    image[:, 5:10, 82:88] = 500
    mask = body_mask(image, (3.0, 3.0, 3.0), 0, MR)
    assert mask is not None
    assert mask[:, 15:45, 8:35].all()
    assert mask[:, 15:45, 50:76].all()
    assert not mask[:, 5:10, 82:88].any()


def test_a_crop_within_the_body_is_all_body() -> None:
    generator = np.random.default_rng(3)
    crop = np.where(generator.random((20, 30, 30)) < 0.4, 300, 800) + generator.normal(
        0, 40, (20, 30, 30)
    )
    mask = body_mask(crop, (1.0, 1.0, 1.0), 0, MR)
    assert mask is not None
    assert mask.all()


def test_air_alone_is_no_body() -> None:
    air = np.random.default_rng(4).normal(-1000, 20, (20, 40, 40))
    assert body_mask(air, (3.0, 3.0, 3.0), 0, CT) is None


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "modality", "share"), [("example_ct", CT, 0.640), ("example_mr_sm", MR, 0.774)]
)
def test_real_scans(shared: Path, name: str, modality: str, share: float) -> None:
    """Shares of masks that were looked at."""
    image = sitk.ReadImage(str(shared / "data" / "examples" / f"{name}.nii.gz"))
    mask = body_mask(sitk.GetArrayFromImage(image), image.GetSpacing()[::-1], 0, modality)
    assert mask is not None
    assert mask.mean() == pytest.approx(share, abs=0.01)


@pytest.mark.shared
def test_real_crops_are_all_body(shared: Path) -> None:
    for path in sorted((shared / "data" / "Dataset004_Hippocampus" / "imagesTr").iterdir())[::30]:
        image = sitk.ReadImage(str(path))
        mask = body_mask(sitk.GetArrayFromImage(image), image.GetSpacing()[::-1], 0, MR)
        assert mask is not None
        assert mask.all()
