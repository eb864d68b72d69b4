"""What the tests of PCT-Net and FMUNet share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stunet_plugin.networks.preactivation import PreActivationUNet

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


def largest_differences(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any pair of outputs."""
    assert len(outputs) == len(expected)
    return max((output - wanted).abs().max().item() for output, wanted in zip(outputs, expected, strict=True))


def check_outputs_and_gradients(network: PreActivationUNet, size: tuple[int, ...]) -> None:
    """One output per stride but the deepest, full resolution first; a gradient for every parameter."""
    outputs = network(torch.randn(2, 1, *size))
    shape = list(size)
    assert len(outputs) == 4
    for output, stride in zip(outputs, network.strides[:-1], strict=True):
        shape = [extent // step for extent, step in zip(shape, stride, strict=True)]
        assert output.shape == (2, 3, *shape)
        assert output.is_contiguous()
    sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def check_interface(
    network: PreActivationUNet, other_channels: nn.Module, other_classes: nn.Module, size: tuple[int, ...]
) -> None:
    """Encoder, stem, heads and feature map size are where nnU-Net and loaders of pretrained weights look for them."""
    assert network.get_submodule(network.key_to_encoder) is network.encoder.stages
    assert network.get_submodule(network.key_to_stem) is network.encoder.stages[0]
    own = dict(network.named_parameters())

    def differing(other: nn.Module) -> set[str]:
        return {name for name, parameter in other.named_parameters() if parameter.shape != own[name].shape}

    assert differing(other_channels) == {f"{key}.weight" for key in network.keys_to_in_proj}
    assert differing(other_classes)
    assert all(".seg_layers." in name for name in differing(other_classes))
    # The norms of a head belong to it.
    assert len([name for name in own if ".seg_layers." in name]) > len(differing(other_classes))

    elements = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal elements
        elements += output[0].numel()

    layers = [part for part in network.modules() if isinstance(part, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear))]
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
        total += sum(part.qkv.out_features for part in stage.modules() if hasattr(part, "qkv")) * shapes[level]
    for step, block in enumerate(network.decoder.blocks):
        total += sum(part.qkv.out_features for part in block.modules() if hasattr(part, "qkv")) * shapes[-2 - step]
    return total
