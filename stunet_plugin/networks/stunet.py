"""STU-Net: a residual U-Net with six stages whose weights never depend on the plan.

Paper: Huang et al., arXiv:2304.06716, section 3. Published code: github.com/uni-medical/STU-Net
(Apache-2.0), read for facts, not copied. The same function as published; deviations:

* The decoder convolves before it upsamples (a 1x1x1 convolution and a nearest upsampling commute),
  which saves the work and the memory of one full-resolution tensor with twice the channels.
* Any number of stages, strides and odd kernels, in 3D and 2D; published: six stages in 3D.
* Activations that no gradient needs are overwritten; activation checkpointing on request.

Axes of all tensors: (batch, channel, *spatial), spatial in nnU-Net's order after its transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.activation_checkpointing import OFF, SETTINGS, STAGE, checkpointed
from stunet_plugin.networks.base_unet import (
    NEGATIVE_SLOPE,
    BaseUNet,
    Encoder,
    InstanceNorm,
    check_integer,
    per_stage,
)
from stunet_plugin.networks.topology import Strides, as_strides


def activate(x: Tensor) -> Tensor:
    """LeakyReLU that overwrites its input."""
    return functional.leaky_relu_(x, NEGATIVE_SLOPE)


class ResidualBlock(nn.Module):
    """conv - norm - LeakyReLU - conv - norm, plus the shortcut, then LeakyReLU.

    Where it is projected (first block of a stage, even where nothing changes), the shortcut is a
    strided convolution of kernel size 1 with a bias and no norm, otherwise the identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        conv_op: type[_ConvNd],
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        project_shortcut: bool,
    ) -> None:
        super().__init__()
        conv: Any = conv_op
        padding = tuple(size // 2 for size in kernel_size)
        self.conv1 = conv(in_channels, out_channels, kernel_size, stride, padding)
        self.norm1 = InstanceNorm(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size, 1, padding)
        self.norm2 = InstanceNorm(out_channels)
        self.shortcut = (
            conv(in_channels, out_channels, 1, stride) if project_shortcut else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        # In place is safe: instance norm keeps its input, not its output, and LeakyReLU's gradient
        # needs its result alone.
        y = activate(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return activate(y)


class ResidualStage(nn.Sequential):
    """The blocks of one stage: the first strides and projects its shortcut."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_blocks: int,
        conv_op: type[_ConvNd],
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        same = channels, channels, conv_op, kernel_size, (1,) * len(stride), False
        super().__init__(
            ResidualBlock(in_channels, channels, conv_op, kernel_size, stride, True),
            *(ResidualBlock(*same) for _ in range(num_blocks - 1)),
        )
        self.checkpointing = OFF

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing == OFF:
            return super().forward(x)
        return self.checkpointed(lambda x: x, x)

    def checkpointed(self, enter: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return the output for ``enter(*inputs)``, keeping ``inputs``, and with BLOCK each block's
        output."""
        blocks: list[Any] = [super().forward] if self.checkpointing == STAGE else list(self)
        first, *others = blocks
        x = checkpointed(self, lambda *given: first(enter(*given)), *inputs, random=False)
        for block in others:
            x = checkpointed(block, block, x, random=False)
        return x


class STUNetDecoder(nn.Module):
    """Upsampling steps to full resolution, with a segmentation head after each.

    Attributes:
        deep_supervision: return all heads' outputs (a list, full resolution first) or the
            full-resolution one. All are always built, so that one checkpoint serves both.
        seg_layers: deepest first; stock ``-pretrained_weights`` skips keys with ``.seg_layers.``.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        n_blocks_per_stage: tuple[int, ...],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.num_classes = num_classes
        conv_op: Any = encoder.conv_op
        below, skip = encoder.output_channels[:0:-1], encoder.output_channels[-2::-1]
        no_stride = (1,) * len(encoder.strides[0])
        self.upsample_convs = nn.ModuleList(
            conv_op(*channels, 1) for channels in zip(below, skip, strict=True)
        )
        self.stages = nn.ModuleList(
            ResidualStage(2 * channels, channels, blocks, conv_op, kernel_size, no_stride)
            for channels, blocks, kernel_size in zip(
                skip, n_blocks_per_stage, encoder.kernel_sizes[-2::-1], strict=True
            )
        )
        self.seg_layers = nn.ModuleList(conv_op(channels, num_classes, 1) for channels in skip)

    def forward(self, skips: list[Tensor]) -> Tensor | list[Tensor]:
        """The encoder's outputs (the list is emptied) to (batch, num_classes, *spatial), or a list
        of them."""
        x = skips.pop()
        outputs: list[Tensor] = []
        stage: Any
        for upsample, stage, head in zip(
            self.upsample_convs, self.stages, self.seg_layers, strict=True
        ):
            join = functools.partial(_upsample_and_join, upsample)
            if stage.checkpointing == OFF:
                x = join(x, skips.pop())
                x = stage(x)
            else:
                # With the concatenation, which repeats what is kept anyway.
                x = stage.checkpointed(join, x, skips.pop())
            if self.deep_supervision or not skips:
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


def _upsample_and_join(conv: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    # Convolve first, then repeat voxels: the same function as the other way round, for less.
    x = functional.interpolate(conv(x), size=skip.shape[2:], mode="nearest")
    return torch.cat((x, skip), dim=1)


class STUNet(BaseUNet):
    """The network. A plans file can name it by its dotted path
    ``stunet_plugin.networks.stunet.STUNet``.

    ``features_per_stage``, ``kernel_sizes`` (odd), ``strides`` (the first all ones) and
    ``n_blocks_per_stage`` are of each stage, full resolution first, the decoder's blocks deepest
    first; one number stands for all. ``conv_op`` is ``nn.Conv3d`` or ``nn.Conv2d``.

    Input (batch, input_channels, *spatial), each spatial size divisible by the product of the
    strides. Output (batch, num_classes, *spatial), or with deep supervision a list of them, one per
    decoder stage, full resolution first. Arguments that do not fit together are a ValueError.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: type[_ConvNd],
        kernel_sizes: int | Sequence[int] | Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        n_blocks_per_stage: int | Sequence[int],
        n_blocks_per_stage_decoder: int | Sequence[int],
        deep_supervision: bool = False,
    ) -> None:
        in_proj = "encoder.stages.0.0.conv1", "encoder.stages.0.0.shortcut"
        super().__init__(input_channels, num_classes, in_proj)
        if conv_op not in (nn.Conv2d, nn.Conv3d):
            raise ValueError(f"conv_op must be torch.nn.Conv2d or torch.nn.Conv3d, not {conv_op}.")
        dimensions = convert_conv_op_to_dim(conv_op)
        check_integer("n_stages", n_stages, 2)
        features = per_stage("features_per_stage", features_per_stage, n_stages)
        blocks = per_stage("n_blocks_per_stage", n_blocks_per_stage, n_stages)
        decoder_blocks = per_stage(
            "n_blocks_per_stage_decoder", n_blocks_per_stage_decoder, n_stages - 1
        )
        self.strides = _per_axis("strides", strides, n_stages, dimensions)
        kernels = _per_axis("kernel_sizes", kernel_sizes, n_stages, dimensions)
        if any(step != 1 for step in self.strides[0]):
            raise ValueError(f"strides[0] must be all ones, not {self.strides[0]}.")
        if any(size % 2 == 0 for kernel in kernels for size in kernel):
            raise ValueError(f"Kernel sizes must be odd so that shapes are kept, not {kernels}.")

        inputs = (input_channels, *features[:-1])
        stages = map(
            ResidualStage, inputs, features, blocks, [conv_op] * n_stages, kernels, self.strides
        )
        self.encoder = Encoder(stages, features, conv_op, kernels, self.strides)
        self.decoder = STUNetDecoder(self.encoder, num_classes, decoder_blocks, deep_supervision)

    @property
    def checkpointing(self) -> str:
        """One of ``activation_checkpointing.SETTINGS``: what the backward pass computes again, for
        the same gradients; no part of a state dict."""
        return str(self.encoder.stages[0].checkpointing)

    @checkpointing.setter
    def checkpointing(self, setting: str) -> None:
        if setting not in SETTINGS:
            allowed = ", ".join(SETTINGS)
            raise ValueError(f"checkpointing must be one of {allowed}, not {setting!r}.")
        for stage in (*self.encoder.stages, *self.decoder.stages):
            stage.checkpointing = setting


def _per_axis(
    name: str, value: int | Sequence[int] | Sequence[Sequence[int]], count: int, dimensions: int
) -> Strides:
    """Return tuples per stage and axis of one number for all, numbers of stages, or both."""
    stages: Sequence[Any] = [value] * count if isinstance(value, int) else value
    try:
        full = as_strides(
            [(entry,) * dimensions if isinstance(entry, int) else entry for entry in stages]
        )
    except (TypeError, PluginError) as error:
        raise ValueError(f"{name}: {error}") from error
    if len(full) != count or len(full[0]) != dimensions:
        raise ValueError(
            f"{name} must be a positive integer, or {count} entries of {dimensions} each, not"
            f" {value!r}."
        )
    return full
