"""Training memory of any network, by tracing one forward pass on the meta device: no memory is
taken and nothing is computed.

For networks whose activations are no simple sum (window attention, dropout, pre-activation);
STU-Net's are arithmetic in ``stunet_plugin.networks.memory``. What holds for every network
(optimizer, loss, context) has its numbers there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stunet_plugin.networks.memory import (
    ADAM_VALUES,
    AUTOCAST_BYTES_PER_PARAMETER,
    CUDA_CONTEXT_BYTES,
    LOSS_BYTES_PER_LOGIT,
    OPTIMIZER_VALUE_BYTES,
    WEIGHT_AND_GRADIENT_BYTES,
    TrainingMemory,
)

BACKWARD_MAPS = 4
"""While the widest layer is differentiated: the gradients of its output and its inputs, and a
convolution's workspace, as multiples of the largest activation."""


def traced_training_memory(
    network: nn.Module,
    input_channels: int,
    patch_size: Sequence[int],
    batch_size: int,
    mixed_precision: bool = True,
) -> TrainingMemory:
    """Estimate the peak of one of nnU-Net's training steps with Adam.

    Args:
        network: on the meta device, with deep supervision on.
        input_channels, patch_size: of its input.
        batch_size: samples on this device.
        mixed_precision: CUDA autocast to 2 bytes per element; otherwise float32 on the CPU, without
            a CUDA context.
    """
    element = 2 if mixed_precision else 4
    kept: dict[int, torch.Tensor] = {}
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in parameters:
            kept[storage] = tensor
        return tensor

    def size(tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        return (
            len(storage) // tensor.element_size() * element
            if tensor.is_floating_point()
            else len(storage)
        )

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Two samples, because batch norm would refuse one voxel of one.
        outputs = network(torch.empty(2, input_channels, *patch_size, device="meta"))
    activations = sum(map(size, kept.values())) / 2
    largest = max(map(size, kept.values())) / 2
    logits = batch_size * sum(output[0].numel() for output in outputs)
    count = sum(parameter.numel() for parameter in network.parameters())
    optimizer = ADAM_VALUES * OPTIMIZER_VALUE_BYTES
    per_parameter = (
        WEIGHT_AND_GRADIENT_BYTES
        + optimizer
        + (AUTOCAST_BYTES_PER_PARAMETER if mixed_precision else 0)
    )
    return TrainingMemory(
        parameters=float(count * per_parameter),
        activations=float(batch_size * activations),
        loss=float(logits * (element + LOSS_BYTES_PER_LOGIT)),
        backward=float(BACKWARD_MAPS * batch_size * largest),
        context=CUDA_CONTEXT_BYTES if mixed_precision else 0.0,
    )
