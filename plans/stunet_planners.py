"""STU-Net planners: STUNetPlanner_<size> plans its network, and patch and batch size for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from stunet_plugin.networks.activation_checkpointing import AUTO, OFF
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.memory import STUNetShape
from stunet_plugin.networks.presets import PRESETS, STUNetPreset
from stunet_plugin.networks.topology import as_strides
from stunet_plugin.options import CHECKPOINTING, Options
from stunet_plugin.plans.base_planner import Axes, Fitted, PluginPlanner, named_planner


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


def _planner(preset: STUNetPreset) -> type[STUNetPlanner]:
    names = f"STU-Net {preset.name}", f"STUNetPlans_{preset.name}", preset.gpu_memory_gb
    return named_planner(f"STUNetPlanner_{preset.name}", STUNetPlanner, *names, preset=preset)


PLANNERS = {planner.__name__: planner for planner in map(_planner, PRESETS.values())}
globals().update(PLANNERS)
