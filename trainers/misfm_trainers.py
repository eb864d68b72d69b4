"""PCTNetTrainer and FMUNetTrainer, each with ``_ft``: the networks of MIS-FM in nnU-Net's training
loop.

Paper: arXiv:2306.16925, section IV; optimizer as published, on nnU-Net's epochs and schedule. The
    anisotropy mode follows from
the plan's spacing and patch (``stunet_plugin.networks.anisotropy``), is printed with its reason,
and is recorded with the model: its plans.json and its checkpoint name the network that was trained,
    mode included.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet_plugin.errors import did_you_mean
from stunet_plugin.networks.misfm_from_plan import NETWORKS, MISFMNetwork, resolve_misfm
from stunet_plugin.trainers.misfm_optimizer import MISFMOptimizer


class MISFMTrainer(MISFMOptimizer):
    """Base of the trainers of one of the two networks."""

    network_record: ClassVar[MISFMNetwork]

    @classmethod
    def resolve_architecture(cls, configuration: dict[str, Any]) -> dict[str, Any]:
        return resolve_misfm(configuration, cls.network_record, cls.__name__)[0]

    @classmethod
    def plans_to_record(cls, plans: dict, configuration: str) -> dict:
        """The plans with this trainer's network in place of the planned one, so that prediction
        never has to choose a mode."""
        recorded = copy.deepcopy(plans)
        chosen = PlansManager(plans).get_configuration(configuration).configuration
        recorded["configurations"][configuration]["architecture"] = cls.resolve_architecture(chosen)
        return recorded

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        chosen = PlansManager(plans).get_configuration(configuration).configuration
        name, (_, reason) = (
            self.network_record.name,
            resolve_misfm(chosen, self.network_record, type(self).__name__),
        )
        self.print_to_log_file(f"{name}: {reason}")
        if self.configuration_manager.batch_size < 2:
            self.print_to_log_file(
                f"{name} has batch norm: with a batch of {self.configuration_manager.batch_size}"
                " its statistics come from one patch at a time, and prediction, which uses their"
                " running mean, can be off. A batch of 2 or more is safer."
            )


def make_trainer(network: MISFMNetwork, fine_tuning: bool) -> type[MISFMTrainer]:
    """Make the trainer class of a network."""
    attributes = {
        "__doc__": (
            f"{network.name}, as published in"
            f" MIS-FM{', to start from pretrained weights' if fine_tuning else ''}."
        ),
        "__module__": __name__,
        "network_record": network,
        "fine_tuning": fine_tuning,
    }
    return type(f"{network.name}Trainer{'_ft' if fine_tuning else ''}", (MISFMTrainer,), attributes)


TRAINERS: dict[str, type[MISFMTrainer]] = {
    trainer.__name__: trainer
    for network in NETWORKS
    for trainer in (make_trainer(network, False), make_trainer(network, True))
}
globals().update(TRAINERS)

__all__ = list(TRAINERS)


def hint_for_unknown(name: str) -> str | None:
    """Return a line for someone who asked for a trainer of this family that does not exist, or None
    if it is no such name."""
    if (
        not name.startswith(tuple(f"{network.name}Trainer" for network in NETWORKS))
        or name in TRAINERS
    ):
        return None
    return (
        f"stunet-plugin has no trainer {name}. Of this family:"
        f" {', '.join(TRAINERS)}.{did_you_mean(name, TRAINERS)}"
    )
