"""The checkpoint that an import writes: plain Python and tensors, so that it loads with
``weights_only=True``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.identify import COUNTER
from stunet_plugin.weights.model_folder import Writer
from stunet_plugin.weights.safe_loading import load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def checkpoint_writer(
    tensors: Mapping[str, Tensor],
    trainer: str,
    init_args: Mapping[str, Any],
    mirroring: tuple[int, ...] | None,
) -> Writer:
    """Return what writes an nnU-Net v2 checkpoint without a training behind it.

    Args:
        tensors: the network's.
        trainer: name of the trainer that builds the network.
        init_args: its arguments.
        mirroring: axes that prediction may mirror.
    """
    content = {
        "network_weights": {
            name: _standing_alone(name, tensor) for name, tensor in tensors.items()
        },
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": dict(init_args),
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": mirroring,
    }
    return lambda path: _save(content, path)


def holds_weights(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a checkpoint that an import wrote holds these very weights; it is only mapped
    into memory."""
    import torch

    try:
        there = load_checkpoint(path).get("network_weights")
    except (PluginError, OSError):
        return False
    if not isinstance(there, dict) or there.keys() != tensors.keys():
        return False
    return all(
        torch.equal(there[name], _standing_alone(name, tensor)) for name, tensor in tensors.items()
    )


def _save(content: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(content, path)


def _standing_alone(name: str, tensor: Tensor) -> Tensor:
    """Return float32 values that share no memory with others (torch would write that memory along);
    mostly the tensor itself."""
    import torch

    tensor = tensor if name.endswith(COUNTER) else tensor.to(torch.float32)
    if (
        not tensor.is_contiguous()
        or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    ):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor
