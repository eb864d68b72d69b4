"""Sharding by torch's ``fully_shard`` (FSDP2): each process keeps a part of weights, gradients and
momentum; states are converted to and from whole tensors, so that checkpoints are nnU-Net's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.stunet import ResidualBlock, STUNet
from stunet_plugin.options import SHARD


def check_shardable(network: nn.Module) -> None:
    """Raise a PluginError unless the network can be sharded, with this torch."""
    if not isinstance(network, STUNet):
        raise PluginError(
            f"{SHARD.variable}=1 shards an STU-Net; {type(network).__name__} is small enough"
            f" without. Unset {SHARD.variable}."
        )
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise PluginError(
            f"{SHARD.variable}=1 needs torch >= 2.6, this is {torch.__version__}."
            " Upgrade torch, or unset it."
        ) from error


def shard(network: nn.Module, device: torch.device) -> None:
    """Shard an STU-Net over all processes, in place, with the weights of the first; each residual
    block is gathered when it runs. An optimizer must be made afterwards: parameters are new."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        distributed.broadcast(tensor.detach(), src=0)
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh)
        if device.type != "cuda" and isinstance(module, FSDPModule):
            # gloo sums but does not average.
            module.set_force_sum_reduction_for_comms(True)
    network.register_load_state_dict_pre_hook(_shard_weights)


def gather(state: Any, keep: bool) -> Any:
    """Return a state with whole tensors on the CPU in place of sharded ones, None where a process
    does not ``keep`` them; every process has to call this."""
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        # Only one tensor at a time is whole on the device.
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: gather(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value, keep) for value in state]
    return state


def gathered(sharded: Any, keep: bool) -> SimpleNamespace:
    """Return what stands for a network or an optimizer while nnU-Net writes a checkpoint."""
    state = gather(sharded.state_dict(), keep)
    return SimpleNamespace(state_dict=lambda: state)


def _shard_tensor(whole: Any, like: Tensor) -> Any:
    """Return this process's part of a whole tensor, sharded like another of its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    is_whole = isinstance(whole, Tensor) and not isinstance(whole, DTensor)
    if not is_whole or not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    # Every process has the whole tensor, so none needs to send it.
    whole = whole.to(like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _shard_weights(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in network.named_parameters():
        if prefix + name in state:
            state[prefix + name] = _shard_tensor(state[prefix + name], parameter)


def shard_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Before an optimizer of sharded parameters loads a state with whole tensors."""
    # States number the parameters in the order of the groups.
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    known = dict(zip(numbers, parameters, strict=False))
    sharded = {
        number: {key: _shard_tensor(value, known[number]) for key, value in values.items()}
        for number, values in state["state"].items()
        if number in known
    }
    return {**state, "state": {**state["state"], **sharded}}
