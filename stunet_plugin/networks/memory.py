"""Parameters, floating-point operations and training memory of an STU-Net, by arithmetic: nothing
is built.

``stunet list`` and the planners use it. Plain numbers, no torch; the tests hold it against the
network itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from stunet_plugin.networks.checkpointing_settings import OFF, STAGE
from stunet_plugin.networks.presets import (
    REFERENCE_INPUT_CHANNELS,
    REFERENCE_OUTPUT_CHANNELS,
    STUNetPreset,
)
from stunet_plugin.networks.topology import Strides, stage_shapes

REFERENCE_PATCH = (128, 128, 128)
PUBLISHED_STRIDES: Strides = ((1, 1, 1), *(((2, 2, 2),) * 5))
"""Of an isotropic plan: five poolings by two on every axis."""

GIGABYTE = 1024**3

# Bytes per parameter that stay for the whole training: float32 weight and gradient, and each value
# that the optimizer keeps.
WEIGHT_AND_GRADIENT_BYTES = 2 * 4
OPTIMIZER_VALUE_BYTES = 4
# Momentum; running means of the gradient and its square.
SGD_VALUES, ADAM_VALUES = 1, 2
# Autocast keeps a half-precision copy of every convolution weight from the forward to the end of
# the backward.
AUTOCAST_BYTES_PER_PARAMETER = 2
# Per class and voxel, for nnU-Net's Dice and cross-entropy: float32 softmax, its input,
# log-softmax, its input, and the one-hot target.
LOSS_BYTES_PER_LOGIT = 4 * 4 + 1
# Activations that a residual block keeps, each as large as its output: the inputs of its two norms
# and of its second convolution, and its output.
MAPS_OF_A_BLOCK = 4
# CUDA context and library handles that a process holds, and the workspace that cuDNN picks its
# algorithms within.
CUDA_CONTEXT_BYTES = 1.0 * GIGABYTE


@dataclass(frozen=True)
class Convolution:
    """One convolution: channels, kernel elements, and the stage whose resolution its output has."""

    in_channels: int
    out_channels: int
    kernel_elements: int
    stage: int

    @property
    def parameters(self) -> int:
        return self.out_channels * (self.in_channels * self.kernel_elements + 1)

    @property
    def multiply_adds_per_voxel(self) -> int:
        return self.out_channels * self.in_channels * self.kernel_elements


@dataclass(frozen=True)
class TrainingMemory:
    """Estimated peak of a training step in bytes, by what takes it.

    Attributes:
        parameters: weights, gradients, optimizer.
        activations: kept from the forward to the backward pass.
        loss: while it is computed.
        backward: gradients of activations.
        context: of CUDA.
        recomputed: activations that exist a second time at once, and the logits, which by then are
            what the loss has left.
    """

    parameters: float
    activations: float
    loss: float
    backward: float
    context: float
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        # All of the loss is differentiated before anything of the network is.
        return (
            self.parameters
            + self.activations
            + max(self.loss, self.recomputed)
            + self.backward
            + self.context
        )


@dataclass(frozen=True)
class STUNetShape:
    """What the cost of a network depends on besides the patch; stages with full resolution first,
    kernel size 3."""

    features: tuple[int, ...]
    blocks: tuple[int, ...]
    strides: Strides
    input_channels: int = REFERENCE_INPUT_CHANNELS
    output_channels: int = REFERENCE_OUTPUT_CHANNELS

    @classmethod
    def of_preset(
        cls,
        preset: STUNetPreset,
        strides: Strides = PUBLISHED_STRIDES,
        input_channels: int = REFERENCE_INPUT_CHANNELS,
        output_channels: int = REFERENCE_OUTPUT_CHANNELS,
    ) -> STUNetShape:
        return cls(
            preset.features_per_stage,
            preset.blocks_per_stage,
            strides,
            input_channels,
            output_channels,
        )

    def _block_inputs(self) -> Iterator[tuple[int, int, int]]:
        """Yield (stage, input channels, output channels) of every residual block, encoder first."""
        inputs = self.input_channels
        for stage, width in enumerate(self.features):
            for _ in range(self.blocks[stage]):
                yield stage, inputs, width
                inputs = width
        for stage in reversed(range(len(self.features) - 1)):
            inputs = 2 * self.features[stage]
            for _ in range(self.blocks[stage]):
                yield stage, inputs, self.features[stage]
                inputs = self.features[stage]

    def convolutions(self) -> Iterator[Convolution]:
        """Yield every convolution of the network."""
        kernel = 3 ** len(self.strides[0])
        first_of_stage: set[tuple[int, bool]] = set()
        decoder = False
        previous_stage = -1
        for stage, inputs, width in self._block_inputs():
            decoder = decoder or stage < previous_stage
            previous_stage = stage
            yield Convolution(inputs, width, kernel, stage)
            yield Convolution(width, width, kernel, stage)
            if (stage, decoder) not in first_of_stage:
                first_of_stage.add((stage, decoder))
                yield Convolution(inputs, width, 1, stage)
        for stage, width in enumerate(self.features[:-1]):
            yield Convolution(self.features[stage + 1], width, 1, stage + 1)
            yield Convolution(width, self.output_channels, 1, stage)

    def parameters(self) -> int:
        """Return the number of trained parameters; every block has two affine norms."""
        norms = sum(2 * 2 * width for _, _, width in self._block_inputs())
        return norms + sum(convolution.parameters for convolution in self.convolutions())

    def multiply_adds(self, patch_size: Sequence[int]) -> int:
        """Return the multiply-adds of a forward pass for one patch (what the paper's table calls
        FLOPs)."""
        voxels = self.voxels(patch_size)
        return sum(
            convolution.multiply_adds_per_voxel * voxels[convolution.stage]
            for convolution in self.convolutions()
        )

    def voxels(self, patch_size: Sequence[int]) -> list[int]:
        """Return the voxels of each stage for one patch."""
        return [prod(shape) for shape in stage_shapes(patch_size, self.strides)]

    def kept_activations(self, patch_size: Sequence[int], checkpointing: str = OFF) -> int:
        """Return the elements per sample that the forward pass keeps for the backward pass, logits
        and loss aside.

        A block keeps its maps (MAPS_OF_A_BLOCK), a decoder step the concatenation besides, the
        network its input. With checkpointing there are the network's input and the output of each
        block or stage.
        """
        voxels = self.voxels(patch_size)
        total = self.input_channels * voxels[0]
        if checkpointing == STAGE:
            encoder = sum(width * size for width, size in zip(self.features, voxels, strict=True))
            return total + 2 * encoder - self.features[-1] * voxels[-1]
        blocks = sum(width * voxels[stage] for stage, _, width in self._block_inputs())
        if checkpointing != OFF:
            return total + blocks
        concatenations = sum(
            2 * width * size for width, size in zip(self.features[:-1], voxels, strict=False)
        )
        return total + MAPS_OF_A_BLOCK * blocks + concatenations

    def recomputed_activations(self, patch_size: Sequence[int], checkpointing: str) -> int:
        """Return the most elements per sample that the backward pass computes again at once: a
        decoder's block or stage."""
        if checkpointing == OFF:
            return 0
        blocks = self.blocks if checkpointing == STAGE else (1,) * len(self.blocks)
        stages = zip(self.features[:-1], blocks, self.voxels(patch_size), strict=False)
        # The concatenation is twice as wide as the stage.
        return max((MAPS_OF_A_BLOCK * count + 2) * width * size for width, count, size in stages)

    def training_memory(
        self,
        patch_size: Sequence[int],
        batch_size: int,
        mixed_precision: bool = True,
        checkpointing: str = OFF,
        processes: int = 1,
        optimizer_values: int = SGD_VALUES,
    ) -> TrainingMemory:
        """Estimate the peak of one of nnU-Net's training steps (deep supervision, Dice +
        cross-entropy).

        Args:
            patch_size: voxels per axis.
            batch_size: samples on this device.
            mixed_precision: CUDA autocast to 2 bytes per element; otherwise float32 on the CPU,
                without a CUDA context.
            checkpointing: a setting of ``stunet_plugin.networks.checkpointing_settings``.
            processes: that share weights, gradients and momentum out; the blocks that are gathered
                are not counted.
            optimizer_values: that the optimizer keeps per parameter.
        """
        voxels = self.voxels(patch_size)
        element = 2 if mixed_precision else 4
        parameters = self.parameters()
        kept = WEIGHT_AND_GRADIENT_BYTES + optimizer_values * OPTIMIZER_VALUE_BYTES
        per_parameter = kept / processes + (AUTOCAST_BYTES_PER_PARAMETER if mixed_precision else 0)
        logits = batch_size * self.output_channels * sum(voxels[:-1])
        # While the widest layer is differentiated, its output's and its inputs' gradients exist
        # together (decoder, full resolution: the concatenation has twice the width), beside what
        # the convolution needs as workspace.
        backward = batch_size * 5 * self.features[0] * voxels[0] * element
        recomputed = batch_size * self.recomputed_activations(patch_size, checkpointing)
        return TrainingMemory(
            parameters=float(parameters * per_parameter),
            activations=float(
                batch_size * self.kept_activations(patch_size, checkpointing) * element
            ),
            loss=float(logits * (element + LOSS_BYTES_PER_LOGIT)),
            backward=float(backward),
            context=CUDA_CONTEXT_BYTES if mixed_precision else 0.0,
            recomputed=float((recomputed + 2 * logits) * element) if recomputed else 0.0,
        )
