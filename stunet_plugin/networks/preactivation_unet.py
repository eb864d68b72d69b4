"""Pre-activation U-Net: what PCT-Net and FMUNet share.

Paper: MIS-FM, arXiv:2306.16925. Published code: github.com/openmedlab/MIS-FM and
github.com/HiLab-git/PyMIC (Apache-2.0), read for facts, not copied. Deviation: norms and
activations are computed again in the backward pass, and several inputs are normalised one by one.

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
    """norm - activation - (dropout) - convolution, of one input or of several side by side.

    Several inputs are normalised and activated one by one and then concatenated, which is the same
    function as concatenating first (both act channel by channel) for less memory. In training only
    the inputs are kept; norm and activation, little beside the convolution, are computed again.

    Args:
        norms: batch or instance norms, one per input.
        act: activation, element by element.
        conv: convolution or transposed convolution.
        dropout: probability.
    """

    def __init__(
        self, norms: Iterable[nn.Module], act: nn.Module, conv: nn.Module, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self.act = act
        self.dropout = nn.Dropout(dropout)
        self.conv = conv

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        """One feature map (batch, channel, *spatial), or a list of them, to the convolution's."""
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        # The compiler decides itself what to keep.
        if self.training and not torch.compiler.is_compiling():
            return checkpointed(self, self._convolve, *inputs, random=self.dropout.p > 0)
        return self._convolve(*inputs)

    def _convolve(self, *inputs: Tensor) -> Tensor:
        activated = [self.act(norm(x)) for norm, x in zip(self.norms, inputs, strict=True)]
        x = activated[0] if len(activated) == 1 else torch.cat(activated, dim=1)
        output: Tensor = self.conv(self.dropout(x))
        return output


class Stem(nn.Conv3d):
    """The convolution that takes the image, shape kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Triple) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding(kernel_size))


class Encoder(nn.Module):
    """The stages of the levels, full resolution first.

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
        """(batch, input_channels, *spatial) to the output of every level, full resolution first:
        (batch, features of the level, *spatial / its strides so far)."""
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
        """The encoder's outputs to (batch, num_classes, *spatial), or a list of them.

        The list is emptied on the way, so that at inference nothing lives longer than needed.
        """
        x = self.bottom(skips.pop())
        outputs: list[Tensor] = []
        for up, merge, block, head in zip(
            self.ups, self.merges, self.blocks, self.seg_layers, strict=True
        ):
            x = block(merge([skips.pop(), up(x)]))
            if self.deep_supervision or not skips:
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class PreActivationUNet(AbstractDynamicNetworkArchitectures):
    """Base of both networks: five levels in one of three anisotropy modes, and the checks.

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

        check_integer("input_channels", input_channels, 1)
        check_integer("num_classes", num_classes, 1)
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
        """(batch, input_channels, *spatial) to (batch, num_classes, *spatial), or a list of four,
        levels 0 to 3, full resolution first."""
        if x.ndim != 2 + len(self.strides[0]):
            raise PluginError(
                f"{type(self).__name__} takes (batch, channel, depth, height, width), not {x.ndim}"
                f" axes. {USE_FOR_2D}"
            )
        check_patch_size(x.shape[2:], self.strides, self._name)
        if not self.training and not torch.compiler.is_compiling():
            # Imported here, because it knows the blocks of all networks.
            from stunet_plugin.networks import cpu_inference

            if cpu_inference.applies(self, x):
                return cpu_inference.predict(self, x)
        return self.decoder(self.encoder(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return the number of elements that all convolutions and linear layers put out for one
        sample of ``input_size`` voxels.

        nnU-Net's planners use it as a measure of memory. Tokens that attention adds to fill its
        windows, and attention weights, are not counted.
        """
        check_patch_size(input_size, self.strides, self._name)
        voxels = [prod(shape) for shape in stage_shapes(input_size, self.strides)]
        decoder = self.decoder
        # A transposed convolution puts out the finer level, the other upsampling the coarser one.
        transposed = any(isinstance(part, nn.ConvTranspose3d) for part in decoder.ups.modules())
        heads = len(decoder.seg_layers) if decoder.deep_supervision else 1
        parts = (
            (self.encoder.stages, voxels),
            ([decoder.bottom], voxels[-1:]),
            (decoder.ups, voxels[-2::-1] if transposed else voxels[:0:-1]),
            (decoder.merges, voxels[-2::-1]),
            (decoder.blocks, voxels[-2::-1]),
            (decoder.seg_layers[-heads:], voxels[heads - 1 :: -1]),
        )
        return sum(
            _channels_out(module) * size
            for modules, sizes in parts
            for module, size in zip(modules, sizes, strict=True)
        )


def check_integer(name: str, number: int, least: int) -> None:
    """Raise a ValueError unless a number is an integer and not smaller than the least."""
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer >= {least}, not {number!r}.")


def per_level(name: str, values: Sequence[float], integers: bool = False) -> tuple:
    """Return one number per level as a tuple.

    Raises:
        ValueError: not five positive integers, or not five probabilities below 1.
    """
    numbers = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    kind = "positive integers" if integers else "numbers of at least 0 and below 1"
    fits = all(
        isinstance(n, int) and n >= 1 if integers else isinstance(n, (int, float)) and 0 <= n < 1
        for n in numbers
    )
    if len(numbers) != NUM_LEVELS or not fits:
        raise ValueError(f"{name} must be {NUM_LEVELS} {kind}, one per level, not {values!r}.")
    return numbers


def padding(kernel_size: Triple) -> Triple:
    """Return the zero padding that keeps the shape."""
    depth, height, width = kernel_size
    return depth // 2, height // 2, width // 2


def _channels_out(module: nn.Module) -> int:
    """Output channels of all convolutions and linear layers in a module."""
    return sum(
        part.out_features if isinstance(part, nn.Linear) else part.out_channels
        for part in module.modules()
        if isinstance(part, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear))
    )
