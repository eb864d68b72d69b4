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
from stunet_plugin.plans.base_planner import PluginPlanner, named_planner


class STUNetPlanner(PluginPlanner):
    """Plans for one size of STU-Net; use the subclasses ``STUNetPlanner_<size>``."""

    preset: ClassVar[STUNetPreset]

    def fit(
        self,
        spacing: Sequence[float],
        patch_size: Sequence[int],
        host_strides: Sequence[Sequence[int]],
    ) -> tuple[list[int], dict[str, Any]]:
        return [int(size) for size in patch_size], stunet_architecture(self.preset, host_strides)

    def training_bytes(
        self,
        architecture: dict[str, Any],
        patch_size: Sequence[int],
        batch_size: int,
        input_channels: int,
        output_channels: int,
    ) -> float:
        strides = as_strides(architecture["arch_kwargs"]["strides"])
        shape = STUNetShape.of_preset(self.preset, strides, input_channels, output_channels)
        # What the trainer would choose by the free memory is no wish of the user's: without one,
        # plans fit with everything kept.
        wish = Options().word(CHECKPOINTING)
        return shape.training_memory(
            patch_size, batch_size, checkpointing=OFF if wish in (None, AUTO) else wish
        )

    def advice_for_small_memory(self) -> str:
        names = list(PRESETS)
        smaller = names[1 : names.index(self.preset.name)]  # tiny is for tests
        return f" or plan a smaller size: {', '.join(smaller)}" if smaller else ""


def make_planner(preset: STUNetPreset) -> type[STUNetPlanner]:
    names = f"STU-Net {preset.name}", f"STUNetPlans_{preset.name}", preset.gpu_memory_gb
    return named_planner(f"STUNetPlanner_{preset.name}", STUNetPlanner, *names, preset=preset)


PLANNERS = {planner.__name__: planner for planner in map(make_planner, PRESETS.values())}
globals().update(PLANNERS)

__all__ = list(PLANNERS)
