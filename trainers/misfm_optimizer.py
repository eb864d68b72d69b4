"""The optimizer of MIS-FM: of its networks (arXiv:2306.16925, section IV), and of pretraining with
Volume Fusion."""

from __future__ import annotations

from typing import Any

import torch

from stunet_plugin.trainers.base_trainer import PluginTrainer


class MISFMOptimizer(PluginTrainer):
    """Adam as published, at a learning rate of 1e-3 with a weight decay of 1e-5; the schedule stays
    nnU-Net's."""

    learning_rate = 1e-3

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        self.weight_decay = 1e-5
        return torch.optim.Adam(groups, self.initial_lr, weight_decay=self.weight_decay)
