"""Sub-volumes: crops, resizing, contrast, and pairs of different cases, as published."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.pretraining import subvolumes
from stunet_plugin.pretraining.subvolumes import PercentileContrast, ResizeToPatch, SubVolumeLoader


@pytest.fixture(autouse=True)
def _seeded() -> None:
    np.random.seed(0)
    torch.manual_seed(0)


def test_crops_have_the_published_sizes_and_stay_in_the_scan() -> None:
    scan, patch = (100, 90, 12), (40, 60, 20)
    crops = [subvolumes.draw_crop(scan, patch) for _ in range(1000)]
    starts = np.array([[axis.start for axis in crop] for crop in crops])
    stops = np.array([[axis.stop for axis in crop] for crop in crops])
    lengths = stops - starts
    assert (lengths.min(0).tolist(), lengths.max(0).tolist()) == ([28, 42, 12], [59, 89, 12])
    assert (starts.min(0).tolist(), stops.max(0).tolist()) == ([0, 0, 0], [100, 90, 12])


def test_a_small_scan_is_padded_rather_than_stretched_beyond_the_published_scale() -> None:
    image = 5 + torch.rand(2, 7, 20, 20)
    image[1, 0, 0, 0] = -3
    padded = ResizeToPatch((20, 20, 20))(image=image)["image"]
    assert padded.shape == (2, 20, 20, 20)
    # 7 / 0.7 = 10 voxels in the middle, the channel's minimum on both sides.
    for channel in padded:
        assert torch.equal(channel[[0, 4, 15, 19]], channel.min().expand(4, 20, 20))
    assert (padded[0, 5:15] > padded[0].min()).float().mean() > 0.99


@pytest.mark.parametrize(
    ("image", "low", "high", "expected"),
    [
        ([-10.0, -4.0, 0.0, 1.0, 2.0, 6.0, 8.0], 0, 2, [0, 0.06, 0.1, 0.5, 0.9, 0.9 + 0.4 / 6, 1]),
        ([3.0, 3.0], 3.0, 3.0, [0.1, 0.1]),
        ([0.0, 0.0, 5.0], 0.0, 0.0, [0.1, 0.1, 1.0]),
    ],
)
def test_contrast_maps_the_marks_exactly_also_with_few_gray_values(
    image: list[float], low: float, high: float, expected: list[float]
) -> None:
    assert subvolumes.stretch(torch.tensor(image), low, high).tolist() == pytest.approx(expected)


def test_percentiles_are_the_published_ones() -> None:
    transform = PercentileContrast()
    drawn = np.array(transform.get_parameters(image=torch.zeros(2000, 4))["percentiles"])
    assert drawn.min(0) == pytest.approx([0.1, 98.0], abs=0.01)
    assert drawn.max(0) == pytest.approx([2.0, 99.9], abs=0.01)


@pytest.mark.parametrize("shape", [(2, 30, 40, 20), (1, 40, 30)])
def test_sub_volumes_are_patches_from_0_to_1(shape: tuple[int, ...]) -> None:
    patch = (24,) * (len(shape) - 1)
    transform = subvolumes.sub_volume_transforms(patch)
    sub_volume = transform(image=torch.randn(shape) * 100)["image"]
    assert sub_volume.shape == (shape[0], *patch)
    assert all((channel.min(), channel.max()) == (0, 1) for channel in sub_volume)
    assert torch.isfinite(transform(image=torch.full(shape, 7.0))["image"]).all()


class Cases:
    """A dataset as nnU-Net's; reading labels fails."""

    def __init__(self, count: int, *shape: int) -> None:
        self.identifiers = [f"case{index}" for index in range(count)]
        self.shape = shape

    def load_case(self, identifier: str) -> tuple[np.ndarray, None, None, None]:
        return np.random.rand(*self.shape).astype(np.float32), None, None, None


def loader(cases: int, pairs: int, patch: tuple[int, ...], *shape: int) -> Any:
    return SubVolumeLoader(Cases(cases, *shape), pairs, patch)  # type: ignore[arg-type]


def test_a_batch_is_foregrounds_and_then_backgrounds_of_other_cases() -> None:
    patch, shape = (8, 8), (1, 5, 12, 14)
    batches, seen = loader(3, 4, patch, *shape), Counter[tuple[str, str]]()
    for _ in range(100):
        batch = next(batches)
        assert batch["data"].shape == (8, 1, *patch)
        seen.update(zip(batch["keys"][:4], batch["keys"][4:], strict=True))
    assert all(first != second for first, second in seen)
    assert (len(seen), min(seen.values()) > 40) == (6, True)  # 67 each
    assert set(next(loader(1, 2, patch, *shape))["keys"]) == {"case0"}


def test_workers_do_not_share_torchs_random_numbers() -> None:
    drawn = set()
    for worker in range(2):
        torch.manual_seed(0)  # what workers are forked with
        loader(2, 1, (8, 8, 8), 1, 8, 8, 8).set_thread_id(worker)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 2
