"""UNETR planners: UNETRPlanner and UNETRPlanner_STP, with ``_tiny`` and ``_small``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from stunet_plugin.networks.memory import ADAM_VALUES
from stunet_plugin.networks.presets import UNETR_PRESETS, UNETRPreset
from stunet_plugin.networks.topology import token_strides
from stunet_plugin.plans.base_planner import (
    Axes,
    Fitted,
    PluginPlanner,
    named_planner,
    traced_bytes,
)


class UNETRPlanner(PluginPlanner):
    """Plans for one size; use the subclasses. The patch is nnU-Net's: the network pads it."""

    preset: ClassVar[UNETRPreset]

    def fit(self, spacing: Sequence[float], patch: Axes, host_strides: Sequence[Axes]) -> Fitted:
        fitted = [int(size) for size in patch]
        return fitted, self.preset.architecture(token_strides(spacing, fitted), fitted)

    def training_bytes(
        self, architecture: dict[str, Any], patch: Axes, batch: int, channels: tuple[int, int]
    ) -> float:
        sizes = tuple(map(int, patch)), int(batch), channels
        return traced_bytes(json.dumps(architecture), *sizes, ADAM_VALUES)


def _planner(preset: UNETRPreset) -> type[UNETRPlanner]:
    names = preset.name, f"UNETRPlans{preset.suffix}", preset.gpu_memory_gb
    return named_planner(f"UNETRPlanner{preset.suffix}", UNETRPlanner, *names, preset=preset)


PLANNERS = {planner.__name__: planner for planner in map(_planner, UNETR_PRESETS)}
globals().update(PLANNERS)
