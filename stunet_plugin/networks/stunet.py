"""STU-Net: a residual U-Net with six stages whose weights never depend on the plan.

Paper: Huang et al., arXiv:2304.06716, section 3. Published code: github.com/uni-medical/STU-Net
(Apache-2.0), read for facts, not copied. The same function as published; deviations:

* The decoder convolves before it upsamples (a 1x1x1 convolution and a nearest upsampling commute),
  which saves the work and the memory of one full-resolution tensor with twice the channels.
* Any number of stages, strides and odd kernels, in 3D and 2D; published: six stages in 3D.
* Activations that no gradient needs are overwritten in place (``residual_block``).
* Activation checkpointing by stage or by block (``STUNet.checkpointing``).

Axes of all tensors: (batch, channel, *spatial), spatial in nnU-Net's order after its transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod

import torch
from dynamic_network_architectures.architectures.abstract_arch import (
    AbstractDynamicNetworkArchitectures,
)
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.activation_checkpointing import OFF, SETTINGS
from stunet_plugin.networks.residual_block import (
    NEGATIVE_SLOPE,
    ConvOp,
    checkpoint_stage,
    residual_stage,
)
from stunet_plugin.networks.topology import Strides, as_strides, check_patch_size, stage_shapes


def _unchanged(x: Tensor) -> Tensor:
    return x


class STUNetEncoder(nn.Module):
    """Residual stages, the first at full resolution."""

    def __init__(
        self,
        input_channels: int,
        features_per_stage: tuple[int, ...],
        conv_op: ConvOp,
        kernel_sizes: Strides,
        strides: Strides,
        n_blocks_per_stage: tuple[int, ...],
    ) -> None:
        super().__init__()
        # Named as in dynamic_network_architectures' encoders, where decoders and tools look for
        # them.
        self.conv_op = conv_op
        self.output_channels = features_per_stage
        self.kernel_sizes = kernel_sizes
        self.strides = strides
        inputs = (input_channels, *features_per_stage[:-1])
        self.stages = nn.ModuleList(
            residual_stage(*arguments[:3], conv_op, *arguments[3:])
            for arguments in zip(
                inputs, features_per_stage, n_blocks_per_stage, kernel_sizes, strides, strict=True
            )
        )

    def forward(self, x: Tensor, checkpointing: str = OFF) -> list[Tensor]:
        """(batch, input_channels, *spatial) to the output of every stage, full resolution first:
        (batch, features of the stage, *spatial / its strides so far)."""
        skips = []
        for stage in self.stages:
            if checkpointing == OFF:
                x = stage(x)
            else:
                x = checkpoint_stage(stage, checkpointing, _unchanged, x)
            skips.append(x)
        return skips


class STUNetDecoder(nn.Module):
    """Upsampling steps from the deepest stage to full resolution, with a segmentation head after
    each.

    Attributes:
        deep_supervision: return all heads' outputs (a list, full resolution first) or the
            full-resolution one alone. All heads are always built, so that one checkpoint serves
            both.
        seg_layers: the heads, deepest first; stock ``-pretrained_weights`` skips keys with
            ``.seg_layers.``.
    """

    def __init__(
        self,
        encoder: STUNetEncoder,
        num_classes: int,
        n_blocks_per_stage: tuple[int, ...],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.num_classes = num_classes
        conv_op = encoder.conv_op
        below = encoder.output_channels[:0:-1]
        skip = encoder.output_channels[-2::-1]
        no_stride = (1,) * len(encoder.strides[0])
        self.upsample_convs = nn.ModuleList(
            conv_op(*channels, 1) for channels in zip(below, skip, strict=True)
        )
        self.stages = nn.ModuleList(
            residual_stage(2 * channels, channels, blocks, conv_op, kernel_size, no_stride)
            for channels, blocks, kernel_size in zip(
                skip, n_blocks_per_stage, encoder.kernel_sizes[-2::-1], strict=True
            )
        )
        self.seg_layers = nn.ModuleList(conv_op(channels, num_classes, 1) for channels in skip)

    def forward(self, skips: list[Tensor], checkpointing: str = OFF) -> Tensor | list[Tensor]:
        """The encoder's outputs to (batch, num_classes, *spatial), or a list of them.

        The list is emptied on the way, so that at inference nothing lives longer than needed.
        """
        x = skips.pop()
        outputs: list[Tensor] = []
        for upsample, stage, head in zip(
            self.upsample_convs, self.stages, self.seg_layers, strict=True
        ):
            enter = functools.partial(_upsample_and_join, upsample)
            if checkpointing == OFF:
                x = enter(x, skips.pop())
                x = stage(x)
            else:
                # With the concatenation, which repeats what is kept anyway.
                x = checkpoint_stage(stage, checkpointing, enter, x, skips.pop())
            if self.deep_supervision or not skips:
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


def _upsample_and_join(conv: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """(batch, channels of the stage below, *spatial / stride) and the encoder's output (batch,
    channels, *spatial) to both side by side, (batch, 2 * channels, *spatial)."""
    # Convolve first, then repeat voxels: the same function as the other way round, for less.
    x = functional.interpolate(conv(x), size=skip.shape[2:], mode="nearest")
    return torch.cat((x, skip), dim=1)


class STUNet(AbstractDynamicNetworkArchitectures):
    """The network. A plans file can name it by its dotted path
    ``stunet_plugin.networks.stunet.STUNet``.

    Args:
        input_channels: image channels (and one-hot channels of a previous stage).
        num_classes: outputs of each head.
        n_stages: resolution stages, at least two.
        features_per_stage: channels of each stage, full resolution first.
        conv_op: ``nn.Conv3d`` or ``nn.Conv2d``.
        kernel_sizes: odd, per stage and axis; one number stands for all.
        strides: per stage and axis, the first all ones.
        n_blocks_per_stage: residual blocks of each encoder stage; one number stands for all.
        n_blocks_per_stage_decoder: of each decoder stage, deepest first (one fewer); one number
            stands for all.
        deep_supervision: see :class:`STUNetDecoder`.

    Attributes:
        checkpointing: one of ``activation_checkpointing.SETTINGS``: which activations the backward
            pass computes again. The same outputs and gradients for less memory and one more
            forward pass; no part of a state dict, of no effect without gradients.

    Input (batch, input_channels, *spatial), each spatial size divisible by the product of the
    strides. Output (batch, num_classes, *spatial), or a list of them, one per decoder stage, full
    resolution first.

    Raises:
        ValueError: arguments that do not fit together, with what is allowed.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: ConvOp,
        kernel_sizes: int | Sequence[int] | Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        n_blocks_per_stage: int | Sequence[int],
        n_blocks_per_stage_decoder: int | Sequence[int],
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self._checkpointing = OFF
        # Where nnssl and other loaders of pretrained weights find the encoder, its stem, and what
        # depends on the channels.
        self.key_to_encoder = "encoder.stages"
        self.key_to_stem = "encoder.stages.0"
        self.keys_to_in_proj = ("encoder.stages.0.0.conv1", "encoder.stages.0.0.shortcut")

        if conv_op not in (nn.Conv2d, nn.Conv3d):
            raise ValueError(
                f"conv_op must be torch.nn.Conv2d or torch.nn.Conv3d, not {conv_op!r}."
            )
        dimensions = convert_conv_op_to_dim(conv_op)
        for name, number, least in (
            ("n_stages", n_stages, 2),
            ("input_channels", input_channels, 1),
            ("num_classes", num_classes, 1),
        ):
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be an integer >= {least}, not {number!r}.")
        features = _per_stage("features_per_stage", features_per_stage, n_stages)
        self.strides = _per_axis("strides", strides, n_stages, dimensions)
        kernels = _per_axis("kernel_sizes", kernel_sizes, n_stages, dimensions)
        if any(step != 1 for step in self.strides[0]):
            raise ValueError(
                "The first stage works at full resolution: strides[0] must be all ones, not"
                f" {self.strides[0]}."
            )
        if any(size % 2 == 0 for kernel in kernels for size in kernel):
            raise ValueError(f"Kernel sizes must be odd so that shapes are kept, not {kernels}.")

        self.encoder = STUNetEncoder(
            input_channels,
            features,
            conv_op,
            kernels,
            self.strides,
            _per_stage("n_blocks_per_stage", n_blocks_per_stage, n_stages),
        )
        decoder_blocks = _per_stage(
            "n_blocks_per_stage_decoder", n_blocks_per_stage_decoder, n_stages - 1
        )
        self.decoder = STUNetDecoder(self.encoder, num_classes, decoder_blocks, deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(batch, input_channels, *spatial) to (batch, num_classes, *spatial), or a list of them,
        one per decoder stage, full resolution first."""
        check_patch_size(x.shape[2:], self.strides, "This STU-Net")
        if not self.training and not torch.compiler.is_compiling():
            # Imported here, because it knows the blocks of all networks.
            from stunet_plugin.networks import cpu_inference

            if cpu_inference.applies(self, x):
                return cpu_inference.predict(self, x)
        return self.decoder(self.encoder(x, self._checkpointing), self._checkpointing)

    @property
    def checkpointing(self) -> str:
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, setting: str) -> None:
        if setting not in SETTINGS:
            raise ValueError(
                f"checkpointing must be one of {', '.join(SETTINGS)}, not {setting!r}."
            )
        self._checkpointing = setting

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return the number of elements that all convolutions put out for one sample of
        ``input_size`` voxels.

        nnU-Net's planners use it as a measure of memory. The sum counts each convolution where it
        runs, so the decoder's 1x1x1 convolutions count at the resolution before upsampling.
        """
        check_patch_size(input_size, self.strides, "This STU-Net")
        voxels = [prod(shape) for shape in stage_shapes(input_size, self.strides)]
        # A decoder's upsampling convolution runs below the stage that it belongs to.
        decoder = self.decoder
        heads = len(decoder.seg_layers) if decoder.deep_supervision else 1
        parts = (
            (self.encoder.stages, voxels),
            (decoder.upsample_convs, voxels[:0:-1]),
            (decoder.stages, voxels[-2::-1]),
            (decoder.seg_layers[-heads:], voxels[heads - 1 :: -1]),
        )
        return sum(
            _conv_outputs(module) * size
            for modules, sizes in parts
            for module, size in zip(modules, sizes, strict=True)
        )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation of the published code: negative slope 1e-2, biases zero. For
        ``network.apply``."""
        InitWeights_He(NEGATIVE_SLOPE)(module)


def _conv_outputs(module: nn.Module) -> int:
    """Output channels of all convolutions in a module."""
    return sum(part.out_channels for part in module.modules() if isinstance(part, _ConvNd))


def _per_stage(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        value = (value,) * count
    values = tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != count or any(not isinstance(entry, int) or entry < 1 for entry in values):
        raise ValueError(f"{name} must be one positive integer or {count} of them, not {value!r}.")
    return values


def _per_axis(
    name: str, value: int | Sequence[int] | Sequence[Sequence[int]], count: int, dimensions: int
) -> Strides:
    """Normalise per-stage, per-axis numbers: an int for everything, ints for stages, or sequences
    for stages and axes."""
    stages: Sequence[int | Sequence[int]] = [value] * count if isinstance(value, int) else value
    try:
        full = as_strides(
            [(entry,) * dimensions if isinstance(entry, int) else entry for entry in stages]
        )
    except (TypeError, PluginError) as error:
        raise ValueError(f"{name}: {error}") from error
    if len(full) != count or any(len(entry) != dimensions or min(entry) < 1 for entry in full):
        raise ValueError(
            f"{name} must be one positive integer, or {count} entries (one per stage) of"
            f" {dimensions} (one per axis), not {value!r}."
        )
    return full
