"""STUNet: the published function, gradients everywhere, any topology, no graph breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import cpu_inference, winograd
from stunet_plugin.networks.instance_norm import InstanceNorm
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.weights.stunet import translate_key, translate_state_dict

ISOTROPIC = [[1, 1, 1]] + [[2, 2, 2]] * 5
TINY: dict[str, Any] = {
    "input_channels": 1,
    "num_classes": 3,
    "n_stages": 6,
    "features_per_stage": [4, 8, 16, 32, 32, 32],
    "conv_op": nn.Conv3d,
    "kernel_sizes": 3,
    "strides": ISOTROPIC,
    "n_blocks_per_stage": 1,
    "n_blocks_per_stage_decoder": 1,
    "deep_supervision": True,
}

FIXTURES = {
    "stunet_v1_tiny": (
        "stunet_v1_tiny.model",
        "state_dict",
        {
            "num_classes": 5,
            "features_per_stage": [4, 8, 16, 32, 64, 64],
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * 4 + [[1, 1, 2]],
        },
    ),
    "stunet_v2_tiny": (
        "stunet_v2_tiny.pth",
        "network_weights",
        {
            "input_channels": 2,
            "n_blocks_per_stage": 2,
            "n_blocks_per_stage_decoder": 2,
            "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
        },
    ),
}


def tiny(**changes: Any) -> STUNet:
    torch.manual_seed(0)
    network = STUNet(**{**TINY, **changes})
    network.apply(network.initialize)
    return network


@pytest.fixture
def own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions on the CPU go by their own order of memory for any feature map."""
    monkeypatch.setattr("stunet_plugin.networks.residual_block.FEWEST_VOXELS", 1)


@pytest.fixture
def always_fast(own_order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their convolutions have fewer products, whatever the width."""
    monkeypatch.setattr("stunet_plugin.networks.winograd.FEWEST_VOXELS", 1)
    monkeypatch.setattr("stunet_plugin.networks.winograd.FEWEST_CHANNELS", 1)


def fixture(shared: Path, name: str) -> tuple[STUNet, dict[str, np.ndarray]]:
    """Return a network with recorded weights, and the input and outputs that were recorded."""
    file, key, changes = FIXTURES[name]
    # The fixtures hold numpy scalars besides tensors and come with the project.
    checkpoint = torch.load(shared / "fixtures" / file, map_location="cpu", weights_only=False)
    network = tiny(**changes).eval()
    network.load_state_dict(translate_state_dict(checkpoint[key]))
    return network, dict(np.load(shared / "fixtures" / f"{name}.npz"))


@pytest.mark.shared
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("name", FIXTURES)
def test_published_function(
    shared: Path, request: pytest.FixtureRequest, name: str, everywhere: bool
) -> None:
    if everywhere:
        request.getfixturevalue("own_order")
    network, recorded = fixture(shared, name)
    with torch.no_grad():
        outputs = network(torch.from_numpy(recorded["input"]))
        network.decoder.deep_supervision = False
        full_resolution = network(torch.from_numpy(recorded["input"]))
    assert len(outputs) == 5
    for index, output in enumerate(outputs):
        expected = recorded[f"output_{index}"]
        # Relative to the largest logit: the recorded float32 outputs are themselves up to 3.6e-5
        # off a float64 run.
        assert np.abs(output.numpy() - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    assert torch.equal(full_resolution, outputs[0])


@pytest.mark.shared
@pytest.mark.parametrize("name", FIXTURES)
def test_published_function_with_fewer_products_in_every_layer(
    shared: Path, always_fast: None, name: str
) -> None:
    """Held against float64, as the recorded outputs are no nearer to it than these: to each other
    they are 1.02e-5."""
    network, recorded = fixture(shared, name)
    x = torch.from_numpy(recorded["input"])
    with torch.no_grad():
        outputs = network(x)
        exact = network.double()(x.double())
    for output, expected in zip(outputs, exact, strict=True):
        assert (output - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize(
    "strides", [ISOTROPIC, [[1, 1, 1], [1, 2, 2], [2, 3, 1], [2, 2, 2], [1, 1, 1], [1, 2, 2]]]
)
def test_predictions_on_the_cpu_are_the_same_function(
    always_fast: None, strides: list[list[int]]
) -> None:
    network = tiny(strides=strides, n_blocks_per_stage=2).double().eval()
    x = torch.randn(2, 1, 32, 96, 64, dtype=torch.float64)
    expected = network(x)
    with torch.no_grad():
        outputs = network(x)
    for output, plain in zip(outputs, expected, strict=True):
        assert output.grad_fn is None
        torch.testing.assert_close(output, plain, rtol=1e-9, atol=1e-9)
    assert outputs[0].is_contiguous()


def test_predictions_under_autocast_stay_with_it(always_fast: None) -> None:
    network = tiny(deep_supervision=False).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(torch.randn(1, 1, 32, 64, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("depth", [4, 5, 12])
def test_convolutions_with_fewer_products(
    always_fast: None, monkeypatch: pytest.MonkeyPatch, depth: int, bias: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(7, 5, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 7, depth, 6, 5, dtype=torch.float64)
    assert winograd.fits(conv, x) == (depth != 5)
    with torch.no_grad():
        expected = conv(x)
        # One pair of planes at a time, two, all.
        for elements in (1, 4 * 6 * 5 * 7, 1 << 20):
            monkeypatch.setattr(winograd, "SLAB_ELEMENTS", elements)
            found = winograd.convolve(conv, cpu_inference.channels_last(x))
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_fewer_products_round_about_as_torch_does() -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 16, 16, 16)
    assert winograd.fits(conv, x)
    with torch.no_grad():
        expected = nn.functional.conv3d(
            x.double(), conv.weight.double(), conv.bias.double(), padding=1
        )
        error = winograd.convolve(conv, cpu_inference.channels_last(x)) - expected
    # torch's own: 0.6e-6 to 3e-6 by width and memory format.
    assert error.abs().max() <= 4e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": (1, 3, 3)},
        {"stride": 2},
        {"padding": 0},
        {"groups": 2},
        {"dilation": 2},
        {"out_channels": 16},
    ],
)
def test_other_convolutions_go_another_way(changes: dict[str, Any]) -> None:
    conv = nn.Conv3d(
        **{"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1, **changes}
    )
    assert not winograd.fits(conv, torch.empty(1, 64, 16, 16, 16, device="meta"))


def test_convolving_first_is_the_same_function() -> None:
    network = tiny().eval()
    convolution = network.decoder.upsample_convs[0]
    x = torch.randn(2, 32, 3, 4, 5)
    published = convolution(functional.interpolate(x, scale_factor=(2, 2, 2), mode="nearest"))
    ours = functional.interpolate(convolution(x), scale_factor=(2, 2, 2), mode="nearest")
    torch.testing.assert_close(ours, published)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (32, 32, 64)),
        (
            {"strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1]]},
            (8, 32, 32),
        ),
        (
            {
                "n_stages": 3,
                "features_per_stage": [4, 8, 8],
                "strides": ISOTROPIC[:3],
                "n_blocks_per_stage": [1, 2, 3],
            },
            (8, 12, 16),
        ),
        (
            {
                "n_stages": 8,
                "features_per_stage": [2] * 8,
                "strides": [[1, 1]] + [[2, 2]] * 7,
                "conv_op": nn.Conv2d,
            },
            (128, 256),
        ),
        (
            {
                "kernel_sizes": [[1, 3, 3]] * 2 + [[3, 3, 3]] * 4,
                "strides": [[1, 1, 1], [1, 3, 3]] + [[2, 2, 2]] * 4,
            },
            (32, 48, 48),
        ),
        ({"n_blocks_per_stage": 3, "n_blocks_per_stage_decoder": [1, 2, 1, 2, 3]}, (32, 64, 32)),
    ],
)
def test_any_topology_pairs_outputs_and_gives_every_parameter_a_gradient(
    changes: dict[str, Any], shape: tuple[int, ...]
) -> None:
    network = tiny(**changes)
    outputs = network(torch.randn(2, 1, *shape))
    expected = list(shape)
    for output, stage in zip(outputs, network.strides[:-1], strict=True):
        expected = [size // step for size, step in zip(expected, stage, strict=True)]
        assert output.shape == (2, 3, *expected)
    sum(output.square().mean() for output in outputs).backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for parameter in network.parameters()
    )


def test_feature_map_size_counts_every_convolution() -> None:
    network = tiny(num_classes=7)
    elements = 0

    def count(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    for deep_supervision in (True, False):
        network.decoder.deep_supervision, elements = deep_supervision, 0
        network(torch.randn(2, 1, 32, 64, 32))
        assert network.compute_conv_feature_map_size((32, 64, 32)) == elements


def test_he_initialisation() -> None:
    network = tiny(features_per_stage=[16, 32, 64, 64, 64, 64])
    convolution = network.encoder.stages[2][0].conv2
    fan_in = 64 * 27
    assert convolution.weight.std().item() == pytest.approx(
        (2 / (1 + 1e-2**2) / fan_in) ** 0.5, rel=0.02
    )
    assert not convolution.bias.any()


def test_loaders_of_pretrained_weights_find_their_parts() -> None:
    network = tiny()
    assert network.get_submodule(network.key_to_encoder) is network.encoder.stages
    assert network.get_submodule(network.key_to_stem) is network.encoder.stages[0]
    depends_on_channels = {
        name.removesuffix(".weight")
        for name, parameter in tiny(input_channels=3).named_parameters()
        if parameter.shape != network.get_parameter(name).shape
    }
    assert set(network.keys_to_in_proj) == depends_on_channels


def test_no_graph_breaks() -> None:
    for deep_supervision in (True, False):
        explanation = torch._dynamo.explain(tiny(deep_supervision=deep_supervision))(
            torch.randn(1, 1, 32, 32, 64)
        )
        assert explanation.graph_break_count == 0, explanation.break_reasons


def test_runs_in_half_precision_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = tiny()(torch.randn(1, 1, 32, 64, 32))
    assert all(
        output.dtype == torch.bfloat16 and torch.isfinite(output).all() for output in outputs
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_op": nn.Linear}, "conv_op must be torch.nn.Conv2d or torch.nn.Conv3d"),
        ({"n_stages": 1}, "n_stages must be a whole number of at least 2"),
        ({"features_per_stage": [4, 8]}, "features_per_stage must be .* 6 of them"),
        ({"strides": ISOTROPIC[:4]}, "strides must be .* 6 entries"),
        ({"strides": [[2, 2, 2]] * 6}, r"strides\[0\] must be all ones"),
        ({"kernel_sizes": 2}, "Kernel sizes must be odd"),
        (
            {"n_blocks_per_stage_decoder": [1] * 6},
            "n_blocks_per_stage_decoder must be .* 5 of them",
        ),
        ({"n_blocks_per_stage": 0}, "n_blocks_per_stage must be"),
        ({"features_per_stage": [4.5, 8, 8, 8, 8, 8]}, "features_per_stage must be .* whole"),
        ({"strides": [[1, 1, 1], [1.5, 2, 2], *ISOTROPIC[2:]]}, "strides: Expected whole numbers"),
        ({"strides": None}, "strides"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_input_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(PluginError, match=r"\[32, 32, 33\].*\[32, 32, 32\] and \[32, 32, 64\]"):
        tiny()(torch.randn(1, 1, 32, 32, 33))


def test_keys_of_other_networks_are_refused() -> None:
    assert translate_key("conv_blocks_context.5.1.conv3.bias") == "encoder.stages.5.1.shortcut.bias"
    with pytest.raises(PluginError, match=r"block1\.weight.*published STU-Net"):
        translate_state_dict({"block1.weight": 0})


@pytest.mark.parametrize("shape", [(2, 4, 5, 6, 7), (2, 4, 9, 8)])
def test_instance_norm_is_torchs_own(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = (nn.InstanceNorm3d if len(shape) == 5 else nn.InstanceNorm2d)(4, affine=True).double()
    ours = InstanceNorm(4).double()
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.bias.normal_()
    ours.load_state_dict(theirs.state_dict())
    inputs = [(torch.randn(shape, dtype=torch.float64) + 3).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [norm(x) for norm, x in zip((theirs, ours), inputs, strict=True)]
    for output in outputs:
        (
            output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(shape)
        ).sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(theirs.weight.grad, ours.weight.grad)
