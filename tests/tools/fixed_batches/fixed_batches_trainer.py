"""Trainer with the same global batches whatever the number of processes.

nnU-Net draws its batches at random, so two trainings never see the same. For ``nnUNet_extTrainer``,
in tests/launch/test_launch.py and tests/tools/two_processes.py. Environment:

* FIXED_BATCHES_KILL=RANK:EPOCH: that process kills itself (SIGKILL) when that epoch begins.
* FIXED_BATCHES_VALIDATE=1: do the final validation too.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import (
    DownsampleSegForDSTransform,
)
from torch import distributed

from stunet_plugin.trainers.stunet_trainers import TRAINERS

LOSS_FACTOR = 100.0
"""Makes gradients so large that nnU-Net's clipping acts on them."""
VALIDATION = 10_000
"""Added to the seed of a batch that is for validation."""


class FixedBatchesTrainer(TRAINERS["STUNetTrainer_tiny"]):  # type: ignore[misc,name-defined]
    """STU-Net tiny on random images whose labels are where they are bright; a checkpoint after
    every epoch."""

    learning_rate = 1e-3

    def initialize(self) -> None:
        self.save_every = 1
        super().initialize()

    def _build_loss(self) -> torch.nn.Module:
        loss = super()._build_loss()
        loss.weight_factors = tuple(LOSS_FACTOR * weight for weight in loss.weight_factors)
        return loss

    def get_dataloaders(self) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
        self.inference_allowed_mirroring_axes = None
        return self._batches(0), self._batches(VALIDATION)

    def _batches(self, offset: int) -> Iterator[dict[str, Any]]:
        epoch, number = -1, 0
        while True:
            number = number + 1 if epoch == self.current_epoch else 0
            epoch = self.current_epoch
            yield self._batch(offset + 100 * epoch + number)

    def _batch(self, seed: int) -> dict[str, Any]:
        """This process's part of a global batch."""
        whole = self.configuration_manager.batch_size
        first = self.local_rank * whole // (distributed.get_world_size() if self.is_ddp else 1)
        patch = self.configuration_manager.patch_size
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(whole, self.num_input_channels, *patch, generator=generator)
        images = images[first : first + self.batch_size]
        # Samples stand where that transform has channels, which it treats alike.
        labels = (images[:, 0] > 0.5).to(torch.int16) + (images[:, 0] > 1.5).to(torch.int16)
        downsample = DownsampleSegForDSTransform(self._get_deep_supervision_scales())
        targets = downsample(segmentation=labels)["segmentation"]
        return {"data": images, "target": [target[:, None] for target in targets]}

    def on_epoch_start(self) -> None:
        if os.environ.get("FIXED_BATCHES_KILL") == f"{self.local_rank}:{self.current_epoch}":
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_epoch_start()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        if not self.sharded:
            weights = self._bare_network().state_dict().values()
            content = b"".join(value.numpy().tobytes() for value in weights)
            file = Path(self.output_folder, f"weights_of_rank_{self.local_rank}.txt")
            with file.open("a") as output:
                output.write(f"{self.current_epoch} {hashlib.sha256(content).hexdigest()}\n")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        if os.environ.get("FIXED_BATCHES_VALIDATE") == "1":
            super().perform_actual_validation(save_probabilities)
