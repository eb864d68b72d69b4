"""The fusion: exact at both ends, decided by the seed, classes as frequent as a scheme implies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining import volume_fusion as vf
from stunet_plugin.pretraining.volume_fusion import OverlappingBoxes, TiledBlocks, VolumeFusion

PUBLISHED_PATCH = (64, 128, 128)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    foreground, background = torch.rand(2, *shape, generator=torch.Generator().manual_seed(7))
    return foreground, background


def painted(scheme: vf.Scheme, *patch: int, seed: int = 0) -> np.ndarray:
    class_map = torch.zeros(patch, dtype=torch.uint8)
    scheme.paint(class_map, 4, np.random.default_rng(seed))
    return class_map.numpy()


@pytest.mark.parametrize("year", vf.SCHEMES)
@pytest.mark.parametrize("classes", [1, 4, 7])
@pytest.mark.parametrize("patch", [(12, 20, 16), (20, 28)])
def test_image_is_the_blend_that_the_class_map_says(
    year: int, classes: int, patch: tuple[int, ...]
) -> None:
    fusion = VolumeFusion(classes, vf.SCHEMES[year], inverted=0)
    foreground, background = pair(3, 2, *patch)
    image, class_map = fusion(foreground, background, np.random.default_rng(0))
    assert (image.shape, class_map.shape) == (foreground.shape, (3, *patch))
    assert {0, classes} <= set(class_map.unique().tolist()) <= set(range(classes + 1))
    # Two channels, one alpha. Bit for bit where nothing is blended.
    label = class_map[:, None].expand_as(image)
    assert torch.equal(image[label == 0], background[label == 0])
    assert torch.equal(image[label == classes], foreground[label == classes])
    alpha = label / classes
    torch.testing.assert_close(image, alpha * foreground + (1 - alpha) * background)


@pytest.mark.parametrize("year", vf.SCHEMES)
def test_seed_decides_everything(year: int) -> None:
    fusion, sub_volumes = VolumeFusion(4, vf.SCHEMES[year]), pair(4, 1, 16, 24, 24)
    first, again, other = (fusion(*sub_volumes, np.random.default_rng(x)) for x in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[1][0], first[1][1])


@pytest.mark.parametrize("year", vf.SCHEMES)
def test_classes_are_equally_frequent(year: int) -> None:
    fusion, like = VolumeFusion(4, vf.SCHEMES[year]), torch.empty(1000, 12, 16, 20)
    counts = torch.bincount(fusion.draw_class_maps(like, np.random.default_rng(0)).flatten())[1:]
    shares = counts / counts.sum()
    assert shares.tolist() == pytest.approx([1 / 4] * 4, abs=0.01)


def test_block_sizes_are_the_published_ones_in_the_published_patch() -> None:
    assert OverlappingBoxes().size_range(PUBLISHED_PATCH) == ([4, 8, 8], [40, 80, 80])
    exactly_2025 = TiledBlocks(smallest=(1 / 8, 1 / 16, 1 / 16), largest=(1 / 2, 1 / 4, 1 / 4))
    assert exactly_2025.size_range(PUBLISHED_PATCH) == ([8, 8, 8], [32, 32, 32])
    mean = np.mean(TiledBlocks().size_range(PUBLISHED_PATCH), axis=0)
    assert np.prod(mean) == pytest.approx(20**3, rel=0.03)
    assert vf.BlockSizes(0.1, 0.29).size_range((100, 40)) == ([10, 4], [29, 11])


def test_boxes_are_of_the_sizes_asked_for_and_later_ones_cover_earlier_ones() -> None:
    one = OverlappingBoxes(0.25, 0.5, 1, 1)
    assert max((painted(one, 40, seed=seed) > 0).sum() for seed in range(300)) == 20
    # As many as published, centred anywhere.
    small = [painted(OverlappingBoxes(0.01, 0.01), 100, 100, seed=seed) > 0 for seed in range(300)]
    counts = [drawn.sum() for drawn in small]
    assert (min(counts), max(counts)) == (10, 40)
    assert all(np.any(small, axis=(0, axis)).all() for axis in (1, 2))
    inside = [painted(OverlappingBoxes(1, 1, 2, 2), 9, seed=seed) for seed in range(50)]
    assert {len(set(line[line > 0])) for line in inside} == {1, 2}


def test_tiles_are_whole_and_their_share_is_exact() -> None:
    for seed in range(30):
        class_map = painted(TiledBlocks(0.25, 0.25), 16, 24, 20, seed=seed)
        assert (class_map > 0).sum() == int(0.7 * 4**3) * 4 * 6 * 5
        tiles = class_map.reshape(4, 4, 4, 6, 4, 5)
        assert (tiles == tiles[:, :1, :, :1, :, :1]).all()
    # One tile that fills the patch is blended.
    assert all(painted(TiledBlocks(1, 1), 8, 8, seed=seed).min() > 0 for seed in range(20))


def test_inversion_is_of_both_and_as_often_as_asked() -> None:
    fusion = VolumeFusion(2, vf.SCHEMES[2023])
    foreground, background = pair(2, 1, 8, 8, 8)
    class_map = fusion.draw_class_maps(foreground[:, 0], np.random.default_rng(0))
    image = fusion.fuse(foreground, background, class_map, (True, False))
    inverted = fusion.fuse(1 - foreground, 1 - background, class_map, (False, False))
    plain = fusion.fuse(foreground, background, class_map, (False, False))
    torch.testing.assert_close(image, torch.stack([inverted[0], plain[1]]))
    zeros = torch.zeros(1000, 1, 4, 4)
    share = fusion(zeros, zeros, np.random.default_rng(0))[0].mean()
    assert float(share) == pytest.approx(0.25, abs=0.04)


def test_standardised_images_have_mean_0_and_deviation_1_even_without_contrast() -> None:
    fusion = VolumeFusion(4, vf.SCHEMES[2023], standardise=True)
    foreground, background = pair(2, 2, 8, 12, 8)
    foreground[0, 0] = background[0, 0] = 0.3
    image, _ = fusion(foreground, background, np.random.default_rng(0))
    mean, deviation = image.flatten(2).mean(2), image.flatten(2).std(2)
    torch.testing.assert_close(mean, torch.zeros(2, 2), atol=0.1, rtol=0)
    torch.testing.assert_close(deviation.flatten()[1:], torch.ones(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VolumeFusion(0), "needs 1 to 255 fusion classes, not 0"),
        (lambda: vf.BlockSizes(0.5, 0.2), "0 < .*SMALLEST <= .* <= 1.*smallest 0.5 and largest"),
        (lambda: TiledBlocks().size_range((3, 64, 64)), r"\[3, 64, 64\] voxels .*LARGEST to 0.33"),
    ],
)
def test_wrong_numbers_say_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        make()
