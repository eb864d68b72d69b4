"""What the tests of PCT-Net and FMUNet share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import cpu_inference
from stunet_plugin.networks.preactivation_unet import PreActivationUNet

SMALL: dict[str, Any] = {"features_per_stage": (4, 8, 16, 32, 64)}
"""The widths of the fixtures."""


def randomise(network: nn.Module) -> nn.Module:
    """Give parameters and running statistics values of a size that matters to the output."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    return network


def plain_network(
    name: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., nn.Module]:
    """Return the class of a plain transcription in ``benchmarks/``, by the network's name."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    found: Callable[..., nn.Module] = getattr(
        importlib.import_module(f"plain_{name.lower()}"), f"Plain{name}"
    )
    return found


def largest_differences(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any pair of outputs."""
    assert len(outputs) == len(expected)
    return max(
        (output - wanted).abs().max().item()
        for output, wanted in zip(outputs, expected, strict=True)
    )


def check_fixture(
    network: PreActivationUNet,
    fixtures: Path,
    name: str,
    prefix: str,
    translate: Callable[..., Any],
) -> None:
    """The outputs are those that were recorded of the published network, with and without
    gradients.

    Args:
        network: of the fixture's sizes.
        fixtures: folder of the recorded weights (``NAME.pt``) and outputs (``NAME.npz``).
        name, prefix: of the fixture and of its outputs.
        translate: from the published state dict to ours.
    """
    # The fixtures hold numpy scalars besides tensors and come with the project.
    published = torch.load(fixtures / f"{name}.pt", map_location="cpu", weights_only=False)[
        "model_state_dict"
    ]
    network.eval().load_state_dict(translate(published))
    recorded = np.load(fixtures / f"{name}.npz")
    expected = [torch.from_numpy(recorded[f"{prefix}output_{index}"]) for index in range(4)]
    x = torch.from_numpy(recorded["input"])
    with torch.no_grad():
        assert largest_differences(network(x), expected) <= 1e-5
        network.decoder.deep_supervision = False
        assert largest_differences([network(x)], expected[:1]) <= 1e-5
    network.decoder.deep_supervision = True
    assert largest_differences(network(x), expected) <= 1e-5


def check_slab_by_slab(
    network: PreActivationUNet,
    published: nn.Module,
    size: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    tolerance: float,
) -> None:
    """A prediction on the CPU is the plain network's, and leaves its input as it is. Both networks
    have the same weights."""
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        expected = published(x)
        assert not cpu_inference.begins(network, x)
        assert cpu_inference.begins(network, torch.empty(1, 1, 48, 48, 48))
        # As if the input were large, in many slabs.
        monkeypatch.setattr(cpu_inference, "SMALLEST_VOLUME", 0)
        monkeypatch.setattr(cpu_inference, "SLAB_ELEMENTS", 5000)
        assert largest_differences(network(x), expected) <= tolerance
        network.decoder.deep_supervision = False
        assert largest_differences([network(x)], expected[:1]) <= tolerance
    assert torch.equal(x, before)


def check_no_graph_breaks(network: PreActivationUNet, training: bool) -> None:
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        explanation = torch._dynamo.explain(network.train(training))(torch.randn(1, 1, 16, 32, 48))
    assert explanation.graph_break_count == 0, explanation.break_reasons


def check_half_precision(network: PreActivationUNet) -> None:
    """Training and a large prediction under autocast are finite."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = network(torch.randn(2, 1, 16, 32, 48))
        sum(output.float().square().mean() for output in outputs).backward()
    assert all(
        output.dtype == torch.bfloat16 and torch.isfinite(output).all() for output in outputs
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        large = network.eval()(torch.randn(1, 1, 48, 48, 48))
    assert all(torch.isfinite(output).all() for output in large)


def check_refused_inputs(network: PreActivationUNet) -> None:
    """Of mode 1: a patch that its strides do not divide, and slices."""
    with pytest.raises(PluginError, match=r"\[12, 32, 32\].*\[8, 32, 32\] and \[16, 32, 32\]"):
        network(torch.randn(1, 1, 12, 32, 32))
    with pytest.raises(PluginError, match="not 4 axes. .*STUNetTrainer for 2d"):
        network(torch.randn(1, 1, 32, 32))


def check_outputs_and_gradients(network: PreActivationUNet, size: tuple[int, ...]) -> None:
    """One output per stride but the deepest, full resolution first; a gradient for every
    parameter."""
    outputs = network(torch.randn(2, 1, *size))
    shape = list(size)
    assert len(outputs) == 4
    for output, stride in zip(outputs, network.strides[:-1], strict=True):
        shape = [extent // step for extent, step in zip(shape, stride, strict=True)]
        assert output.shape == (2, 3, *shape)
        assert output.is_contiguous()
    sum(output.square().mean() for output in outputs).backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for parameter in network.parameters()
    )


def check_interface(
    network: PreActivationUNet,
    other_channels: nn.Module,
    other_classes: nn.Module,
    size: tuple[int, ...],
) -> None:
    """Encoder, stem, heads and feature map size are where nnU-Net and loaders of pretrained weights
    look for them."""
    assert network.get_submodule(network.key_to_encoder) is network.encoder.stages
    assert network.get_submodule(network.key_to_stem) is network.encoder.stages[0]
    own = dict(network.named_parameters())

    def differing(other: nn.Module) -> set[str]:
        return {
            name
            for name, parameter in other.named_parameters()
            if parameter.shape != own[name].shape
        }

    assert differing(other_channels) == {f"{key}.weight" for key in network.keys_to_in_proj}
    assert differing(other_classes)
    assert all(".seg_layers." in name for name in differing(other_classes))
    # The norms of a head belong to it.
    assert len([name for name in own if ".seg_layers." in name]) > len(differing(other_classes))

    elements = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal elements
        elements += output[0].numel()

    layers = [
        part
        for part in network.modules()
        if isinstance(part, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear))
    ]
    attention = {id(part.qkv) for part in network.modules() if hasattr(part, "qkv")}
    for layer in layers:
        if id(layer) not in attention:
            layer.register_forward_hook(count)
    with torch.no_grad():
        for deep_supervision in (True, False):
            network.decoder.deep_supervision, elements = deep_supervision, 0
            network.eval()(torch.randn(1, 1, *size))
            expected = network.compute_conv_feature_map_size(size)
            # Attention runs on whole windows, which the count does not round up to.
            unrounded = expected - _qkv_elements(network, size)
            assert unrounded == elements


def _qkv_elements(network: PreActivationUNet, size: tuple[int, ...]) -> int:
    """Elements that the qkv layers put out, padding aside."""
    voxels, total = size[0] * size[1] * size[2], 0
    shapes = [voxels]
    for stride in network.strides[1:]:
        shapes.append(shapes[-1] // (stride[0] * stride[1] * stride[2]))
    for level, stage in enumerate(network.encoder.stages):
        total += (
            sum(part.qkv.out_features for part in stage.modules() if hasattr(part, "qkv"))
            * shapes[level]
        )
    for step, block in enumerate(network.decoder.blocks):
        total += (
            sum(part.qkv.out_features for part in block.modules() if hasattr(part, "qkv"))
            * shapes[-2 - step]
        )
    return total
