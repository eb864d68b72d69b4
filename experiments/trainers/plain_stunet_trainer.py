"""A trainer with the plain transcription of the published network, for side-by-side training on the
same cases.

Use: ``nnUNet_extTrainer=experiments/trainers nnUNetv2_train 4 3d_fullres 0 -tr
    PlainSTUNetTrainer_small_ep5``. Not part of the
package. As in the published v2 port, the strides are the plan's, cut or padded to five poolings,
while the deep-supervision scales stay at the plan's own count.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from stunet_plugin.networks.presets import get_preset
from stunet_plugin.networks.topology import published_strides
from stunet_plugin.options import SEED, Options
from stunet_plugin.trainers.stunet_trainers import TRAINERS

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plain_stunet import PlainSTUNet

OURS = TRAINERS["STUNetTrainer_small_ep5"]


class PlainSTUNetTrainer_small_ep5(nnUNetTrainer):
    """The plain network with the schedule of ``STUNetTrainer_small_ep5``."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr, self.num_epochs = OURS.learning_rate, OURS.epochs
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = (
            OURS.iterations,
            OURS.val_iterations,
        )
        torch.manual_seed(Options().whole(SEED, 0))

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> torch.nn.Module:
        strides = published_strides(configuration_manager.pool_op_kernel_sizes)
        network = PlainSTUNet(
            get_preset("small"),
            strides,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        for module in network.modules():
            if isinstance(module, torch.nn.Conv3d):
                torch.nn.init.kaiming_normal_(module.weight, a=1e-2)
                torch.nn.init.zeros_(module.bias)
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.network.deep_supervision = enabled
