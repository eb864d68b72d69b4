"""Trainers of nnU-Net with a budget: its own network, and the published STU-Net written plainly.

For ``nnUNet_extTrainer=experiments/trainers``; no part of the package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.networks.topology import published_strides
from stunet_plugin.options import EPOCHS, ITERATIONS, MIRRORING, SEED, VAL_ITERATIONS, Options

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plain_stunet import PlainSTUNet


class nnUNetTrainerBudget(nnUNetTrainer):
    """nnU-Net's own training, but for epochs, iterations, seed and mirroring from our variables."""

    budget = (1000, 250, 50)
    """Epochs, iterations and validation iterations per epoch without the variables."""

    def initialize(self) -> None:
        options, (epochs, iterations, validation) = Options(), self.budget
        self.num_epochs = options.whole(EPOCHS, epochs)
        self.num_iterations_per_epoch = options.whole(ITERATIONS, iterations)
        self.num_val_iterations_per_epoch = options.whole(VAL_ITERATIONS, validation)
        self.mirroring = bool(options.whole(MIRRORING, 1))
        torch.manual_seed(options.whole(SEED, 0))
        super().initialize()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        *others, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self.mirroring:
            axes = self.inference_allowed_mirroring_axes = None
        return (*others, axes)


class PlainSTUNetTrainer_small_ep5(nnUNetTrainerBudget):
    """The plain network with the schedule of ``STUNetTrainer_small_ep5``.

    As in the published v2 port, the strides are the plan's, cut or padded to five poolings, while
    the deep-supervision scales stay at the plan's own count.
    """

    budget = (5, 100, 20)

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> torch.nn.Module:
        strides = published_strides(configuration_manager.pool_op_kernel_sizes)
        sizes = num_input_channels, num_output_channels, enable_deep_supervision
        return PlainSTUNet(PRESETS["small"], strides, *sizes).apply(STUNet.initialize)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.network.deep_supervision = enabled
