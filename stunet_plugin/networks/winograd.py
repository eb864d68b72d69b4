"""Convolutions of kernel size 3 with two thirds of the multiplications, for predictions on the CPU.

Two neighbouring outputs of a convolution with three taps are six products; they can be had from
four (minimal filtering, Winograd 1980; for networks Lavin and Gray, arXiv:1509.09308): transform
    the four inputs and the three taps, multiply, transform back.
Here along the first axis alone: what is left are four convolutions of the other two axes, which
    torch runs as fast as any,
and transforms that add few operations. The transforms follow from four points, of which the last is
infinity. More points save more, but round worse; with these, results are as near to a float64 run
as torch's own (docs/decisions.md).

Axes of feature maps: (batch, channel, depth, height, width).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.networks import cpu_inference

POINTS = (0.0, 1.0, -1.0)
TAPS = 3
INPUTS = len(POINTS) + 1
OUTPUTS = INPUTS - TAPS + 1

FEWEST_CHANNELS = 32
"""Below, transforms take longer than the multiplications that they save."""
FEWEST_VOXELS = 16**3
"""Below, reading the weights takes longest, and there are twice as many of them."""
SLAB_ELEMENTS = 1 << 20


class Transforms(NamedTuple):
    """Matrices: of inputs (4, 4), taps (4, 3) and products (2, 4)."""

    inputs: Tensor
    taps: Tensor
    products: Tensor


@functools.cache
def transforms() -> Transforms:
    """Make the matrices from the points, in float64.

    Multiplying polynomials by way of their values at the points, with the inverse of the
    Vandermonde matrix to go back, transposes to filtering.
    """
    with torch.device("cpu"):
        points = torch.tensor(POINTS, dtype=torch.float64)
        values = torch.zeros(INPUTS, INPUTS, dtype=torch.float64)
        values[:-1] = points[:, None] ** torch.arange(INPUTS)
        values[-1, -1] = 1
        taps, products = values[:, :TAPS].clone(), values[:, :OUTPUTS].clone()
        taps[-1, -1] = products[-1, -1] = 1
        # A factor per point may be on either side; so the inputs' side has the shorter numbers.
        differences = points[:, None] - points + torch.eye(len(POINTS), dtype=torch.float64)
        factors = torch.cat([differences.prod(1), torch.ones(1, dtype=torch.float64)])[:, None]
        return Transforms(
            (torch.linalg.inv(values).T * factors).round(decimals=12),
            taps / factors,
            products.T.contiguous(),
        )


def fits(conv: nn.Module, x: Tensor) -> bool:
    """Return whether a convolution of this feature map takes less time this way."""
    return (
        isinstance(conv, nn.Conv3d)
        and conv.kernel_size == (TAPS,) * 3
        and conv.stride == conv.padding == conv.dilation == (1, 1, 1)
        and conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS
        and x.shape[2] % OUTPUTS == 0
        and x[0, 0].numel() >= FEWEST_VOXELS
    )


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Return ``conv(x)`` for a prediction on the CPU, channels last in and out."""
    if not isinstance(conv, nn.Conv3d) or not fits(conv, x):
        return cpu_inference.convolve(conv, x)
    matrices = Transforms(*(matrix.to(x.dtype) for matrix in transforms()))
    taps = torch.einsum(
        "kd,oidhw->koihw", transforms().taps.to(conv.weight.dtype), conv.weight
    ).contiguous()
    shape = (x.shape[0], conv.out_channels, *x.shape[2:])
    result = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last_3d)
    for sample, place in zip(x, result, strict=True):
        # With the channels last, planes along the depth lie in one piece each: (depth, height,
        # width, channel).
        _filter(sample.movedim(0, -1), taps, conv.bias, place.movedim(0, -1), matrices)
    return result


def _filter(
    x: Tensor, taps: Tensor, bias: Tensor | None, result: Tensor, matrices: Transforms
) -> None:
    """Write the convolution of one sample to ``result``, a few pairs of planes at a time, which fit
    the cache."""
    depth, *plane = x.shape
    at_once = (
        max(SLAB_ELEMENTS // (plane[0] * plane[1] * max(plane[2], result.shape[-1])) // OUTPUTS, 1)
        * OUTPUTS
    )
    for start in range(0, depth, at_once):
        stop = min(start + at_once, depth)
        # One plane more on either side, zeros where there is none.
        before, after = start - 1, stop + 1
        given = functional.pad(
            x[max(before, 0) : after], (*[0] * 6, int(before < 0), int(after > depth))
        )
        groups = (stop - start) // OUTPUTS
        inputs = torch.stack([given[first::OUTPUTS][:groups] for first in range(INPUTS)])
        inputs = (matrices.inputs @ inputs.flatten(1)).view(INPUTS, groups, *plane)
        products = x.new_empty(INPUTS, groups, *result.shape[1:])
        for product, part, tap in zip(products, inputs, taps, strict=True):
            product.copy_(functional.conv2d(part.movedim(-1, 1), tap, padding=1).movedim(1, -1))
        outputs = (matrices.products @ products.flatten(1)).view(OUTPUTS, groups, *result.shape[1:])
        place = result[start:stop].unflatten(0, (groups, OUTPUTS))
        if bias is None:
            place.copy_(outputs.transpose(0, 1))
        else:
            torch.add(outputs.transpose(0, 1), bias, out=place)
