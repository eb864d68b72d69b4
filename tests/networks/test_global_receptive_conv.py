"""GRC: the published shift, to the bit; where it goes in a network; what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.global_receptive_conv import as_grc, largest_grid, shift_blocks

from network_helpers import build, image


def recorded(shared: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared / "fixtures" / "network_options" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("x", "y", "grid", "portion"),
    [
        ("x", "global_s2_p05", (2, 2), 0.5),
        ("x", "global_s4_p08", (4, 4), 0.8),
        ("x", "global_s4_p05", (4, 4), 0.5),  # no channel: the identity
        ("x", "global2d_s3x2_p05", (3, 2), 0.5),
        ("x16", "aspp_s4_full", (4, 4), 1.0),
    ],
)
def test_published_shift(shared: Path, x: str, y: str, grid: Sequence[int], portion: float) -> None:
    arrays = recorded(shared, "grc_2d")
    assert torch.equal(shift_blocks(arrays[x], grid, portion), arrays[y])


@pytest.mark.shared
@pytest.mark.parametrize("name", ["s2", "s2_1_4", "s3"])
def test_shift_in_3d(shared: Path, name: str) -> None:
    arrays = recorded(shared, "grc_3d_ours")
    grid, portion = arrays[f"g_{name}"].tolist(), float(arrays[f"portion_{name}"])
    assert torch.equal(shift_blocks(arrays[f"x_{name}"], grid, portion), arrays[f"y_{name}"])


@pytest.mark.shared
def test_published_place_in_a_bottleneck(shared: Path) -> None:
    arrays = recorded(shared, "grc_bottleneck2d")
    weights = torch.load(shared / "fixtures" / "network_options" / "grc_bottleneck2d.pt")
    conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
    parts: dict[str, Any] = {
        "conv1": nn.Conv2d(16, 8, 1, bias=False), "bn1": nn.BatchNorm2d(8), "relu1": nn.ReLU(),
        "conv2": as_grc(conv, (2, 2), 0.5), "bn2": nn.BatchNorm2d(8), "relu2": nn.ReLU(),
        "conv3": nn.Conv2d(8, 16, 1, bias=False), "bn3": nn.BatchNorm2d(16),
    }  # fmt: skip
    block = nn.Sequential()
    for name, part in parts.items():
        block.add_module(name, part)
    block.load_state_dict(weights)
    block.eval()
    found = block(arrays["x"]) + arrays["x"]
    torch.testing.assert_close(found.relu(), arrays["out"], rtol=0, atol=1e-6)


def test_grids_divide_and_leave_room() -> None:
    assert largest_grid((8, 12, 10), 4, 64) == (4, 4, 2)
    assert largest_grid((5, 7, 3), 4, 64) == (1, 1, 3)
    assert largest_grid((8, 8, 8), 4, 32) == (2, 4, 4)
    assert largest_grid((8, 8), 4, 0) == (1, 1)


@pytest.mark.parametrize("name", ["STUNet GRC", "STUNet 2D GRC"])
def test_shifts_come_before_convolutions_that_keep_their_names(name: str) -> None:
    """So weights of the plain network fit; the function is another one."""
    network, plain = build(name).eval(), build(name.replace(" GRC", "")).eval()
    plain.load_state_dict(network.state_dict())
    ours = {key: part for key, part in network.named_modules() if "grid" in vars(part)}
    assert ours
    assert all(".conv2" in key for key in ours)
    kinds = {key: type(part) for key, part in plain.named_modules()}
    assert all(issubclass(type(part), kinds[key]) for key, part in ours.items())
    x = image(name)
    assert not torch.allclose(network(x)[0], plain(x)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"portion": 0}, "portion must be above 0 .* a plain network shifts none, not 0"),
        ({"grids": [[3, 1, 1]], "stages": [2]}, r"stage 2 with 3x1x1 blocks.*has \[8, 8, 16\]"),
        ({"grids": [[1, 1, 1]], "stages": [2]}, "would shift nothing"),
        ({"grids": [[4, 4, 4]], "stages": [2]}, "channels allows 8 blocks"),
        ({"portion": 0.01}, "no stage can be cut into blocks"),
        ({"stages": [2, 9]}, r"stages must be rising whole numbers from 0 to 5, not \[2, 9\]"),
        ({"grid": 1}, "grid must be a whole number of at least 2"),
        ({"grids": [[2, 2, 2]], "stages": [2, 3]}, r"grids must be one per stage \[2, 3\]"),
        ({"scale": 2}, "has no setting 'scale'.*Settings: portion, stages, grids, grid"),
    ],
)
def test_numbers_that_shift_nothing_or_do_not_fit_are_refused(
    numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        build("STUNet GRC", options={"grc": numbers})


def test_other_sizes_at_prediction() -> None:
    network = build("STUNet GRC").eval()
    assert network(torch.randn(1, 1, 64, 64, 64))[0].shape == (1, 3, 64, 64, 64)
    with pytest.raises(PluginError, match=r"2x2x4 blocks.* map of \[3, "):
        shift_blocks(torch.randn(1, 32, 3, 4, 4), (2, 2, 4))
