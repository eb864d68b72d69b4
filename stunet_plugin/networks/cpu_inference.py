"""Prediction on the CPU: the networks' functions in another order of memory.

There, convolutions are up to three times faster with the channels last, and paging in a large new
tensor takes longer than its values. So channels stay last, feature maps go slab by slab through all
steps, and what nothing else reads is overwritten. Measurements: docs/decisions.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from stunet_plugin.networks.base_unet import BaseUNet
from stunet_plugin.networks.fmunet import ResidualLevel
from stunet_plugin.networks.pctnet import PCTBlock
from stunet_plugin.networks.preactivation_unet import Decoder, PreActivation, Stem
from stunet_plugin.networks.stunet import ResidualBlock, STUNetDecoder, activate
from stunet_plugin.networks.window_attention import WindowAttention, WindowTransformer

SLAB_ELEMENTS = 1 << 18  # one MiB of float32 fits the second-level cache
SMALLEST_IMAGE = 48**3  # voxels; below, everything is small enough as it is
SMALLEST_MAP = 16**3  # voxels; below, STU-Net's convolutions are faster with the channels first


def applies(network: nn.Module, image: Tensor) -> bool:
    """Return whether this is a prediction of a large image on the CPU in full precision.

    A trace must hold at other sizes, and hooks expect every module to be called: both take the
    plain forward, as does the compiler, which makes its own order.
    """
    if image.device.type != "cpu" or network.training or torch.is_grad_enabled():
        return False
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or _mixed_precision():
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    large = image.ndim == 5 and prod(image.shape[2:]) >= SMALLEST_IMAGE
    return large and not hooked and image.dtype in (torch.float32, torch.float64)


def _mixed_precision() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled()


def predict(network: BaseUNet, x: Tensor) -> Tensor | list[Tensor]:
    """Return ``network(x)``."""
    skips: list[Tensor] = []
    for stage in network.encoder.stages:
        x = run(stage, x)
        skips.append(x)
    x = skips.pop()
    decoder, outputs = network.decoder, []
    if isinstance(decoder, Decoder):
        x = run(decoder.bottom, x)
    for step, head in enumerate(decoder.seg_layers):
        if isinstance(decoder, STUNetDecoder):
            x = _upsample_and_join(convolve(decoder.upsample_convs[step], x), skips.pop())
            x = run(decoder.stages[step], x, True)
        else:
            parts = [skips.pop(), run(decoder.ups[step], x, True)]
            del x  # the deeper features
            x = run(decoder.blocks[step], run(decoder.merges[step], parts), True)
        if decoder.deep_supervision or not skips:
            outputs.append(run(head, x, not skips).contiguous())
    return outputs[::-1] if decoder.deep_supervision else outputs[0]


@functools.singledispatch
def run(module: Any, x: Any, overwrite: bool = False) -> Tensor:
    """Return ``module(x)``; with ``overwrite``, nothing else reads ``x`` afterwards."""
    result: Tensor = module(x)
    return result


@run.register
def _(module: nn.Sequential, x: Tensor, overwrite: bool = False) -> Tensor:
    for part in module:
        # What one part puts out, only the next one reads.
        x, overwrite = run(part, x, overwrite), True
    return x


@run.register
def _(block: ResidualBlock, x: Tensor, overwrite: bool = False) -> Tensor:
    stride: Any = block.conv1.stride
    if prod(x.shape[2:]) < SMALLEST_MAP * prod(stride):
        return block(x.contiguous())

    y = norm_and_activation([block.norm1], activate, [convolve(block.conv1, x)], overwrite=True)
    y = convolve(block.conv2, y)
    scale, shift = scale_and_shift(block.norm2, y)
    length = slab_length(y, 2)
    for start in range(0, y.shape[2], length):
        slab = y[:, :, start : start + length]
        behind = x[:, :, start * stride[0] : (start + length) * stride[0]]
        total = torch.addcmul(shift, slab, scale)
        total += convolve(block.shortcut, behind)
        slab.copy_(activate(total))
    return y


@run.register
def _(stem: Stem, x: Tensor, overwrite: bool = False) -> Tensor:
    # A clone: with one channel torch cannot tell the layouts apart and keeps the other.
    return convolve(stem, x.clone(memory_format=torch.channels_last_3d))


@run.register
def _(unit: PreActivation, x: Tensor | list[Tensor], overwrite: bool = False) -> Tensor:
    inputs = [x] if isinstance(x, Tensor) else x
    del x
    return convolve(unit.conv, norm_and_activation(list(unit.norms), unit.act, inputs, overwrite))


@run.register
def _(level: ResidualLevel, x: Tensor, overwrite: bool = False) -> Tensor:
    for unit in level.units:
        y = run(unit, x)
        y += x
        x = y
    return x


@run.register
def _(block: PCTBlock, x: Tensor, overwrite: bool = False) -> Tensor:
    y = run(block.conv, x)
    y += run(block.transformer, x)
    return y


@run.register
def _(transformer: WindowTransformer, x: Tensor, overwrite: bool = False) -> Tensor:
    x = x.movedim(1, -1).contiguous()
    block: Any
    for block in transformer.blocks:
        y = run(block.attention, block.norm1(x))
        y += x
        for slab in y.split(slab_length(y, 1), 1):
            slab += block.mlp(block.norm2(slab))
        x = y
    return x.movedim(-1, 1).contiguous()


@run.register
def _(attention: WindowAttention, x: Tensor, overwrite: bool = False) -> Tensor:
    layout = attention.layout(x)
    tokens = layout.gather(x)
    parts = tokens.split(layout.counts, 1)
    for windows, mask in zip(parts, attention.masks(layout), strict=True):
        for slab in windows.split(slab_length(windows, 1), 1):
            slab.copy_(attention.attend(slab, mask))
    return attention.proj(layout.scatter(tokens, x.shape))


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Return ``conv(x)`` with the channels last."""
    if isinstance(conv, nn.Conv3d) and conv.kernel_size == (1, 1, 1):
        # torch's convolutions have no such kernel for this layout; a matrix product is one.
        depth, height, width = conv.stride
        x = x[:, :, ::depth, ::height, ::width]
        return functional.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)
    return channels_last(conv(x))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def slab_length(x: Tensor, axis: int) -> int:
    """Return how many steps along an axis make a slab."""
    return max(SLAB_ELEMENTS * x.shape[axis] // max(x.numel(), 1), 1)


def norm_and_activation(
    norms: Sequence[nn.Module],
    act: Callable[[Tensor], Tensor],
    inputs: list[Tensor],
    overwrite: bool,
) -> Tensor:
    """Return ``act(norm(x))`` of all inputs, concatenated along the channels; empties the list.

    ``overwrite``: a single input may be overwritten with the result.
    """
    widths = [x.shape[1] for x in inputs]
    in_place = overwrite and len(inputs) == 1
    result = channels_last(inputs[0]) if in_place else _empty(inputs[0], sum(widths))
    for norm, x, place in zip(norms, inputs, result.split(widths, 1), strict=True):
        scale, shift = scale_and_shift(norm, x)
        length = slab_length(x, 2)
        for read, write in zip(x.split(length, 2), place.split(length, 2), strict=True):
            write.copy_(act(torch.addcmul(shift, read, scale)))
    inputs.clear()
    return result


def scale_and_shift(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return factor and summand of a batch or instance norm, (1 or batch, channel, 1, 1, 1)."""
    everywhere = (-1, x.shape[1], 1, 1, 1)
    if isinstance(norm, _BatchNorm):
        mean, variance = norm.running_mean, norm.running_var
    else:
        mean = x.mean((2, 3, 4))
        around, length = mean.reshape(everywhere), slab_length(x, 2)
        # In two passes: mean square minus squared mean would lose digits.
        squares = [(slab - around).square_().sum((2, 3, 4)) for slab in x.split(length, 2)]
        variance = torch.stack(squares).sum(0) / x[0, 0].numel()
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale.reshape(everywhere), (norm.bias - mean * scale).reshape(everywhere)


def _upsample_and_join(x: Tensor, skip: Tensor) -> Tensor:
    """Repeat the voxels of a coarser feature map and put a finer one behind it."""
    result = _empty(skip, x.shape[1] + skip.shape[1])
    repeated, behind = result.split([x.shape[1], skip.shape[1]], 1)
    behind.copy_(skip)
    for axis in (4, 3, 2):
        repeated = repeated.unflatten(axis, (x.shape[axis], -1))
    repeated.copy_(x[:, :, :, None, :, None, :, None])
    return result


def _empty(like: Tensor, channels: int) -> Tensor:
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last_3d)
