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
from stunet_plugin.plans.base_planner import PluginPlanner, named_planner


class MISFMPlanner(PluginPlanner):
    """Plans for one of the two networks; use the subclasses. 3D configurations only."""

    network_record: ClassVar[MISFMPreset]

    def fit(
        self,
        spacing: Sequence[float],
        patch_size: Sequence[int],
        host_strides: Sequence[Sequence[int]],
    ) -> tuple[list[int], dict[str, Any]]:
        fitted, mode = fitting_patch(spacing, patch_size)
        return fitted, self.network_record.architecture(mode)

    def training_bytes(
        self,
        architecture: dict[str, Any],
        patch_size: Sequence[int],
        batch_size: int,
        input_channels: int,
        output_channels: int,
    ) -> float:
        mode = architecture["arch_kwargs"]["mode"]
        sizes = tuple(patch_size), batch_size, input_channels, output_channels
        return _training_bytes(self.network_record, mode, *sizes)

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
    network: MISFMPreset,
    mode: int,
    patch_size: tuple[int, ...],
    batch_size: int,
    input_channels: int,
    output_channels: int,
) -> float:
    values = *network.architecture(get_mode(mode)).values(), input_channels, output_channels
    with torch.device("meta"):
        built = get_network_from_plans(*values, deep_supervision=True)
    return traced_training_memory(built, input_channels, patch_size, batch_size)


def make_planner(network: MISFMPreset) -> type[MISFMPlanner]:
    names = network.name, network.plans, network.gpu_memory_gb
    return named_planner(network.planner, MISFMPlanner, *names, network_record=network)


PLANNERS = {planner.__name__: planner for planner in map(make_planner, MISFM_PRESETS)}
globals().update(PLANNERS)

__all__ = list(PLANNERS)
