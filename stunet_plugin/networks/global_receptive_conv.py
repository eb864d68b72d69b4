"""GRC, global receptive convolution: a convolution that also sees far away, without a parameter.

Paper: Ren et al., FCN+, arXiv:2303.04589. Published code: github.com/Zhongying-Deng/FCN_Plus
(Apache-2.0), read for facts, not copied. The same function as published in 2D; deviations:

* In 3D too, and with another number of blocks on each axis.
* A convolution keeps its names and shapes, so weights of the plain network load as they are.
* A grid that shifts nothing is refused, not silently the identity.

The map is cut into equal blocks, numbered in raster order, and the last channels into as many
groups; group t takes block j + t (modulo their number) in the place of block j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.topology import Strides, stage_shapes
from stunet_plugin.utils.validation import Fields

GRID, PORTION, STAGES = 4, 0.5, 2
"""Blocks per axis and share of shifted channels as published; the number of deepest stages (there
the last of a ResNet)."""


def shifted_groups(channels: int, portion: float, grid: Sequence[int]) -> int:
    """Return the channels of each of the shifted groups; 0 where there are more groups."""
    return int(portion * channels) // prod(grid)


def shift_blocks(x: Tensor, grid: Sequence[int], portion: float = PORTION) -> Tensor:
    """Return a map (batch, channel, *spatial) whose last channels are shifted by whole blocks."""
    blocks, (batch, channels, *shape) = prod(grid), x.shape
    width = shifted_groups(channels, portion, grid)
    if not width:
        return x
    if any(size % count for size, count in zip(shape, grid, strict=True)):
        raise PluginError(
            f"GRC cuts maps into {'x'.join(map(str, grid))} blocks, which a map of {shape} voxels"
            " does not divide into. Give the network images of its plan's patch size."
        )
    axes = range(len(grid))
    cut = [(count, size // count) for count, size in zip(grid, shape, strict=True)]
    sizes = [size for pair in cut for size in pair]
    kept, moved = x[:, : channels - blocks * width], x[:, channels - blocks * width :]
    # (batch, group, channel, block and voxel of each axis) to (batch, group * block, the rest)
    moved = moved.reshape(batch, blocks, width, *sizes)
    order = [0, 1, *(3 + 2 * axis for axis in axes), 2, *(4 + 2 * axis for axis in axes)]
    rest = [width, *(voxels for _, voxels in cut)]
    moved = moved.permute(order).reshape(batch, blocks * blocks, prod(rest))
    number = torch.arange(blocks, device=x.device)
    sources = number[:, None] * blocks + (number[:, None] + number) % blocks
    moved = moved.index_select(1, sources.flatten())
    moved = moved.view(batch, blocks, *grid, *rest)
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat((kept, moved.permute(back).reshape(batch, -1, *shape)), dim=1)


class _ShiftsBlocks:
    """Comes before a convolution among the bases."""

    grid: tuple[int, ...]
    portion: float

    def forward(self, x: Tensor) -> Tensor:
        shifted = shift_blocks(x, self.grid, self.portion)
        return super().forward(shifted)  # type: ignore[misc]

    def extra_repr(self) -> str:
        plain = super().extra_repr()  # type: ignore[misc]
        return f"{plain}, grid={self.grid}, portion={self.portion}"


class GRC2d(_ShiftsBlocks, nn.Conv2d):
    """A shift of blocks, then the convolution."""


class GRC3d(_ShiftsBlocks, nn.Conv3d):
    """A shift of blocks, then the convolution."""


def as_grc(conv: Any, grid: Sequence[int], portion: float) -> _ConvNd:
    """Return a convolution with a shift in front of it; the parameters are the same objects."""
    kind = GRC3d if isinstance(conv, nn.Conv3d) else GRC2d
    settings = conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None
    with torch.device("meta"):
        made = kind(conv.in_channels, conv.out_channels, conv.kernel_size, *settings)
    made.weight, made.bias = conv.weight, conv.bias
    made.grid, made.portion = tuple(grid), portion
    return made


@dataclass(frozen=True)
class GRC:
    """Which stages of an encoder are shifted, deepest last, and how; an entry of plans."""

    portion: float
    stages: tuple[int, ...]
    grids: tuple[tuple[int, ...], ...]

    name: ClassVar = "grc"
    title: ClassVar = "global receptive convolutions (GRC)"

    @classmethod
    def complete(cls, network: Any, strides: Strides, patch: Sequence[int], given: Fields) -> GRC:
        """Return the option for a network, which may be on the meta device; what is ``given`` are
        its attributes, or ``grid``, the most blocks per axis, in place of ``grids``."""
        given.only("portion", "stages", "grids", "grid")
        portion = given.number("portion", PORTION)
        if not 0 < portion <= 1:
            raise given.wrong("portion", "above 0 and at most 1; a plain network shifts none")
        shapes = stage_shapes(patch, strides)
        rooms = [_room(stage, portion) for stage in network.encoder.stages]
        if "grids" in given:
            stages = given.integers("stages", len(shapes) - 1)
            grids = Fields({"grids": given.get("grids")}, given.where).strides("grids", len(patch))
            if len(grids) != len(stages):
                raise given.wrong("grids", f"one per stage {list(stages)}")
        else:
            most = given.integer("grid", 2, GRID)
            chosen = [
                largest_grid(shape, most, room) for shape, room in zip(shapes, rooms, strict=True)
            ]
            deepest = [stage for stage, grid in enumerate(chosen) if prod(grid) > 1][-STAGES:]
            stages = given.integers("stages", len(shapes) - 1, tuple(deepest))
            grids = tuple(chosen[stage] for stage in stages)
        for stage, grid in zip(stages, grids, strict=True):
            divides = all(x % y == 0 for x, y in zip(shapes[stage], grid, strict=True))
            if not divides or not 1 < prod(grid) <= rooms[stage]:
                raise PluginError(
                    f"{given.where}: GRC would shift nothing, or cannot, in stage {stage} with"
                    f" {'x'.join(map(str, grid))} blocks: its map has {list(shapes[stage])} voxels,"
                    f" and portion {portion:g} of its channels allows {rooms[stage]} blocks. Choose"
                    " other stages, another portion, or a patch size with more divisors."
                )
        if not stages:
            raise PluginError(
                f"{given.where}: no stage can be cut into blocks for GRC. The maps have"
                f" {list(map(list, shapes))} voxels; portion {portion:g} of the channels that"
                f" convolutions without a stride take in allows {rooms} blocks. Choose another"
                " portion, or a patch size with more divisors."
            )
        return cls(portion, stages, grids)

    def add_to(self, network: Any, *_: Any) -> None:
        """Put the shifts into a network, in place."""
        for stage, grid in zip(self.stages, self.grids, strict=True):
            module = network.encoder.stages[stage]
            shifted = {conv: as_grc(conv, grid, self.portion) for conv in _convolutions(module)}
            # nnU-Net's blocks hold a convolution under two names.
            for parent in list(module.modules()):
                for key, child in list(parent._modules.items()):
                    if child in shifted:
                        parent._modules[key] = shifted[child]

    def describe(self) -> str:
        blocks = ", ".join(
            f"{'x'.join(map(str, grid))} blocks in stage {stage}"
            for stage, grid in zip(self.stages, self.grids, strict=True)
        )
        return f"GRC: {self.portion:g} of the channels shifted by {blocks} of the encoder"


def largest_grid(shape: Sequence[int], most: int, room: int) -> tuple[int, ...]:
    """Return per axis the largest number of blocks, up to ``most``, that divides the map; the
    finest axis first gets fewer where there are more blocks than ``room``."""

    def divisor(size: int, limit: int) -> int:
        return next(count for count in range(limit, 0, -1) if size % count == 0)

    grid = [divisor(size, most) for size in shape]
    while prod(grid) > max(room, 1):
        axis = grid.index(max(grid))
        grid[axis] = divisor(shape[axis], grid[axis] - 1)
    return tuple(grid)


def _convolutions(stage: Any) -> list[Any]:
    """Return the convolutions that a shift may precede: those that look at neighbours at the
    stage's own resolution; of a residual block the second, as published."""
    firsts = {
        conv
        for block in stage.modules()
        if hasattr(block, "conv1") and hasattr(block, "conv2")
        for conv in block.conv1.modules()
    }
    return [
        conv
        for conv in stage.modules()
        if isinstance(conv, (nn.Conv2d, nn.Conv3d))
        and max(conv.kernel_size) > 1 == max(conv.stride)
        and conv not in firsts
    ]


def _room(stage: Any, portion: float) -> int:
    """Return how many blocks the channels of a stage allow."""
    return min((int(portion * conv.in_channels) for conv in _convolutions(stage)), default=0)
