"""The mask of the body: what it takes in, and what it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.unlabeled.body_mask import body_mask
from stunet_plugin.unlabeled.checks import CT, MR

EVEN = (3.0, 3.0, 3.0)


def mask_of(image: np.ndarray, modality: str, spacing: tuple[float, ...] = EVEN) -> np.ndarray:
    mask = body_mask(image, spacing, 0, modality)
    assert mask is not None
    return mask


def dice(mask: np.ndarray, body: np.ndarray) -> float:
    return float(2 * (mask & body).sum() / (mask.sum() + body.sum()))


def thorax(spacing: tuple[float, float, float]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A chest in Hounsfield units on a table, 120 x 300 x 360 mm, with a windpipe that leaves it at
    the top."""
    shape = np.round(np.array((120, 300, 360)) / spacing).astype(int)
    z, y, x = (index * step for index, step in zip(np.indices(shape), spacing, strict=True))

    def tube(at_y: float, at_x: float, radius_y: float, radius_x: float) -> np.ndarray:
        inside: np.ndarray = ((y - at_y) / radius_y) ** 2 + ((x - at_x) / radius_x) ** 2 < 1
        return inside

    boards = ((y > 226) & (y < 230)) | ((y > 250) & (y < 254))
    parts = {
        "body": tube(130, 180, 95, 140),
        "lung": tube(120, 110, 50, 40) & (z < 90),
        "airway": tube(120, 180, 12, 12),
        "table": boards & (x > 40) & (x < 320),
    }
    image = np.full(shape, -1000.0)
    for name, value in {"body": 30, "lung": -850, "airway": -1000, "table": 150}.items():
        image[parts[name]] = value
    return (image + np.random.default_rng(0).normal(0, 25, shape)).astype(np.int16), parts


@pytest.mark.parametrize("spacing", [EVEN, (2.5, 0.9, 0.9)])
def test_ct_lungs_are_in_and_the_table_is_out(spacing: tuple[float, float, float]) -> None:
    image, parts = thorax(spacing)
    mask = mask_of(image, CT, spacing)
    assert (mask.dtype, mask.shape) == (np.uint8, image.shape)
    assert min(mask[parts[inner]].mean() for inner in ("lung", "airway")) > 0.999
    assert dice(mask, parts["body"]) > 0.985
    assert mask[parts["table"] & ~parts["body"]].mean() < 0.15
    # Filled in the axial plane, wherever that axis is.
    turned = tuple(spacing[axis] for axis in (1, 0, 2))
    coronal = body_mask(np.ascontiguousarray(image.swapaxes(0, 1)), turned, 1, CT)
    assert coronal is not None
    assert (coronal.swapaxes(0, 1) == mask).mean() > 0.9999


def test_mr_dark_muscle_is_body_and_holes_are_filled() -> None:
    """Bright fat, dark muscle and a hollow, in Rayleigh noise, with a slope of sensitivity."""
    shape = (20, 80, 90)
    _, y, x = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
    radius = np.broadcast_to((x / 0.85) ** 2 + (y / 0.8) ** 2, shape)
    image = np.select([radius < 0.1, radius < 0.75, radius < 1], [0.0, 160.0, 900.0])
    noise = np.random.default_rng(1).normal(0, 15, (2, *shape))
    image = np.hypot(image * (1 + 0.5 * x) + noise[0], noise[1]).astype(np.float32)
    mask = mask_of(image, MR)
    assert dice(mask, radius < 1) > 0.98
    # The scale means nothing in MR. Normalised images have negative values.
    np.testing.assert_array_equal(mask, mask_of(image * 1e-4, MR))
    assert (mask_of((image - image.mean()) / image.std(), MR) == mask).mean() > 0.99


def test_a_crop_within_the_body_is_all_body_and_air_alone_is_none() -> None:
    generator = np.random.default_rng(3)
    crop = np.where(generator.random((20, 30, 30)) < 0.4, 300, 800)
    assert mask_of(crop + generator.normal(0, 40, crop.shape), MR, (1.0, 1.0, 1.0)).all()
    assert body_mask(generator.normal(-1000, 20, (20, 40, 40)), EVEN, 0, CT) is None


@pytest.mark.shared
@pytest.mark.parametrize(
    ("pattern", "modality", "share"),
    [
        ("examples/example_ct.nii.gz", CT, 0.640),
        ("examples/example_mr_sm.nii.gz", MR, 0.774),
        ("Dataset004_Hippocampus/imagesTr/*0_0000.nii.gz", MR, 1),
    ],
)
def test_real_scans(shared: Path, pattern: str, modality: str, share: float) -> None:
    """Shares of masks that were looked at; crops are all body."""
    for path in sorted((shared / "data").glob(pattern))[:10]:
        image = sitk.ReadImage(str(path))
        mask = mask_of(sitk.GetArrayFromImage(image), modality, image.GetSpacing()[::-1])
        assert mask.mean() == pytest.approx(share, abs=0.01 * (share < 1))
