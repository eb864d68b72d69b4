"""PlannedTrainer and PlannedTrainer_ft: the plan's own network, such as nnU-Net's U-Nets, with the
options of this project's trainers; nnU-Net's optimizer and schedule."""

from __future__ import annotations

from typing import Any

from stunet_plugin.networks.from_plan import Resolved, resolve_planned
from stunet_plugin.trainers.base_trainer import PluginTrainer


class PlannedTrainer(PluginTrainer):
    """Trains the network that the plan names: nnU-Net's U-Nets, or another that lists strides."""

    @classmethod
    def resolve(cls, configuration: dict[str, Any]) -> Resolved:
        return resolve_planned(configuration, cls.__name__, cls.network_options)


class PlannedTrainer_ft(PlannedTrainer):
    """Fine-tunes the network that the plan names: learning rate 0.001."""

    learning_rate = 1e-3
    fine_tuning = True


TRAINERS = {trainer.__name__: trainer for trainer in (PlannedTrainer, PlannedTrainer_ft)}
