"""What PCT-Net and FMUNet share: the pre-activation unit (norm, activation, then convolution) and
the U around the levels.

Paper: MIS-FM, arXiv:2306.16925. Published code: github.com/openmedlab/MIS-FM and
    github.com/HiLab-git/PyMIC
(Apache-2.0), read for facts, not copied.

Axes of all tensors: (batch, channel, *spatial), spatial in nnU-Net's order after its transpose
    (axis 0 is the coarse one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from dynamic_network_architectures.architectures.abstract_arch import (
    AbstractDynamicNetworkArchitectures,
)
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import cpu_inference
from stunet_plugin.networks.activation_checkpointing import checkpointed
from stunet_plugin.networks.anisotropy import (
    NUM_LEVELS,
    USE_FOR_2D,
    AnisotropyMode,
    Triple,
    get_mode,
)
from stunet_plugin.networks.topology import as_strides, check_patch_size, stage_shapes


class PreActivation(nn.Module):
    """norm - activation - (dropout) - convolution, of one input or of several that are concatenated
    along the channels.

    Several inputs are normalised and activated one by one and concatenated then, which is the same
    function as concatenating first (both act channel by channel) for less memory.

    In training only the inputs are kept; the backward pass computes norm and activation again,
    which is little beside the convolution, where otherwise each would keep a tensor of its own.

    Args:
        norms: batch or instance norms, one per input.
        act: activation, element by element.
        conv: convolution or transposed convolution.
        dropout: probability.
        last_reader: nothing else reads the inputs afterwards, so that a prediction on the CPU may
            overwrite them.
    """

    def __init__(
        self,
        norms: Iterable[nn.Module],
        act: nn.Module,
        conv: nn.Module,
        dropout: float = 0.0,
        last_reader: bool = False,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self.act = act
        self.dropout = nn.Dropout(dropout)
        self.conv = conv
        self.last_reader = last_reader

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        """Convolve one feature map, or a list of them, which is emptied so that nothing lives
        longer than needed."""
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        if cpu_inference.goes_on(self, inputs[0]):
            x = cpu_inference.norm_and_activation(
                list(self.norms), self.act, inputs, self.last_reader
            )
            return cpu_inference.convolve(self.conv, x)
        # The compiler decides itself what to keep.
        if self.training and not torch.compiler.is_compiling():
            return checkpointed(self, self._convolve, *inputs, random=self.dropout.p > 0)
        return self._convolve(*inputs)

    def _convolve(self, *inputs: Tensor) -> Tensor:
        activated = [self.act(norm(x)) for norm, x in zip(self.norms, inputs, strict=True)]
        return self.conv(
            self.dropout(activated[0] if len(activated) == 1 else torch.cat(activated, dim=1))
        )


class Stem(nn.Conv3d):
    """The convolution that takes the image, shape kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Triple) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding(kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        if cpu_inference.begins(self, x):
            # A clone, because with one channel torch cannot tell the layouts apart and would go on
            # with the other.
            return cpu_inference.channels_last(
                super().forward(x.clone(memory_format=torch.channels_last_3d))
            )
        return super().forward(x)


class Encoder(nn.Module):
    """The stages of the levels, full resolution first. Returns the output of each.

    Attributes:
        stages: the first takes the image; each further one halves what its level's stride says.
        strides, output_channels, kernel_sizes, conv_op: as in dynamic_network_architectures'
            encoders.
    """

    def __init__(
        self, stages: Iterable[nn.Module], features: tuple[int, ...], mode: AnisotropyMode
    ) -> None:
        super().__init__()
        self.conv_op = nn.Conv3d
        self.output_channels = features
        self.kernel_sizes = mode.kernel_sizes
        self.strides = mode.strides
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class Decoder(nn.Module):
    """From the deepest level to full resolution: upsample, concatenate as (skip, upsampled), merge,
    then the level's block.

    Attributes:
        deep_supervision: return all heads' outputs (a list, full resolution first) or the
            full-resolution one alone. All heads are always built, so that one checkpoint serves
            both.
        bottom: runs on the deepest features first.
        ups, merges, blocks: one per step, deepest first.
        seg_layers: the heads, deepest first; stock ``-pretrained_weights`` skips keys with
            ``.seg_layers.``.
    """

    def __init__(
        self,
        bottom: nn.Module,
        ups: Iterable[nn.Module],
        merges: Iterable[nn.Module],
        blocks: Iterable[nn.Module],
        heads: Iterable[nn.Module],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.bottom = bottom
        self.ups = nn.ModuleList(ups)
        self.merges = nn.ModuleList(merges)
        self.blocks = nn.ModuleList(blocks)
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, skips: list[Tensor]) -> Tensor | list[Tensor]:
        """Decode the encoder's outputs; the list is emptied on the way, so that at inference
        nothing lives longer than needed."""
        x = self.bottom(skips.pop())
        outputs = []
        for up, merge, block, head in zip(
            self.ups, self.merges, self.blocks, self.seg_layers, strict=True
        ):
            parts = [skips.pop(), up(x)]
            del x  # the deeper features
            x = block(merge(parts))
            if self.deep_supervision:
                outputs.append(head(x).contiguous())
        if self.deep_supervision:
            return outputs[::-1]
        return self.seg_layers[-1](x).contiguous()


class PreActivationUNet(AbstractDynamicNetworkArchitectures):
    """Base of both networks: five levels in one of three anisotropy modes, an encoder, a decoder,
    and the checks.

    A subclass builds ``encoder`` and ``decoder``.
    """

    encoder: Encoder
    decoder: Decoder

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        mode: int,
        strides: Sequence[Sequence[int]] | None,
    ) -> None:
        super().__init__()
        # Where nnssl and other loaders of pretrained weights find the encoder, its stem, and what
        # depends on the channels.
        self.key_to_encoder = "encoder.stages"
        self.key_to_stem = "encoder.stages.0"
        self.keys_to_in_proj = ("encoder.stages.0.0",)

        check_whole("input_channels", input_channels, 1)
        check_whole("num_classes", num_classes, 1)
        self.mode = get_mode(mode)
        self.strides = self.mode.strides
        if strides is not None:
            self._check_strides(strides)

    @property
    def _name(self) -> str:
        return f"{type(self).__name__} in mode {self.mode.number}"

    def _check_strides(self, strides: Sequence[Sequence[int]]) -> None:
        given = as_strides(strides)
        if len(given[0]) != len(self.strides[0]):
            raise PluginError(
                f"{type(self).__name__} was given strides of {len(given[0])} axes. {USE_FOR_2D}"
            )
        if given != self.strides:
            raise PluginError(
                f"{self._name} has strides {[list(stage) for stage in self.strides]}, not"
                f" {[list(stage) for stage in given]}. Leave strides out, or choose the mode that"
                " they belong to."
            )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if x.ndim != 2 + len(self.strides[0]):
            raise PluginError(
                f"{type(self).__name__} takes (batch, channel, depth, height, width), not {x.ndim}"
                f" axes. {USE_FOR_2D}"
            )
        check_patch_size(x.shape[2:], self.strides, self._name)
        return self.decoder(self.encoder(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return the number of elements that all convolutions and linear layers put out for one
        sample of ``input_size`` voxels.

        nnU-Net's planners use it as a measure of memory. Tokens that attention adds to fill its
        windows, and attention weights, are not counted.
        """
        check_patch_size(input_size, self.strides, self._name)
        voxels = [prod(shape) for shape in stage_shapes(input_size, self.strides)]
        encoder, decoder = self.encoder, self.decoder
        total = sum(
            _channels_out(stage) * size for stage, size in zip(encoder.stages, voxels, strict=True)
        )
        total += _channels_out(decoder.bottom) * voxels[-1]
        below, here = voxels[:0:-1], voxels[-2::-1]
        for up, merge, block, size_below, size in zip(
            decoder.ups, decoder.merges, decoder.blocks, below, here, strict=True
        ):
            transposed = any(isinstance(part, nn.ConvTranspose3d) for part in up.modules())
            total += _channels_out(up) * (size if transposed else size_below)
            total += (_channels_out(merge) + _channels_out(block)) * size
        heads = here if decoder.deep_supervision else here[-1:]
        layers = decoder.seg_layers if decoder.deep_supervision else decoder.seg_layers[-1:]
        return total + sum(
            _channels_out(head) * size for head, size in zip(layers, heads, strict=True)
        )


def check_whole(name: str, number: int, least: int) -> None:
    """Raise a ValueError unless a number is whole and not smaller than the least."""
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {number!r}.")


def per_level(name: str, values: Sequence[float], whole: bool = False) -> tuple:
    """Return one number per level as a tuple.

    Raises:
        ValueError: not five numbers; with ``whole``, not positive whole numbers; otherwise not
            probabilities below 1.
    """
    numbers = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    fits = [
        isinstance(n, int) and n >= 1 if whole else isinstance(n, (int, float)) and 0 <= n < 1
        for n in numbers
    ]
    if len(numbers) != NUM_LEVELS or not all(fits):
        kind = "positive whole numbers" if whole else "numbers of at least 0 and below 1"
        raise ValueError(f"{name} must be {NUM_LEVELS} {kind}, one per level, not {values!r}.")
    return numbers


def padding(kernel_size: Triple) -> Triple:
    """Return the zero padding that keeps the shape."""
    depth, height, width = kernel_size
    return depth // 2, height // 2, width // 2


def as_triple(stride: tuple[int, ...]) -> Triple:
    """Return the stride of a level as what torch's layers take."""
    depth, height, width = stride
    return depth, height, width


def _channels_out(module: nn.Module) -> int:
    """Output channels of all convolutions and linear layers in a module."""
    convolutions = sum(
        part.out_channels
        for part in module.modules()
        if isinstance(part, (nn.Conv3d, nn.ConvTranspose3d))
    )
    return convolutions + sum(
        part.out_features for part in module.modules() if isinstance(part, nn.Linear)
    )
