"""Memory of a training step, with parameters and FLOPs: nothing is computed or allocated.

What the forward pass keeps is counted by arithmetic for STU-Net, which ``stunet list`` prints
without torch (the tests hold it against the network), and for any other network by tracing it on
the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from stunet_plugin.networks.activation_checkpointing import OFF, STAGE
from stunet_plugin.networks.presets import (
    REFERENCE_INPUT_CHANNELS,
    REFERENCE_OUTPUT_CHANNELS,
    STUNetPreset,
)
from stunet_plugin.networks.topology import Strides, stage_shapes

if TYPE_CHECKING:
    import torch
    from torch import nn

PUBLISHED_STRIDES: Strides = ((1, 1, 1), *(((2, 2, 2),) * 5))
"""Of an isotropic plan: five poolings by two on every axis."""

GIGABYTE = 1024**3

# Bytes per parameter: float32 weight and gradient, what the optimizer keeps (momentum; running
# means of the gradient and its square), and autocast's half-precision copy.
WEIGHT_AND_GRADIENT_BYTES = 2 * 4
OPTIMIZER_VALUE_BYTES = 4
SGD_VALUES, ADAM_VALUES = 1, 2
AUTOCAST_BYTES_PER_PARAMETER = 2
# Of nnU-Net's Dice and cross-entropy: float32 softmax, its input, log-softmax, its input, and the
# one-hot target.
LOSS_BYTES_PER_LOGIT = 4 * 4 + 1
# Of a residual block, each as large as its output: the inputs of its two norms and of its second
# convolution, and its output.
MAPS_OF_A_BLOCK = 4
# While the widest layer is differentiated: the gradients of its output and inputs, and workspace.
# STU-Net: in maps of the first stage; any other network: in its largest activations.
BACKWARD_MAPS_STUNET, BACKWARD_MAPS = 5, 4
# CUDA context, library handles, and the workspace that cuDNN picks its algorithms within.
CUDA_CONTEXT_BYTES = 1.0 * GIGABYTE


def _peak(
    parameters: int,
    activations: float,
    backward: float,
    logits: float,
    optimizer_values: int,
    mixed_precision: bool = True,
    recomputed: float = 0,
    processes: int = 1,
) -> float:
    """Return the peak in bytes of a training step with these numbers of elements of a whole batch.

    ``activations`` are kept for the backward pass, where the gradients ``backward`` and the
    ``recomputed`` activations exist at once. Without ``mixed_precision``: float32 on the CPU.
    ``processes`` share weights, gradients and momentum; gathered blocks are not counted.
    """
    element = 2 if mixed_precision else 4
    kept = WEIGHT_AND_GRADIENT_BYTES + optimizer_values * OPTIMIZER_VALUE_BYTES
    copies = AUTOCAST_BYTES_PER_PARAMETER if mixed_precision else 0
    # The whole loss is differentiated before anything of the network is; it leaves the logits.
    loss = logits * (element + LOSS_BYTES_PER_LOGIT)
    again = (recomputed + 2 * logits) * element if recomputed else 0
    return float(
        parameters * (kept / processes + copies)
        + (activations + backward) * element
        + max(loss, again)
        + (CUDA_CONTEXT_BYTES if mixed_precision else 0)
    )


def traced_training_memory(
    network: nn.Module,
    input_channels: int,
    patch_size: Sequence[int],
    batch_size: int,
    optimizer_values: int = ADAM_VALUES,
) -> float:
    """Estimate the peak in bytes of one of nnU-Net's training steps on CUDA; the network is on the
    meta device, with deep supervision on."""
    import torch

    kept: dict[int, torch.Tensor] = {}
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in parameters:
            kept[storage] = tensor
        return tensor

    def elements(tensor: torch.Tensor) -> float:
        """In half precision; masks and indices have the bytes that they have."""
        stored = len(tensor.untyped_storage())
        return stored / (tensor.element_size() if tensor.is_floating_point() else 2)

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Two samples, because batch norm refuses one voxel of one.
        outputs = network(torch.empty(2, input_channels, *patch_size, device="meta"))
    sizes = [elements(tensor) * batch_size / 2 for tensor in kept.values()]
    return _peak(
        sum(parameter.numel() for parameter in network.parameters()),
        activations=sum(sizes),
        backward=BACKWARD_MAPS * max(sizes),
        logits=batch_size * sum(output[0].numel() for output in outputs),
        optimizer_values=optimizer_values,
    )


@dataclass(frozen=True)
class STUNetShape:
    """What the cost of an STU-Net depends on besides the patch; full resolution first."""

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
        sizes = preset.features_per_stage, preset.blocks_per_stage
        return cls(*sizes, strides, input_channels, output_channels)

    def _blocks(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield stage, input and output channels of every residual block, encoder first, and
        whether its shortcut is a convolution."""
        last, inputs = len(self.features) - 1, self.input_channels
        for step, stage in enumerate((*range(last + 1), *reversed(range(last)))):
            width = self.features[stage]
            inputs = 2 * width if step > last else inputs
            for block in range(self.blocks[stage]):
                yield stage, inputs, width, block == 0
                inputs = width

    def convolutions(self) -> Iterator[tuple[int, int, int]]:
        """Yield weights, output channels, and the stage of the output of every convolution."""
        kernel = 3 ** len(self.strides[0])
        for stage, inputs, width, projects in self._blocks():
            yield inputs * width * kernel, width, stage
            yield width * width * kernel, width, stage
            if projects:
                yield inputs * width, width, stage
        for stage, width in enumerate(self.features[:-1]):
            yield self.features[stage + 1] * width, width, stage + 1
            yield width * self.output_channels, self.output_channels, stage

    def parameters(self) -> int:
        """Return the number of trained parameters; every block has two affine norms."""
        norms = sum(2 * 2 * width for _, _, width, _ in self._blocks())
        return norms + sum(weights + outputs for weights, outputs, _ in self.convolutions())

    def multiply_adds(self, patch_size: Sequence[int]) -> int:
        """Return the multiply-adds of a forward pass for one patch (the paper's FLOPs)."""
        voxels = self.voxels(patch_size)
        return sum(weights * voxels[stage] for weights, _, stage in self.convolutions())

    def voxels(self, patch_size: Sequence[int]) -> list[int]:
        return [prod(shape) for shape in stage_shapes(patch_size, self.strides)]

    def kept_activations(self, patch_size: Sequence[int], checkpointing: str = OFF) -> int:
        """Return the elements per sample that the forward pass keeps, logits and loss aside.

        A block keeps its maps, a decoder step the concatenation, the network its input; with
        checkpointing the network's input and the output of each block or stage are all.
        """
        voxels = self.voxels(patch_size)
        inputs = self.input_channels * voxels[0]
        maps = [width * size for width, size in zip(self.features, voxels, strict=True)]
        if checkpointing == STAGE:
            return inputs + sum(maps) + sum(maps[:-1])
        blocks = sum(maps[stage] for stage, *_ in self._blocks())
        if checkpointing != OFF:
            return inputs + blocks
        return inputs + MAPS_OF_A_BLOCK * blocks + 2 * sum(maps[:-1])

    def recomputed_activations(self, patch_size: Sequence[int], checkpointing: str) -> int:
        """Return the most elements per sample that exist again at once: a decoder's block/stage."""
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
    ) -> float:
        """Estimate the peak in bytes of one of nnU-Net's training steps (deep supervision, Dice and
        cross-entropy) with a batch per device; see :func:`_peak`."""
        voxels = self.voxels(patch_size)
        return _peak(
            self.parameters(),
            batch_size * self.kept_activations(patch_size, checkpointing),
            batch_size * BACKWARD_MAPS_STUNET * self.features[0] * voxels[0],
            batch_size * self.output_channels * sum(voxels[:-1]),
            optimizer_values,
            mixed_precision,
            batch_size * self.recomputed_activations(patch_size, checkpointing),
            processes,
        )
