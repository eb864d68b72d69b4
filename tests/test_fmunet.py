"""FMUNet: the published function in its three modes, every parameter in use, any size of input, less memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from misfm_helpers import SMALL, check_interface, check_outputs_and_gradients, largest_differences, randomise
from torch import nn

from stunet_plugin.anisotropy import MODES
from stunet_plugin.checkpoints.fmunet_keys import translate_state_dict
from stunet_plugin.errors import PluginError
from stunet_plugin.misfm_presets import PRESETS
from stunet_plugin.networks import cpu_inference
from stunet_plugin.networks.fmunet import DROPOUT, FEATURES, FMUNet

RECORDS = [record for record in PRESETS if record.network == "FMUNet"]


def tiny(mode: int = 1, **changes: Any) -> FMUNet:
    torch.manual_seed(0)
    network = FMUNet(**{"input_channels": 1, "num_classes": 3, "mode": mode, **SMALL, "deep_supervision": True, **changes})
    network.apply(network.initialize)
    return network


@pytest.fixture
def plain(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("plain_fmunet").PlainFMUNet


@pytest.mark.shared
@pytest.mark.parametrize("mode", range(3))
def test_published_function(shared: Path, mode: int) -> None:
    name = f"fmunet_mode{mode}_tiny"
    # The fixtures hold numpy scalars besides tensors and come with the project.
    published = torch.load(shared / "fixtures" / f"{name}.pt", map_location="cpu", weights_only=False)["model_state_dict"]
    network = tiny(mode, num_classes=5).eval()
    network.load_state_dict(translate_state_dict(published))
    recorded = np.load(shared / "fixtures" / f"{name}.npz")
    expected = [torch.from_numpy(recorded[f"output_{index}"]) for index in range(4)]
    x = torch.from_numpy(recorded["input"])
    with torch.no_grad():
        assert largest_differences(network(x), expected) <= 1e-5
        network.decoder.deep_supervision = False
        assert largest_differences([network(x)], expected[:1]) <= 1e-5
    network.decoder.deep_supervision = True
    assert largest_differences(network(x), expected) <= 1e-5


@pytest.mark.parametrize(("mode", "size"), [(0, (32, 48, 32)), (1, (16, 32, 48)), (2, (12, 32, 32))])
def test_prediction_slab_by_slab_is_the_published_function(
    plain: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch, mode: int, size: tuple[int, ...]
) -> None:
    published = randomise(plain(2, 4, mode, *SMALL.values(), DROPOUT, True)).double().eval()
    network = tiny(mode, input_channels=2, num_classes=4).double().eval()
    network.load_state_dict(translate_state_dict(published.state_dict()))
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = published(x)
        assert not cpu_inference.begins(network, x)
        assert cpu_inference.begins(network, torch.empty(1, 1, 48, 48, 48))
        # As if the input were large, in many slabs.
        monkeypatch.setattr(cpu_inference, "SMALLEST_VOLUME", 0)
        monkeypatch.setattr(cpu_inference, "SLAB_ELEMENTS", 5000)
        assert largest_differences(network(x), expected) <= 1e-10
        network.decoder.deep_supervision = False
        assert largest_differences([network(x)], expected[:1]) <= 1e-10


def test_computing_again_changes_no_gradient(plain: Callable[..., nn.Module]) -> None:
    published = randomise(plain(1, 3, 1, *SMALL.values(), (0.0,) * 5, True)).double()
    network = tiny(dropout_per_stage=(0.0,) * 5).double()
    network.load_state_dict(translate_state_dict(published.state_dict()))
    x = torch.randn(2, 1, 16, 32, 48, dtype=torch.float64)
    for each in (published, network):
        sum(output.square().mean() for output in each(x)).backward()
    translated = translate_state_dict({name: parameter.grad for name, parameter in published.named_parameters()})
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, translated[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"mode {record.mode}")
def test_parameters_are_the_published_ones(plain: Any, record: Any) -> None:
    with torch.device("meta"):
        networks = FMUNet(1, 5, record.mode), plain(1, 5, record.mode, FEATURES, DROPOUT, True)
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [record.parameters, record.published_parameters]
    assert record.parameters == record.published_parameters


@pytest.mark.parametrize(("mode", "size"), [(0, (32, 48, 48)), (1, (8, 48, 32)), (2, (12, 32, 80))])
def test_outputs_pair_and_every_parameter_gets_a_gradient(mode: int, size: tuple[int, ...]) -> None:
    check_outputs_and_gradients(tiny(mode), size)


def test_what_nnunet_expects() -> None:
    check_interface(tiny(), tiny(input_channels=3), tiny(num_classes=7), (16, 48, 32))


def test_he_initialisation() -> None:
    network = tiny(features_per_stage=(16, 32, 64, 64, 64))
    convolution = network.encoder.stages[3][1].units[1].conv
    assert convolution.weight.std().item() == pytest.approx((2 / (1 + 1e-2**2) / (64 * 27)) ** 0.5, rel=0.02)
    assert not convolution.bias.any()


def test_no_graph_breaks() -> None:
    for deep_supervision, training in ((True, True), (False, False)):
        torch._dynamo.reset()
        network = tiny(deep_supervision=deep_supervision).train(training)
        with torch.set_grad_enabled(training):
            explanation = torch._dynamo.explain(network)(torch.randn(1, 1, 16, 32, 48))
        assert explanation.graph_break_count == 0, explanation.break_reasons


def test_runs_in_half_precision_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = tiny()(torch.randn(2, 1, 16, 32, 48))
        sum(output.float().square().mean() for output in outputs).backward()
    assert all(output.dtype == torch.bfloat16 and torch.isfinite(output).all() for output in outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        large = tiny().eval()(torch.randn(1, 1, 48, 48, 48))
    assert all(torch.isfinite(output).all() for output in large)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": -1}, "Unknown anisotropy mode -1"),
        ({"strides": [[1, 1], [2, 2]]}, "strides of 2 axes. .*STUNetTrainer for 2d"),
        ({"strides": MODES[0].strides}, "FMUNet in mode 1 has strides"),
        ({"features_per_stage": (4, 8, 16, 32, 0)}, "features_per_stage must be 5 positive whole numbers"),
        ({"dropout_per_stage": 0.2}, "dropout_per_stage must be 5 numbers"),
        ({"input_channels": 0}, "input_channels must be a whole number of at least 1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PluginError, match=r"\[12, 32, 32\].*\[8, 32, 32\] and \[16, 32, 32\]"):
        tiny()(torch.randn(1, 1, 12, 32, 32))
    with pytest.raises(PluginError, match="not 4 axes. .*STUNetTrainer for 2d"):
        tiny()(torch.randn(1, 1, 32, 32))
    with pytest.raises(PluginError, match=r"\[8, 16, 16\] leaves a single voxel .* Double at least one axis"):
        tiny()(torch.randn(1, 1, 8, 16, 16))


def test_keys_of_other_networks_are_refused() -> None:
    with pytest.raises(PluginError, match=r"block1\.weight.*published FMUNet"):
        translate_state_dict({"block1.weight": torch.zeros(1)})
