"""SPM, shape prior module: coarse maps of each class that refine, and are refined by, the skips.

Paper: You et al., arXiv:2303.17967. Published code: github.com/AlexYouXin/Explicit-Shape-Priors (no
licence), read for facts, not copied. With ``affinity: published``, ``norm: batch`` and ``gate:
false`` the same function as published; otherwise, and besides, deviations:

* For the skips of any U-Net, in 2D too; published: 3D, for a network of its own.
* The affinity is divided by the root of the voxels, not of the classes: as published its softmax
  picks one class from the first step on. It is computed in float32: in half precision it overflows.
* A gate per channel, zero at first: a pretrained network starts as it was.
* Instance norm, as batches are small. The last refined prior, which nothing reads, is not computed.
* Convolutions start as the network's do (He), not as torch's.

"Prior" is the paper's word: what is learned is a start value, the same for all images.

Axes: skips (batch, channel, *spatial), priors (batch, class, cell of the coarse grid).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.activation_checkpointing import checkpointed
from stunet_plugin.networks.base_unet import InstanceNorm
from stunet_plugin.networks.global_receptive_conv import largest_grid
from stunet_plugin.networks.topology import Strides, stage_shapes, total_stride
from stunet_plugin.utils.validation import Fields

SKIPS, DEEPEST_STRIDE, MOST_CELLS = 3, 16, 1024
"""Skips with a prior and the stride of its grid, as published; a prior has P^2 weights."""
HEADS, HIDDEN, DROPOUT, BLOCKS = 8, 768, 0.1, 2
INSTANCE, BATCH = "instance", "batch"
VOXEL, PUBLISHED = "voxel", "published"
_LINEAR = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class SPM:
    """The shape priors of a network; an entry of plans."""

    stages: tuple[int, ...]
    grid: tuple[int, ...]
    heads: int
    hidden: int
    dropout: float
    norm: str
    affinity: str
    gate: bool
    prior: bool
    checkpoint: bool

    name: ClassVar = "spm"
    title: ClassVar = "explicit shape priors (SPM)"

    @classmethod
    def complete(cls, network: Any, strides: Strides, patch: Sequence[int], given: Fields) -> SPM:
        """Return the option for a network, which may be on the meta device; what is ``given`` are
        its attributes."""
        given.only(*cls.__dataclass_fields__)
        shapes = stage_shapes(patch, strides)
        totals = [max(total_stride(strides[: stage + 1])) for stage in range(len(strides))]
        coarse = next((i for i, x in enumerate(totals) if x >= DEEPEST_STRIDE), len(totals) - 1)
        grid = largest_grid(shapes[coarse], max(shapes[coarse]), MOST_CELLS)
        grid = given.positives("grid", len(patch), whole=True, default=grid)
        last = len(shapes) - 2
        # Of stages of one resolution the deepest; the full one has none, as published.
        skips = {shapes[stage]: stage for stage in range(last + 1) if shapes[stage] != shapes[0]}
        finer = [stage for shape, stage in skips.items() if _divides(grid, shape)]
        stages = given.integers("stages", last, tuple(finer[-SKIPS:]))
        for stage in stages:
            if not _divides(grid, shapes[stage]):
                raise given.wrong("grid", f"divisors of stage {stage}, {list(shapes[stage])}")
        if not stages:
            raise PluginError(
                f"{given.where}: no skip of {list(map(list, shapes[:-1]))} voxels fits a grid of"
                f" {list(grid)}. Name stages and a grid that divides them, or another patch size."
            )
        cells = prod(grid)
        heads = given.integer("heads", 1, largest_grid((cells,), HEADS, HEADS)[0])
        if cells % heads:
            raise given.wrong("heads", f"a divisor of the {cells} cells of the grid")
        dropout = given.number("dropout", DROPOUT)
        if not 0 <= dropout < 1:
            raise given.wrong("dropout", "0 or more, and below 1")
        return cls(
            stages,
            grid,
            heads,
            given.integer("hidden", 1, HIDDEN),
            dropout,
            given.choice("norm", (INSTANCE, BATCH), INSTANCE),
            given.choice("affinity", (VOXEL, PUBLISHED), VOXEL),
            given.boolean("gate", True),
            given.boolean("prior", True),
            given.boolean("checkpoint", False),
        )

    def add_to(self, network: Any, strides: Strides, patch: Sequence[int], classes: int) -> None:
        """Put the module between encoder and decoder, in place."""
        if not hasattr(network, "shape_priors"):
            raise PluginError(
                "SPM is for STU-Net, PlainConvUNet, ResidualEncoderUNet, PCT-Net and FMUNet, not"
                f" for {type(network).__name__}."
            )
        encoder, shapes = network.encoder, stage_shapes(patch, strides)
        sizes = [(encoder.output_channels[stage], shapes[stage]) for stage in self.stages]
        network.shape_priors = ShapePriors(self, sizes, classes, encoder.conv_op)

    def describe(self) -> str:
        what = "priors" if self.prior else "convolutions alone, without a prior,"
        grid, stages = "x".join(map(str, self.grid)), ", ".join(map(str, self.stages))
        start = "start as the identity" if self.gate else "start at random"
        return f"SPM: {what} of {grid} cells on the skips of stages {stages}; they {start}"


def _divides(grid: Sequence[int], shape: Sequence[int]) -> bool:
    return all(size % cells == 0 for size, cells in zip(shape, grid, strict=True))


class ResidualUnit(nn.Module):
    """conv 1 - norm - ReLU - conv 3 - norm - ReLU, plus conv 1 - norm, then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, conv: Any, norm: Any) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 1, bias=False)
        self.norm1 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = norm(out_channels)
        self.shortcut = conv(in_channels, out_channels, 1, bias=False)
        self.shortcut_norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        return functional.relu(y + self.shortcut_norm(self.shortcut(x)))


class PriorBlock(nn.Module):
    """A transformer block whose tokens are the classes, and whose embedding is the coarse grid."""

    def __init__(self, classes: int, cells: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(cells, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(cells, cells) for _ in range(4))
        self.class_bias = nn.Parameter(torch.randn(1, heads, classes, classes))
        self.norm2 = nn.LayerNorm(cells, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(cells, hidden), nn.Linear(hidden, cells)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, prior: Tensor) -> Tensor:
        x = self.norm1(prior)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # The bias is added before the scaling, as published.
        bias = (self.class_bias * q.shape[-1] ** -0.5).to(q.dtype)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        prior = prior + self.out(mixed.transpose(1, 2).flatten(-2))
        x = self.dropout(functional.gelu(self.fc1(self.norm2(prior))))
        return prior + self.dropout(self.fc2(x))


class ShapePriorBlock(nn.Module):
    """One skip: the prior updates itself, then the skip, then itself by the skip.

    ``last``: nothing reads the refined prior.
    """

    def __init__(
        self, option: SPM, channels: int, shape: Sequence[int], classes: int, conv: Any, last: bool
    ) -> None:
        super().__init__()
        axes, cells = len(shape), prod(option.grid)
        batch_norm: Any = nn.BatchNorm2d if axes == 2 else nn.BatchNorm3d
        norm = batch_norm if option.norm == BATCH else InstanceNorm
        self.shape, self.grid, self.mode = tuple(shape), option.grid, _LINEAR[axes]
        self.scale = (classes if option.affinity == PUBLISHED else prod(shape)) ** -0.5
        self.units = nn.Sequential(*(ResidualUnit(channels, channels, conv, norm) for _ in "12"))
        self.update = self.refine = None
        if option.prior:
            sizes = classes, cells, option.heads, option.hidden, option.dropout
            blocks = (PriorBlock(*sizes) for _ in range(BLOCKS))
            self.update = nn.Sequential(*blocks, nn.LayerNorm(cells, eps=1e-6))
            self.refine = None if last else ResidualUnit(channels, classes, conv, norm)
        self.gate = nn.Parameter(torch.zeros(channels, *(1,) * axes)) if option.gate else None

    def forward(self, skip: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        if skip.shape[2:] != self.shape:
            raise PluginError(
                f"Shape priors belong to one patch size: a skip has {list(skip.shape[2:])} voxels"
                f" where the plan's patch has {list(self.shape)}. Give the network images of the"
                " plan's patch size, as nnU-Net does."
            )
        features = self.units(skip)
        if self.update is not None:
            prior = self.update(prior)
            maps = prior.unflatten(-1, self.grid)
            maps = functional.interpolate(maps, self.shape, mode=self.mode)
            features = self._cross_update(features, maps)
            if self.refine is not None:
                local = functional.interpolate(self.refine(features), self.grid, mode=self.mode)
                prior = prior + local.flatten(2)
        if self.gate is not None:
            features = skip + self.gate * (features - skip)
        return features, prior

    def _cross_update(self, features: Tensor, maps: Tensor) -> Tensor:
        """Add to each channel a mixture of the class maps, by its affinity to each."""
        kind = features.device.type
        # A sum over all voxels, which half precision does not hold.
        exact = torch.autocast(kind, enabled=False) if kind != "meta" else contextlib.nullcontext()
        with exact:
            voxels, priors = features.flatten(2).float(), maps.flatten(2).float()
            affinity = (voxels @ priors.transpose(1, 2) * self.scale).softmax(-1)
            mixed = (affinity @ priors).view(features.shape)
            return features + mixed.to(features.dtype)


class ShapePriors(nn.Module):
    """The skips of a U-Net (a list, full resolution first) to refined ones; ``sizes`` are channels
    and voxels of the option's stages."""

    def __init__(
        self,
        option: SPM,
        sizes: Sequence[tuple[int, Sequence[int]]],
        classes: int,
        conv: type[nn.Module],
    ) -> None:
        super().__init__()
        self.stages, self.checkpoint = option.stages[::-1], option.checkpoint
        cells = prod(option.grid)
        self.start = nn.Parameter(torch.randn(1, classes, cells)) if option.prior else None
        self.blocks = nn.ModuleList(
            ShapePriorBlock(option, *size, classes, conv, last=size is sizes[0])
            for size in sizes[::-1]
        )

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        refined, batch = list(skips), len(skips[0])
        start = self.start
        prior = skips[0].new_zeros(batch, 1, 1) if start is None else start.expand(batch, -1, -1)
        for stage, block in zip(self.stages, self.blocks, strict=True):
            if self.checkpoint and self.training:
                found: Any = checkpointed(block, block, refined[stage], prior)
            else:
                found = block(refined[stage], prior)
            refined[stage], prior = found
        return refined
