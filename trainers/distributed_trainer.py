"""Distributed training beyond nnU-Net's, which knows CUDA on one machine only: any device, any
number of machines, one writer, sharding. With one process nothing here acts."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from stunet_plugin.errors import PluginError
from stunet_plugin.options import SHARD, Options
from stunet_plugin.trainers import sharding
from stunet_plugin.trainers.safe_trainer import SafeTrainer
from stunet_plugin.weights.pretrained import read_checkpoint


class DistributedTrainer(SafeTrainer):
    """nnU-Net's trainer in one or several (``is_ddp``) processes; ``local_rank`` is the rank among
    all processes of all machines (0 writes)."""

    sharded = False
    lr_scheduler: Any

    def __init__(self, *arguments: Any) -> None:
        if world_size() > 1 and distributed.get_rank() != 0:
            # Each process would start its own run there, and remove the others' folder.
            os.environ["nnUNet_wandb_enabled"] = "0"
        super().__init__(*arguments)
        self.sharded = bool(Options().whole(SHARD, 0))
        self._several_processes = self.is_ddp
        if self.is_ddp:
            self.device = arguments[-1]
            if self.device.type == "cuda":
                # nnU-Net's -num_gpus and our launcher have both chosen the process's GPU.
                self.device = torch.device("cuda", torch.cuda.current_device())
            else:
                self.grad_scaler = None

    def initialize(self) -> None:
        # nnU-Net would wrap the network for the GPU whose number is the rank.
        with self._temporarily(is_ddp=False):
            super().initialize()
        if self.sharded:
            # The optimizer first: it would keep the whole parameters alive.
            self.optimizer = self.lr_scheduler = None
            sharding.shard(self.network, self.device)
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
            self.optimizer.register_load_state_dict_pre_hook(sharding.shard_optimizer_state)
            self.print_to_log_file(f"Weights are sharded over {world_size()} process(es).")
        elif self.is_ddp:
            self.network = self._replicate(self.network)

    def _set_batch_size_and_oversample(self) -> None:
        with self._temporarily(is_ddp=self._several_processes):
            super()._set_batch_size_and_oversample()

    def _build_loss(self) -> nn.Module:
        with self._temporarily(is_ddp=self._several_processes):
            loss: nn.Module = super()._build_loss()
        return loss

    def _do_i_compile(self) -> bool:
        # Compiled as a whole, the blocks could no longer be gathered one by one.
        return not self.sharded and bool(super()._do_i_compile())

    def _replicate(self, network: nn.Module) -> nn.Module:
        """Average gradients over the processes, which start from the first one's weights."""
        devices = None
        if self.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            devices = [self.device.index]
        elif any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
            self.print_to_log_file(
                "Batch norm on the CPU is not synchronised: each process uses its part of a batch."
            )
        # Buffers are not sent at every pass: in the final validation each process makes as many
        # passes as its cases need. The option's name changes in torch 2.15.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {"gradient_as_bucket_view": True, sync: False}
        return DistributedDataParallel(network, device_ids=devices, **options)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self._bare_network().decoder.deep_supervision = enabled

    def _bare_network(self) -> Any:
        """The network without the wrappers of DDP and torch.compile."""
        network: Any = self.network
        network = network.module if isinstance(network, DistributedDataParallel) else network
        return getattr(network, "_orig_mod", network)

    def load_pretrained_weights(self, file: str) -> None:
        """Load all weights but the heads'; nnU-Net's loader takes the rank for a GPU's number."""
        if not self.was_initialized:
            self.initialize()
        network = self._bare_network()
        given = read_checkpoint(file, "-pretrained_weights")["network_weights"]
        names = [name for name in network.state_dict() if ".seg_layers." not in name]
        network.load_state_dict({name: given[name] for name in names}, strict=False)

    def print_to_log_file(self, *args: Any, **how: Any) -> None:
        if self.local_rank == 0:
            super().print_to_log_file(*args, **how)

    def plot_network_architecture(self) -> None:
        # One process alone would wait for the others in its forward pass.
        if not self.is_ddp:
            super().plot_network_architecture()

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if not self.is_ddp:
            super().on_train_start()
            return
        # The first process alone writes the splits, and the plan beside the model.
        splits = Path(self.preprocessed_dataset_folder_base, "splits_final.json")
        if self.local_rank == 0 and self.fold != "all" and not splits.is_file():
            self.do_split()
        distributed.barrier()
        if self.local_rank == 0:
            super().on_train_start()
            return
        with (
            tempfile.TemporaryDirectory() as folder,
            self._temporarily(output_folder=folder, output_folder_base=folder),
        ):
            super().on_train_start()

    def on_validation_epoch_start(self) -> None:
        # The next training step would do this; until then gradients take memory.
        self.optimizer.zero_grad(set_to_none=True)
        super().on_validation_epoch_start()
        if self.is_ddp and self.device.type != "cuda":
            # On CUDA synchronised batch norms have the same statistics everywhere.
            for buffer in self._bare_network().buffers():
                distributed.broadcast(buffer, src=0)

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint in the first process; the others wait, since they may read it next."""
        if not self.is_ddp:
            super().save_checkpoint(filename)
            return
        first = self.local_rank == 0
        stand_ins: dict[str, Any] = {}
        if self.sharded:
            parts = {"network": self.network, "optimizer": self.optimizer}
            stand_ins = {key: sharding.gathered(part, first) for key, part in parts.items()}
            stand_ins["is_ddp"] = False
        if first:
            with self._temporarily(**stand_ins):
                super().save_checkpoint(filename)
        del stand_ins
        distributed.barrier()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        if not self.sharded:
            super().load_checkpoint(filename_or_checkpoint)
            return
        from torch.utils.serialization import config  # in the releases of torch that can shard

        mapped: Any = config
        # Only this process's part is read.
        with (
            mapped.patch("load.mmap", True),
            self._temporarily(is_ddp=False, device=torch.device("cpu")),
        ):
            super().load_checkpoint(filename_or_checkpoint)

    def whole_weights(self) -> dict[str, Any]:
        """Return the network's weights; of a sharded network only in the first process, but every
        process has to call this."""
        weights: dict[str, Any] = self._bare_network().state_dict()
        return sharding.gather(weights, self.local_rank == 0) if self.sharded else weights

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        # The logits of whole images need the room.
        self.optimizer.zero_grad(set_to_none=True)
        if not self.sharded:
            super().perform_actual_validation(save_probabilities)
            return
        # Each process predicts other cases, so each needs the whole network.
        with self._temporarily(network=self._whole_network()):
            super().perform_actual_validation(save_probabilities)

    def _whole_network(self) -> nn.Module:
        with torch.device("meta"):
            network = self.build_network_architecture(
                self.plans_manager,
                self.configuration_manager,
                self.num_input_channels,
                self.label_manager.num_segmentation_heads,
                self.enable_deep_supervision,
            )
        network.load_state_dict(sharding.gather(self.network.state_dict(), keep=True), assign=True)
        return network.to(self.device)

    @contextmanager
    def _temporarily(self, **attributes: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in attributes}
        self.__dict__.update(attributes)
        try:
            yield
        finally:
            self.__dict__.update(before)


def world_size() -> int:
    """Return the number of processes of this training."""
    return distributed.get_world_size() if _in_a_group() else 1


def _in_a_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def check_distribution(configuration: ConfigurationManager, network: nn.Module) -> None:
    """Raise if a plan's batch cannot be split over the processes, or sharding is not possible; the
    network may be on the meta device."""
    if Options().whole(SHARD, 0):
        sharding.check_shardable(network)
        if not _in_a_group():
            raise PluginError(
                f"{SHARD.variable}=1 takes several processes, but this is one alone. Unset it, or"
                " start the training with torchrun ... -m stunet_plugin.launch (docs/scaling.md)."
            )
    processes, batch = world_size(), configuration.batch_size
    if batch < processes:
        raise PluginError(
            f"The plan's batch of {batch} cannot be split over {processes} processes. Start at most"
            f" {batch}, or raise batch_size in the plans."
        )
    if configuration.batch_dice and batch % processes:
        raise PluginError(
            f"The plan's batch of {batch} does not split evenly over {processes} processes, as"
            f" nnU-Net's batch_dice needs. Start a number of processes that divides {batch}."
        )
