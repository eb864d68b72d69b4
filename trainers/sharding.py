"""Sharing a network out over the processes of a training (FSDP2): each keeps its part of the
weights, gradients and momentum.

torch's own ``fully_shard`` does the work. This module says what is shared out together, and turns
state from whole tensors into parts and back, so that checkpoints stay the ones that nnU-Net writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.residual_block import ResidualBlock
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.options import SHARD

MINIMUM_TORCH = "2.6"
"""The first release with ``fully_shard`` as a public function."""


def check_shardable(network: nn.Module) -> None:
    """Raise unless a network can be shared out, and torch knows how.

    Raises:
        PluginError: it cannot.
    """
    if not isinstance(network, STUNet):
        raise PluginError(
            f"{SHARD.variable}=1 shares an STU-Net out over the processes; this trainer's"
            f" {type(network).__name__} is small enough for every process to hold it whole. Unset"
            f" {SHARD.variable}."
        )
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise PluginError(
            f"{SHARD.variable}=1 needs torch {MINIMUM_TORCH} or newer, this is {torch.__version__}."
            " Upgrade torch, or unset it."
        ) from error


def shard(network: nn.Module, device: torch.device) -> None:
    """Share the parameters of an STU-Net out over all processes, in place; the weights are those of
    the first process.

    Each residual block is gathered when it runs and given back afterwards; the decoder's small
    convolutions and the heads are gathered once per step. An optimizer must be made afterwards, for
    the parameters are new objects.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        distributed.broadcast(tensor.detach(), src=0)
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh)
        if device.type != "cuda" and isinstance(module, FSDPModule):
            # gloo adds up but does not average.
            module.set_force_sum_reduction_for_comms(True)
    network.register_load_state_dict_pre_hook(_share_out_weights)


def accept_whole_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of shared-out parameters load a state with whole tensors."""
    optimizer.register_load_state_dict_pre_hook(_share_out_state)


def gather(state: Any, keep: bool) -> Any:
    """Return nested dicts and lists with whole tensors on the CPU in place of shared-out ones.

    Every process has to call this, with the same state but for the parts.

    Args:
        state: of a network or an optimizer.
        keep: this process wants the result; the others have None in place of the tensors that were
            gathered.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        # One tensor at a time is whole on the device.
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: gather(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value, keep) for value in state]
    return state


class Gathered:
    """Stands where nnU-Net asks a network or an optimizer for its state when it writes a
    checkpoint."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


def _share_out(whole: Any, like: Tensor) -> Any:
    """Return this process's part of a whole tensor of the shape of a shared-out one; anything else
    as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if (
        not isinstance(whole, Tensor)
        or isinstance(whole, DTensor)
        or not isinstance(like, DTensor)
        or whole.shape != like.shape
    ):
        return whole
    # Every process has the whole tensor, so none needs to send it.
    return distribute_tensor(
        whole.to(like.dtype), like.device_mesh, like.placements, src_data_rank=None
    )


def _share_out_weights(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in network.named_parameters():
        if prefix + name in state:
            state[prefix + name] = _share_out(state[prefix + name], parameter)


def _share_out_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """nnU-Net's file numbers the parameters in the order of the groups, as every optimizer of torch
    does."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    known = dict(zip(numbers, parameters, strict=False))
    shared_out = {
        number: (
            {key: _share_out(value, known[number]) for key, value in values.items()}
            if number in known
            else values
        )
        for number, values in state["state"].items()
    }
    return {**state, "state": shared_out}
