"""Pre-activation U-Net: what PCT-Net and FMUNet share.

Paper: MIS-FM, arXiv:2306.16925. Published code: github.com/openmedlab/MIS-FM and
github.com/HiLab-git/PyMIC (Apache-2.0), read for facts, not copied. Deviation: norms and
activations are computed again in the backward pass, and several inputs are normalised one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.activation_checkpointing import checkpointed
from stunet_plugin.networks.anisotropy import NUM_LEVELS, USE_FOR_2D, Triple, get_mode
from stunet_plugin.networks.base_unet import BaseUNet, per_stage
from stunet_plugin.networks.topology import as_strides

DROPOUT = (0.0, 0.0, 0.2, 0.2, 0.2)
"""Of each level, in both networks."""
Part = Callable[[int], nn.Module]
"""Makes a part of a level."""


class PreActivation(nn.Module):
    """norm - activation - (dropout) - convolution, of one input or of several side by side.

    Several inputs, with a batch or instance norm each, are normalised and activated one by one and
    then concatenated: the same function as concatenating first, for less memory. In training only
    the inputs are kept; norm and activation are computed again.
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


class SameConv(nn.Conv3d):
    """A convolution with the zero padding that keeps the shape."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Triple, stride: Triple = (1, 1, 1)
    ) -> None:
        depth, height, width = kernel_size
        padding = depth // 2, height // 2, width // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)


class Stem(SameConv):
    """The convolution that takes the image."""


class Decoder(nn.Module):
    """From the deepest level, where ``bottom`` runs, to full resolution: upsample, concatenate as
    (skip, upsampled), merge, then the level's block and head.

    ``deep_supervision`` and ``seg_layers`` are as in ``stunet.STUNetDecoder``, all deepest first.
    """

    def __init__(
        self,
        bottom: nn.Module,
        up: Part,
        merge: Part,
        block: Part,
        head: Part,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.bottom = bottom
        self.ups, self.merges, self.blocks, self.seg_layers = (
            nn.ModuleList(map(part, range(NUM_LEVELS)[-2::-1])) for part in (up, merge, block, head)
        )

    def forward(self, skips: list[Tensor]) -> Tensor | list[Tensor]:
        """The encoder's outputs (the list is emptied) to (batch, num_classes, *spatial), or a list
        of them."""
        x = self.bottom(skips.pop())
        outputs: list[Tensor] = []
        for up, merge, block, head in zip(
            self.ups, self.merges, self.blocks, self.seg_layers, strict=True
        ):
            x = block(merge([skips.pop(), up(x)]))
            if self.deep_supervision or not skips:
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class PreActivationUNet(BaseUNet):
    """Base of both networks: five levels in one of three anisotropy modes."""

    decoder: Decoder

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        mode: int,
        strides: Sequence[Sequence[int]] | None,
        features_per_stage: Sequence[int],
        dropout_per_stage: Sequence[float],
    ) -> None:
        super().__init__(input_channels, num_classes, ["encoder.stages.0.0"])
        self.mode = get_mode(mode)
        self.strides = self.mode.strides
        self.features = per_stage("features_per_stage", features_per_stage, NUM_LEVELS)
        self.dropout = per_stage("dropout_per_stage", dropout_per_stage, NUM_LEVELS, integers=False)
        if strides is not None and as_strides(strides) != self.strides:
            hint = USE_FOR_2D if len(strides[0]) == 2 else "Choose the mode that they belong to."
            raise PluginError(f"{self.title} has strides {self.strides}, not {strides}. {hint}")

    @property
    def title(self) -> str:
        return f"{type(self).__name__} in mode {self.mode.number}"
