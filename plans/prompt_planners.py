"""Prompt planners: PromptPlanner_STUNet_<size> plans an STU-Net for images as they are, as the
viewers of nnInteractive give them to a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRESETS, STUNetPreset
from stunet_plugin.networks.topology import as_strides, total_stride
from stunet_plugin.plans.base_planner import Axes, Fitted, named_planner
from stunet_plugin.plans.stunet_planners import STUNetPlanner

LEAST_PATCH = 64
"""Voxels per axis: the viewers' session fails with 48 or less and was seen to work with 64."""


class PromptPlanner(STUNetPlanner):
    """Plans without resampling, with z-scores, and with patches of 64 voxels or more; use the
    subclasses ``PromptPlanner_STUNet_<size>``."""

    def fit(self, spacing: Sequence[float], patch: Axes, host_strides: Sequence[Axes]) -> Fitted:
        fitted, architecture = super().fit(spacing, patch, host_strides)
        steps = total_stride(as_strides(architecture["arch_kwargs"]["strides"]))
        larger = [
            -(-max(size, LEAST_PATCH) // step) * step
            for size, step in zip(fitted, steps, strict=True)
        ]
        return larger, architecture

    def determine_resampling(self, *_: Any, **__: Any) -> tuple[Any, ...]:
        return no_resampling_hack, {}, no_resampling_hack, {}

    def determine_segmentation_softmax_export_fn(self, *_: Any, **__: Any) -> tuple[Any, ...]:
        return no_resampling_hack, {}

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(
        self,
    ) -> tuple[list[str], list[bool]]:
        channels = self.dataset_json.get("channel_names") or self.dataset_json["modality"]
        return ["ZScoreNormalization"] * len(channels), [False] * len(channels)

    def generate_data_identifier(self, configuration_name: str) -> str:
        return f"{self.plans_identifier}_{configuration_name}"

    def save_plans(self, plans: dict[str, Any]) -> None:
        # A lower resolution needs resampling.
        for name in ("3d_lowres", "3d_cascade_fullres"):
            plans["configurations"].pop(name, None)
        super().save_plans(plans)

    def static_estimate_VRAM_usage(self, patch_size: Axes, *others: Any) -> float:
        # nnU-Net shrinks the patch until it fits; below the least one it stays as it is.
        smallest = max(patch_size) <= LEAST_PATCH
        estimate = super().static_estimate_VRAM_usage(patch_size, *others)
        if smallest and estimate > self._target_bytes:
            raise PluginError(
                f"{self.network_name} with the viewers' least patch of {LEAST_PATCH} voxels per"
                f" axis does not fit into {self.UNet_vram_target_GB:g} GB. Raise"
                f" -gpu_memory_target{self.advice_for_small_memory()}."
            )
        return estimate


def _planner(preset: STUNetPreset) -> type[PromptPlanner]:
    name = f"PromptPlanner_STUNet_{preset.name}"
    plans, gigabytes = f"PromptPlans_STUNet_{preset.name}", preset.gpu_memory_gb
    network = f"STU-Net {preset.name}"
    return named_planner(name, PromptPlanner, network, plans, gigabytes, preset=preset)


PLANNERS = {planner.__name__: planner for planner in map(_planner, PRESETS.values())}
globals().update(PLANNERS)
