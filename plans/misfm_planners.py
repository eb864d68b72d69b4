"""MIS-FM planners: PCTNetPlanner and FMUNetPlanner plan network, mode, patch and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import DIMENSIONS, USE_FOR_2D, get_mode
from stunet_plugin.networks.from_plan import fitting_patch
from stunet_plugin.networks.memory import traced_training_memory
from stunet_plugin.networks.presets import MISFM_PRESETS, MISFMPreset
from stunet_plugin.plans.base_planner import Axes, Fitted, PluginPlanner, named_planner


class MISFMPlanner(PluginPlanner):
    """Plans for one of the two networks; use the subclasses. 3D configurations only."""

    network_record: ClassVar[MISFMPreset]

    def fit(self, spacing: Sequence[float], patch: Axes, host_strides: Sequence[Axes]) -> Fitted:
        fitted, mode = fitting_patch(spacing, patch)
        return fitted, self.network_record.architecture(mode)

    def training_bytes(
        self, architecture: dict[str, Any], patch: Axes, batch: int, channels: tuple[int, int]
    ) -> float:
        mode = architecture["arch_kwargs"]["mode"]
        return _training_bytes(self.network_record, mode, tuple(patch), batch, channels)

    def get_plans_for_configuration(self, spacing: Any, *arguments: Any) -> dict[str, Any]:
        if len(spacing) != DIMENSIONS:
            # nnU-Net always plans 2d; save_plans drops it.
            return {}
        return super().get_plans_for_configuration(spacing, *arguments)

    def save_plans(self, plans: dict[str, Any]) -> None:
        del plans["configurations"]["2d"]
        if not plans["configurations"]:
            raise PluginError(
                f"{self.network_name} has nothing to plan: the images are 2D. {USE_FOR_2D}"
            )
        super().save_plans(plans)


@cache  # nnU-Net's planner asks the same many times
def _training_bytes(
    network: MISFMPreset, mode: int, patch: Axes, batch: int, channels: tuple[int, int]
) -> float:
    values = network.architecture(get_mode(mode)).values()
    with torch.device("meta"):
        built = get_network_from_plans(*values, *channels, deep_supervision=True)
    return traced_training_memory(built, channels[0], patch, batch)


PLANNERS = {
    one.planner: named_planner(
        one.planner, MISFMPlanner, one.name, one.plans, one.gpu_memory_gb, network_record=one
    )
    for one in MISFM_PRESETS
}
globals().update(PLANNERS)
