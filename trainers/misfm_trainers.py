"""PCTNetTrainer and FMUNetTrainer, each with ``_ft``: the networks of MIS-FM (arXiv:2306.16925,
section IV) in nnU-Net's training; the anisotropy mode follows from the plan."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet_plugin.networks.presets import MISFM_PRESETS, MISFMPreset
from stunet_plugin.trainers.base_trainer import PluginTrainer


class MISFMOptimizer(PluginTrainer):
    """Adam as published by MIS-FM, for its networks and for Volume Fusion; nnU-Net's schedule."""

    learning_rate = 1e-3

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        self.weight_decay = 1e-5
        return torch.optim.Adam(groups, self.initial_lr, weight_decay=self.weight_decay)


class MISFMTrainer(MISFMOptimizer):
    """Base of the trainers of one of the two networks."""

    preset: ClassVar[MISFMPreset]

    def plans_to_record(self, plans: dict, configuration: str) -> dict:
        recorded = super().plans_to_record(plans, configuration)
        chosen = PlansManager(plans).get_configuration(configuration)
        if chosen.batch_size < 2:
            self._choices += (
                f"{self.preset.name} has batch norm: trained with a batch of 1, its predictions can"
                " be off. A batch of 2 or more is safer.",
            )
        return recorded


def _make_trainer(network: MISFMPreset, fine_tuning: bool) -> type[MISFMTrainer]:
    text = ", to start from pretrained weights" if fine_tuning else ""
    attributes = {
        "__doc__": f"{network.name}, as published in MIS-FM{text}.",
        "__module__": __name__,
        "preset": network,
        "fine_tuning": fine_tuning,
    }
    return type(f"{network.name}Trainer{'_ft' if fine_tuning else ''}", (MISFMTrainer,), attributes)


TRAINERS = {
    trainer.__name__: trainer
    for network in MISFM_PRESETS
    for trainer in (_make_trainer(network, False), _make_trainer(network, True))
}
globals().update(TRAINERS)
