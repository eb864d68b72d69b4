"""STU-Net planners: STUNetPlanner_<size> plans its network, and patch and batch size for a GPU;
STUNetPlanner_<size>_SPM the network with shape priors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stunet_plugin.networks.activation_checkpointing import AUTO, OFF
from stunet_plugin.networks.from_plan import Resolved, stunet_architecture, with_options
from stunet_plugin.networks.memory import SGD_VALUES, STUNetShape
from stunet_plugin.networks.presets import PRESETS, STUNetPreset
from stunet_plugin.networks.shape_priors import SPM
from stunet_plugin.networks.topology import as_strides
from stunet_plugin.options import CHECKPOINTING, Options
from stunet_plugin.plans.base_planner import (
    Axes,
    Fitted,
    PluginPlanner,
    named_planner,
    traced_bytes,
)


class STUNetPlanner(PluginPlanner):
    """Plans for one size of STU-Net; use the subclasses ``STUNetPlanner_<size>``."""

    preset: ClassVar[STUNetPreset]

    def fit(self, spacing: Sequence[float], patch: Axes, host_strides: Sequence[Axes]) -> Fitted:
        return [int(size) for size in patch], stunet_architecture(self.preset, host_strides)

    def training_bytes(
        self, architecture: dict[str, Any], patch: Axes, batch: int, channels: tuple[int, int]
    ) -> float:
        strides = as_strides(architecture["arch_kwargs"]["strides"])
        shape = STUNetShape.of_preset(self.preset, strides, *channels)
        # What the trainer would choose by the free memory is no wish of the user's: without one,
        # plans fit with everything kept.
        wish = Options().word(CHECKPOINTING)
        setting = OFF if wish in (None, AUTO) else wish
        return shape.training_memory(patch, batch, checkpointing=setting)

    def advice_for_small_memory(self) -> str:
        names = list(PRESETS)
        smaller = names[1 : names.index(self.preset.name)]  # tiny is for tests
        return f" or plan a smaller size: {', '.join(smaller)}" if smaller else ""


class OptionPlanner(STUNetPlanner):
    """Plans for one size of STU-Net with network options, which are in the plan then."""

    network_options: ClassVar[Mapping[str, Any]]

    def fit(self, spacing: Sequence[float], patch: Axes, host_strides: Sequence[Axes]) -> Fitted:
        fitted, architecture = super().fit(spacing, patch, host_strides)
        resolved = Resolved(architecture)
        resolved = with_options(resolved, self.network_options, fitted, type(self).__name__)
        return fitted, resolved.architecture

    def training_bytes(
        self, architecture: dict[str, Any], patch: Axes, batch: int, channels: tuple[int, int]
    ) -> float:
        sizes = tuple(map(int, patch)), int(batch), channels
        return traced_bytes(json.dumps(architecture), *sizes, SGD_VALUES)


def _planner(preset: STUNetPreset, option: str | None = None) -> type[STUNetPlanner]:
    suffix, base, attributes = "", STUNetPlanner, dict[str, Any](preset=preset)
    if option:
        suffix, base = f"_{option.upper()}", OptionPlanner
        attributes["network_options"] = {option: {}}
    names = f"STU-Net {preset.name}{suffix}", f"STUNetPlans_{preset.name}{suffix}"
    name = f"STUNetPlanner_{preset.name}{suffix}"
    return named_planner(name, base, *names, preset.gpu_memory_gb, **attributes)


PLANNERS = {
    planner.__name__: planner
    for option in (None, SPM.name)  # GRC takes no memory: the plain network's planner
    for planner in (_planner(preset, option) for preset in PRESETS.values())
}
globals().update(PLANNERS)
