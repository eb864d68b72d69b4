"""The fusion: exact at both ends, the same for the same seed, classes as frequent as each scheme
implies."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining.volume_fusion import (
    SCHEMES,
    BlockSizes,
    Boxes,
    FusionDraw,
    OverlappingBoxes,
    TiledBlocks,
    Tiles,
    VolumeFusion,
)

PUBLISHED_PATCH = (64, 128, 128)
SCHEME_YEARS = pytest.mark.parametrize("year", SCHEMES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    foreground, background = torch.rand(2, *shape, generator=generator(7))
    return foreground, background


@SCHEME_YEARS
@pytest.mark.parametrize("classes", [1, 4, 7])
@pytest.mark.parametrize("patch", [(12, 20, 16), (20, 28)])
def test_image_is_the_blend_that_the_class_map_says(
    year: int, classes: int, patch: tuple[int, ...]
) -> None:
    fusion = VolumeFusion(classes, SCHEMES[year], inverted=0)
    foreground, background = pair(3, 2, *patch)
    image, class_map = fusion(foreground, background, generator())
    assert image.shape == foreground.shape
    assert class_map.shape == (3, *patch)
    assert class_map.dtype == torch.uint8
    assert set(class_map.unique().tolist()) <= set(range(classes + 1))
    assert {0, classes} <= set(class_map.unique().tolist())
    # Two channels, one alpha. Bit for bit where nothing is blended.
    label = class_map[:, None].expand_as(image)
    assert torch.equal(image[label == 0], background[label == 0])
    assert torch.equal(image[label == classes], foreground[label == classes])
    alpha = label / classes
    assert torch.equal((alpha * classes).round().to(torch.uint8), label)
    torch.testing.assert_close(image, alpha * foreground + (1 - alpha) * background)


@SCHEME_YEARS
def test_seed_decides_everything(year: int) -> None:
    fusion = VolumeFusion(4, SCHEMES[year])
    sub_volumes = pair(4, 1, 16, 24, 24)
    first, again, other = (fusion(*sub_volumes, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    # Within a batch, too, no two samples are alike.
    assert not torch.equal(first[1][0], first[1][1])


def average_frequencies(fusion: VolumeFusion, patch: tuple[int, ...], draws: int) -> np.ndarray:
    drawn = fusion.draw(draws, patch, generator())
    class_maps = fusion.class_maps(drawn, patch, torch.device("cpu"))
    return (
        torch.bincount(class_maps.flatten().long(), minlength=fusion.classes + 1)
        / class_maps.numel()
    ).numpy()


def test_class_frequencies_of_overlapping_boxes() -> None:
    patch = (12, 16, 20)
    scheme = OverlappingBoxes()
    covered = []
    for axis, least, most in zip(patch, *scheme.size_range(patch), strict=True):
        centres, voxels = np.arange(axis)[:, None], np.arange(axis)[None]
        inside = [
            (centres - size // 2 <= voxels) & (voxels < centres - size // 2 + size)
            for size in range(least, most + 1)
        ]
        covered.append(np.mean(inside, axis=(0, 1)))
    by_one_box = np.einsum("i,j,k->ijk", *covered)
    uncovered = np.mean(
        [(1 - by_one_box) ** boxes for boxes in range(scheme.fewest, scheme.most + 1)]
    )
    found = average_frequencies(VolumeFusion(4, scheme), patch, 1500)
    assert found[0] == pytest.approx(uncovered, abs=0.015)
    assert found[1:] == pytest.approx(np.full(4, (1 - uncovered) / 4), abs=0.015)


def test_class_frequencies_of_tiles() -> None:
    patch = (24, 32, 40)
    scheme = TiledBlocks()
    shares = []
    for size in itertools.product(
        *(range(least, most + 1) for least, most in zip(*scheme.size_range(patch), strict=True))
    ):
        tiles = int(np.prod([axis // side for axis, side in zip(patch, size, strict=True)]))
        shares.append(int(tiles * scheme.foreground) * np.prod(size) / np.prod(patch))
    found = average_frequencies(VolumeFusion(3, scheme), patch, 1000)
    assert found[1:] == pytest.approx(np.full(3, np.mean(shares) / 3), abs=0.01)


def test_block_sizes_are_the_published_ones_in_the_published_patch() -> None:
    assert OverlappingBoxes().size_range(PUBLISHED_PATCH) == ([4, 8, 8], [40, 80, 80])
    exactly_2023 = OverlappingBoxes(smallest=(1 / 8, 1 / 16, 1 / 16))
    assert exactly_2023.size_range(PUBLISHED_PATCH) == ([8, 8, 8], [40, 80, 80])
    exactly_2025 = TiledBlocks(smallest=(1 / 8, 1 / 16, 1 / 16), largest=(1 / 2, 1 / 4, 1 / 4))
    assert exactly_2025.size_range(PUBLISHED_PATCH) == ([8, 8, 8], [32, 32, 32])
    mean = [
        np.mean(sizes) for sizes in zip(*TiledBlocks().size_range(PUBLISHED_PATCH), strict=True)
    ]
    assert np.prod(mean) == pytest.approx(20**3, rel=0.03)


def test_sizes_reach_both_ends_and_numbers_of_boxes_too() -> None:
    sizes = np.array(BlockSizes(0.1, 0.29).draw_sizes(2000, (100, 40), generator()))
    assert (sizes.min(0).tolist(), sizes.max(0).tolist()) == ([10, 4], [29, 11])
    counts = [
        len(OverlappingBoxes().draw((16, 16, 16), 4, generator(seed)).classes)
        for seed in range(400)
    ]
    assert (min(counts), max(counts)) == (10, 40)


def test_boxes_stay_inside_and_are_never_empty() -> None:
    for seed in range(50):
        boxes = OverlappingBoxes().draw((8, 12, 10), 4, generator(seed))
        assert (np.array(boxes.lower) >= 0).all()
        assert (np.array(boxes.lower) < np.array(boxes.upper)).all()
        assert (np.array(boxes.upper) <= (8, 12, 10)).all()


def test_later_boxes_cover_earlier_ones() -> None:
    class_map = torch.zeros(6, dtype=torch.uint8)
    Boxes(lower=((0,), (2,)), upper=((4,), (5,)), classes=(3, 1)).paint(class_map)
    assert class_map.tolist() == [3, 3, 1, 1, 1, 0]


def test_tiles_start_at_the_offset_and_leave_the_rest_alone() -> None:
    class_map = torch.zeros(3, 6, dtype=torch.uint8)
    Tiles(offset=(1, 1), size=(2, 2), classes=torch.tensor([[2, 0]])).paint(class_map)
    assert class_map.tolist() == [[0, 0, 0, 0, 0, 0], [0, 2, 2, 0, 0, 0], [0, 2, 2, 0, 0, 0]]


def test_share_of_the_tiles_is_exact() -> None:
    for seed in range(50):
        tiles = TiledBlocks().draw((32, 48, 40), 4, generator(seed))
        assert int((tiles.classes > 0).sum()) == int(0.7 * tiles.classes.numel())
        for axis, offset, size, count in zip(
            (32, 48, 40), tiles.offset, tiles.size, tiles.classes.shape, strict=True
        ):
            assert offset + size * count <= axis < size * (count + 1)


def test_one_tile_that_fills_the_patch_is_blended() -> None:
    assert all(
        int(TiledBlocks(1, 1).draw((8, 8), 4, generator(seed)).classes) > 0 for seed in range(20)
    )


def test_inversion_is_of_both_and_as_often_as_asked() -> None:
    fusion = VolumeFusion(2, SCHEMES[2023])
    foreground, background = pair(2, 1, 8, 8, 8)
    class_map = torch.randint(0, 3, (2, 8, 8, 8), dtype=torch.uint8, generator=generator())
    image = fusion.fuse(foreground, background, class_map, (True, False))
    torch.testing.assert_close(
        image[0], fusion.fuse(1 - foreground, 1 - background, class_map, (False, False))[0]
    )
    assert torch.equal(image[1], fusion.fuse(foreground, background, class_map, (False, False))[1])
    drawn: FusionDraw = fusion.draw(2000, (8, 8, 8), generator())
    assert np.mean(drawn.inverted) == pytest.approx(0.25, abs=0.03)


def test_standardised_images_have_mean_0_and_deviation_1_even_without_contrast() -> None:
    fusion = VolumeFusion(4, SCHEMES[2023], standardise=True)
    foreground, background = pair(2, 2, 8, 12, 8)
    foreground[0, 0] = background[0, 0] = 0.3
    image, _ = fusion(foreground, background, generator())
    mean, deviation = image.flatten(2).mean(2), image.flatten(2).std(2)
    torch.testing.assert_close(mean, torch.zeros(2, 2), atol=0.1, rtol=0)
    torch.testing.assert_close(deviation.flatten()[1:], torch.ones(3))
    assert torch.isfinite(image).all()


def test_class_names_are_the_alphas() -> None:
    assert VolumeFusion(4).class_names() == ["0", "1/4", "2/4", "3/4", "1"]
    assert VolumeFusion(1).class_names() == ["0", "1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VolumeFusion(0), "needs 1 to 255 fusion classes, not 0. Published: 4"),
        (lambda: VolumeFusion(256), "needs 1 to 255 fusion classes, not 256"),
        (
            lambda: BlockSizes(0.5, 0.2),
            "0 < smallest <= largest <= 1 .*not smallest 0.5 and largest 0.2",
        ),
        (lambda: BlockSizes(0.0, 0.2), "0 < smallest"),
        (lambda: BlockSizes((0.1, 0.2), (0.5, 1.2)), "0 < smallest"),
        (
            lambda: TiledBlocks().size_range((3, 64, 64)),
            r"patch of \[3, 64, 64\] voxels is too small.*STUNET_VF_LARGEST to 0.33",
        ),
    ],
)
def test_wrong_numbers_say_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        make()
