"""FMUNet: the published function in its three modes, every parameter in use, any size of input,
less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import MODES
from stunet_plugin.networks.fmunet import DROPOUT, FEATURES, FMUNet
from stunet_plugin.networks.presets import FMUNET
from stunet_plugin.weights.misfm_keys import translate_fmunet

from misfm_helpers import (
    SMALL,
    check_fixture,
    check_half_precision,
    check_interface,
    check_no_graph_breaks,
    check_outputs_and_gradients,
    check_refused_inputs,
    check_slab_by_slab,
    plain_network,
    randomise,
)


def tiny(mode: int = 1, **changes: Any) -> FMUNet:
    torch.manual_seed(0)
    network = FMUNet(
        **{
            "input_channels": 1,
            "num_classes": 3,
            "mode": mode,
            **SMALL,
            "deep_supervision": True,
            **changes,
        }
    )
    network.apply(network.initialize)
    return network


@pytest.fixture
def plain(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    return plain_network("FMUNet", repository, monkeypatch)


@pytest.mark.shared
@pytest.mark.parametrize("mode", range(3))
def test_published_function(shared: Path, mode: int) -> None:
    check_fixture(
        tiny(mode, num_classes=5),
        shared / "fixtures",
        f"fmunet_mode{mode}_tiny",
        "",
        translate_fmunet,
    )


@pytest.mark.parametrize(
    ("mode", "size"), [(0, (32, 48, 32)), (1, (16, 32, 48)), (2, (12, 32, 32))]
)
def test_prediction_slab_by_slab_is_the_published_function(
    plain: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    size: tuple[int, ...],
) -> None:
    published = randomise(plain(2, 4, mode, *SMALL.values(), DROPOUT, True)).double().eval()
    network = tiny(mode, input_channels=2, num_classes=4).double().eval()
    network.load_state_dict(translate_fmunet(published.state_dict()))
    check_slab_by_slab(network, published, size, monkeypatch, 1e-10)


def test_computing_again_changes_no_gradient(plain: Callable[..., nn.Module]) -> None:
    published = randomise(plain(1, 3, 1, *SMALL.values(), (0.0,) * 5, True)).double()
    network = tiny(dropout_per_stage=(0.0,) * 5).double()
    network.load_state_dict(translate_fmunet(published.state_dict()))
    x = torch.randn(2, 1, 16, 32, 48, dtype=torch.float64)
    for each in (published, network):
        sum(output.square().mean() for output in each(x)).backward()
    translated = translate_fmunet(
        {name: parameter.grad for name, parameter in published.named_parameters()}
    )
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, translated[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", range(3))
def test_parameters_are_the_published_ones(plain: Any, mode: int) -> None:
    with torch.device("meta"):
        networks = FMUNet(1, 5, mode), plain(1, 5, mode, FEATURES, DROPOUT, True)
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [FMUNET.parameters[mode], FMUNET.published_parameters[mode]]
    assert FMUNET.parameters[mode] == FMUNET.published_parameters[mode]


@pytest.mark.parametrize(("mode", "size"), [(0, (32, 48, 48)), (1, (8, 48, 32)), (2, (12, 32, 80))])
def test_outputs_pair_and_every_parameter_gets_a_gradient(mode: int, size: tuple[int, ...]) -> None:
    check_outputs_and_gradients(tiny(mode), size)


def test_what_nnunet_expects() -> None:
    check_interface(tiny(), tiny(input_channels=3), tiny(num_classes=7), (16, 48, 32))


def test_he_initialisation() -> None:
    network = tiny(features_per_stage=(16, 32, 64, 64, 64))
    convolution = network.encoder.stages[3][1].units[1].conv
    assert convolution.weight.std().item() == pytest.approx(
        (2 / (1 + 1e-2**2) / (64 * 27)) ** 0.5, rel=0.02
    )
    assert not convolution.bias.any()


@pytest.mark.parametrize("training", [True, False])
def test_no_graph_breaks(training: bool) -> None:
    check_no_graph_breaks(tiny(deep_supervision=training), training)


def test_runs_in_half_precision_under_autocast() -> None:
    check_half_precision(tiny())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": -1}, "Unknown anisotropy mode -1"),
        ({"strides": [[1, 1], [2, 2]]}, "strides of 2 axes. .*STUNetTrainer for 2d"),
        ({"strides": MODES[0].strides}, "FMUNet in mode 1 has strides"),
        (
            {"features_per_stage": (4, 8, 16, 32, 0)},
            "features_per_stage must be 5 positive whole numbers",
        ),
        ({"dropout_per_stage": 0.2}, "dropout_per_stage must be 5 numbers"),
        ({"input_channels": 0}, "input_channels must be a whole number of at least 1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_input_that_does_not_fit_is_refused() -> None:
    check_refused_inputs(tiny())
    with pytest.raises(
        PluginError, match=r"\[8, 16, 16\] leaves a single voxel .* Double at least one axis"
    ):
        tiny()(torch.randn(1, 1, 8, 16, 16))


def test_keys_of_other_networks_are_refused() -> None:
    with pytest.raises(PluginError, match=r"block1\.weight.*published FMUNet"):
        translate_fmunet({"block1.weight": torch.zeros(1)})
