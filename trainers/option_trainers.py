"""Trainers of networks with an option, such as ``STUNetTrainer_small_GRC`` and
``PlannedTrainer_GRC``: the same networks and schedules, see ``networks.network_options``."""

from __future__ import annotations

from stunet_plugin.networks.network_options import OPTIONS
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.shape_priors import SPM
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.map_pictures import MapPictures
from stunet_plugin.trainers.planned_trainers import TRAINERS as PLANNED
from stunet_plugin.trainers.stunet_trainers import TRAINERS as STUNET

_STUNETS = (f"STUNetTrainer_{size}" for size in PRESETS)
NETWORKS = (*(STUNET[name] for name in _STUNETS), PLANNED["PlannedTrainer"])
_TABLES = {**STUNET, **PLANNED}


def _make_trainer(network: type[PluginTrainer], option: str, suffix: str) -> type[PluginTrainer]:
    base = _TABLES[f"{network.__name__}{suffix}"]
    title = OPTIONS[option].title
    attributes = {
        "__doc__": f"{base.__name__} with {title}.",
        "__module__": __name__,
        "network_options": {option: {}},
    }
    bases = (MapPictures, base) if option == SPM.name else (base,)
    return type(f"{network.__name__}_{option.upper()}{suffix}", bases, attributes)


TRAINERS = {
    trainer.__name__: trainer
    for option in OPTIONS
    for network in NETWORKS
    for trainer in (_make_trainer(network, option, suffix) for suffix in ("", "_ft"))
}
globals().update(TRAINERS)
