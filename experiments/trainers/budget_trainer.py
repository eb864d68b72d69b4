"""nnU-Net's default trainer with a budget: the options of this project's trainers, for the network
that nnU-Net plans."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin.options import EPOCHS, ITERATIONS, MIRRORING, SEED, VAL_ITERATIONS, Options


class nnUNetTrainerBudget(nnUNetTrainer):
    """Everything is nnU-Net's own but for the numbers of epochs and iterations, the seed and
    mirroring."""

    # nnU-Net reads the names of these parameters off the signature: they must stay as they are.
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        options = Options()
        self.num_epochs = options.whole(EPOCHS, self.num_epochs)
        self.num_iterations_per_epoch = options.whole(ITERATIONS, self.num_iterations_per_epoch)
        self.num_val_iterations_per_epoch = options.whole(
            VAL_ITERATIONS, self.num_val_iterations_per_epoch
        )
        self.mirroring = bool(options.whole(MIRRORING, 1))
        torch.manual_seed(options.whole(SEED, 0))

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(
        self,
    ) -> tuple[Any, Any, Any, Any]:
        rotation, dummy_2d, patch_size, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.mirroring:
            axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, patch_size, axes
