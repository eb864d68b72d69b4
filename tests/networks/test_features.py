"""What `stunet rank` reads: voxels drawn per label, features where they should be, the heads of
every network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stunet_plugin.networks.features import (
    head_modules,
    read_features,
    sample_voxels,
    samples_of_levels,
)

from network_helpers import build, image

SHAPE = (20, 24, 36)


class Pyramid(nn.Module):
    """Heads that take in the image itself, down to full resolution."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.pool = functional.avg_pool3d if axes == 3 else functional.avg_pool2d
        convolution = nn.Conv3d if axes == 3 else nn.Conv2d
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList(convolution(2, 1, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> None:
        for factor, head in zip((8, 4, 2, 1), self.decoder.seg_layers, strict=True):
            head(self.pool(x, factor))


def coordinates(shape: tuple[int, int, int]) -> torch.Tensor:
    """An image whose two channels say where a voxel is."""
    z, y, x = np.indices(shape).astype(np.float32)
    return torch.from_numpy(np.stack([100 * z + y, x]))


def test_voxels_are_drawn_per_label_and_do_not_depend_on_other_cases() -> None:
    segmentation = np.zeros((6, 30, 30), np.int8)
    segmentation[2, 3, 4:7] = 2
    segmentation[3:, 5:25, 5:25] = 1
    voxels = sample_voxels(segmentation, [0, 1, 2, 3], "case", 7)
    assert {label: len(indices) for label, indices in voxels.items()} == {0: 400, 1: 400, 2: 3}
    for label, indices in voxels.items():
        assert (segmentation[tuple(indices.T)] == label).all()
        assert len(np.unique(indices, axis=0)) == len(indices)
    again, other = (sample_voxels(segmentation, [1], name, 7)[1] for name in ("case", "other"))
    assert np.array_equal(voxels[1], again)
    assert not np.array_equal(again, other)
    assert samples_of_levels(5) == [100, 100, 100, 200, 400]


@pytest.mark.parametrize("patch", [(16, 16, 16), (16, 16), (24, 32, 40)])
def test_each_voxel_is_read_in_the_window_that_has_it_in_the_middle(patch: tuple[int, ...]) -> None:
    where = coordinates(SHAPE)
    segmentation = (np.indices(SHAPE).sum(0) > 40).astype(np.int8)
    voxels = sample_voxels(segmentation, [0, 1], "case", 0)
    network = Pyramid(len(patch))
    (full,) = read_features(network, where, voxels, patch, 0.5, head_modules(network)[-1:])
    for label, indices in voxels.items():
        expected = where.numpy()[(slice(None), *indices.T)].T
        assert np.allclose(full[label], expected, rtol=1e-4, atol=1e-3)


def test_features_between_voxels_are_those_of_torchs_interpolation() -> None:
    torch.manual_seed(0)
    noise, size = torch.rand(2, 16, 16, 16), (16, 16, 16)
    voxels = sample_voxels(np.ones(size), [1], "case", 0)
    network = Pyramid(3)
    heads = head_modules(network)[-3:]
    coarse, half, _ = read_features(network, noise, voxels, size, 1.0, heads)
    for found, factor, count in ((coarse, 4, 100), (half, 2, 200)):
        pooled = functional.avg_pool3d(noise[None], factor)
        upsampled = functional.interpolate(pooled, size=size, mode="trilinear")[0]
        expected = upsampled.numpy()[(slice(None), *voxels[1][:count].T)].T
        assert np.allclose(found[1], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["STUNet", "PCTNet 1"])
def test_heads_of_every_network(name: str) -> None:
    """Applied to the features that were read, the last head gives the network's output."""
    network, given = build(name).eval(), image(name)[:1]
    voxels = {1: np.argwhere(np.ones(given.shape[2:]))[::97][:400]}
    heads = head_modules(network)[-2:]
    features = read_features(network, given[0], voxels, given.shape[2:], 0.5, heads)
    head = heads[-1]
    with torch.no_grad():
        found = head(torch.from_numpy(features[-1][1])[..., None, None, None]).flatten(1)
        expected = network(given)[0][0].numpy()[(slice(None), *voxels[1].T)].T
    assert np.allclose(found, expected, atol=1e-3)
