"""VolumeFusionTrainer for the network of the plan, and ``VolumeFusionTrainer_STUNet_base`` etc. for
each network and size of this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import REPLAN
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.topology import as_strides
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.misfm_trainers import TRAINERS as MISFM
from stunet_plugin.trainers.stunet_trainers import TRAINERS as STUNET
from stunet_plugin.trainers.volume_fusion_mixin import VolumeFusionMixin


class PlannedNetworkTrainer(PluginTrainer):
    """Trains the network that the plan names: nnU-Net's U-Nets, or another that lists strides."""

    @classmethod
    def resolve_architecture(cls, configuration: dict[str, Any]) -> dict[str, Any]:
        architecture = configuration.get("architecture")
        kwargs = architecture.get("arch_kwargs") if isinstance(architecture, Mapping) else None
        if not isinstance(architecture, Mapping) or "strides" not in (kwargs or {}):
            raise PluginError(
                f"{cls.__name__} needs a plan whose network has one output per resolution stage,"
                f" with its strides under arch_kwargs, as nnU-Net plans its U-Nets. {REPLAN}"
            )
        as_strides(architecture["arch_kwargs"]["strides"])
        return dict(architecture)


@dataclass(frozen=True)
class Network:
    """A network that can be pretrained.

    Attributes:
        suffix: of the trainer's name.
        trainer: that trains it on labels from scratch.
        fine_tuned_by: name of the trainer that takes the pretrained weights.
    """

    suffix: str
    trainer: type[PluginTrainer]
    fine_tuned_by: str


NETWORKS = (
    Network("", PlannedNetworkTrainer, "nnUNetTrainer"),
    *(
        Network(f"_STUNet_{size}", STUNET[f"STUNetTrainer_{size}"], f"STUNetTrainer_{size}_ft")
        for size in PRESETS
    ),
    Network("_PCTNet", MISFM["PCTNetTrainer"], "PCTNetTrainer_ft"),
    Network("_FMUNet", MISFM["FMUNetTrainer"], "FMUNetTrainer_ft"),
)


def make_trainer(network: Network) -> type[VolumeFusionMixin]:
    """Make the trainer class that pretrains a network."""
    attributes = {
        "__doc__": f"Pretrains with Volume Fusion what {network.fine_tuned_by} fine-tunes.",
        "__module__": __name__,
        "segmentation_trainer": network.fine_tuned_by,
    }
    name = f"VolumeFusionTrainer{network.suffix}"
    return type(name, (VolumeFusionMixin, network.trainer), attributes)


TRAINERS = {trainer.__name__: trainer for trainer in map(make_trainer, NETWORKS)}
globals().update(TRAINERS)


def __getattr__(name: str) -> Any:
    # For nnUNet_extTrainer: nnU-Net looks into the modules of this folder, into this one last.
    from stunet_plugin import trainers

    return trainers.__getattr__(name)
