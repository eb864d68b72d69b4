"""STUNetPlanner_<size>: nnU-Net plans that carry an STU-Net, with patch and batch size fitted to a GPU's memory.

nnU-Net's own planner does the planning (spacing, patch shape, cascade, normalisation). These classes replace its measure of
memory, which knows U-Nets of at most 320 channels, by an estimate of this network's training step, and its architecture by
the published topology. So a stock ``nnUNetTrainer`` trains from these plans too.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed

from stunet_plugin.cost import GIGABYTE, STUNetShape
from stunet_plugin.errors import PluginError
from stunet_plugin.plan_architecture import stunet_architecture
from stunet_plugin.presets import PRESETS, STUNetPreset
from stunet_plugin.topology import published_strides

MIN_BATCH_SIZE = 2
HOST_PLANS = "nnUNetPlans"
"""Plans of nnU-Net's default planner, whose preprocessed data other planners of nnU-Net share."""


class STUNetPlanner(ExperimentPlanner):
    """Plans for one size of STU-Net; use the subclasses ``STUNetPlanner_<size>``.

    Args:
        dataset_name_or_id: as everywhere in nnU-Net.
        gpu_memory_target_in_gb: what a training step may take; None is the size's default.
        preprocessor_name, overwrite_target_spacing, suppress_transpose: nnU-Net's own.
        plans_name: None is ``STUNetPlans_<size>``.

    Raises:
        PluginError: the memory target is too small for this size.
    """

    preset: ClassVar[STUNetPreset]

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        target = self.preset.gpu_memory_gb if gpu_memory_target_in_gb is None else gpu_memory_target_in_gb
        if not 0 < target < np.inf:
            raise PluginError(f"-gpu_memory_target must be a number of gigabytes above 0, not {target}.")
        if overwrite_target_spacing is not None and not all(0 < step < np.inf for step in overwrite_target_spacing):
            raise PluginError(f"-overwrite_target_spacing takes three millimetres above 0, not {list(overwrite_target_spacing)}.")
        name = plans_name or f"STUNetPlans_{self.preset.name}"
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name.startswith("."):
            raise PluginError(f"-overwrite_plans_name may hold letters, digits, '_', '-' and '.', not {name!r}.")
        super().__init__(
            dataset_name_or_id,
            target,
            preprocessor_name,
            name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self._refuse_to_replace_plans_of_others()
        self.UNet_min_batch_size = MIN_BATCH_SIZE
        # nnU-Net shrinks the patch while estimate / reference_batch * 2 > reference, then takes reference / estimate *
        # reference_batch as the batch. With an estimate in bytes of a batch of two, the target in bytes and a reference batch
        # of two, that reads: shrink until a batch of two fits.
        self.UNet_reference_val_corresp_bs_2d = self.UNet_reference_val_corresp_bs_3d = MIN_BATCH_SIZE
        self.UNet_reference_val_corresp_GB = self.UNet_vram_target_GB
        self.UNet_reference_val_2d = self.UNet_reference_val_3d = self.UNet_vram_target_GB * GIGABYTE

    def _refuse_to_replace_plans_of_others(self) -> None:
        """Keep plans that no planner of ours wrote, nnU-Net's own above all."""
        file = Path(nnUNet_preprocessed, self.dataset_name, f"{self.plans_identifier}.json")
        planner = load_json(str(file)).get("experiment_planner_used", "") if file.is_file() else ""
        if self.plans_identifier.startswith("nnUNet") or (file.is_file() and not planner.startswith("STUNetPlanner")):
            raise PluginError(
                f"The name {self.plans_identifier} belongs to plans of {planner or 'nnU-Net'}, which are kept. Choose another "
                f"-overwrite_plans_name (default: STUNetPlans_{self.preset.name})."
            )

    def static_estimate_VRAM_usage(
        self,
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: Sequence[str],
    ) -> float:
        """Return the bytes of a training step of this size with a batch of two (a method, so that it knows the size)."""
        shape = self._shape(arch_kwargs["strides"], input_channels, output_channels)
        estimate = shape.training_memory(patch_size, MIN_BATCH_SIZE).total
        # nnU-Net would go on shrinking to patches of no voxels.
        if estimate > self.UNet_reference_val_3d and max(patch_size) < 4 * self.UNet_featuremap_min_edge_length:
            raise PluginError(
                f"STU-Net {self.preset.name} does not fit into {self.UNet_vram_target_GB:g} GB: even a patch of "
                f"{[int(size) for size in patch_size]} with a batch of {MIN_BATCH_SIZE} takes about "
                f"{estimate / GIGABYTE:.1f} GB. Raise -gpu_memory_target (default for this size: "
                f"{self.preset.gpu_memory_gb:g}){self._smaller_sizes()}."
            )
        return estimate

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray | tuple[float, ...] | list[float],
        median_shape: np.ndarray | tuple[int, ...],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict[str, Any]:
        plan = super().get_plans_for_configuration(spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache)
        strides = plan["architecture"]["arch_kwargs"]["strides"]
        plan["architecture"] = stunet_architecture(self.preset, strides)
        plan["batch_size"] = self._batch_size(plan["patch_size"], strides, approximate_n_voxels_dataset)
        return plan

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Share the data of ``nnUNetPlans`` where this plan preprocesses alike, as nnU-Net's ResEnc planners do."""
        own = f"{self.plans_identifier}_{configuration_name}"
        if configuration_name not in ("2d", "3d_fullres") or self.preprocessor_name != "DefaultPreprocessor":
            return own
        if not np.allclose(self._host_spacing(configuration_name), self._planned_spacing(configuration_name)):
            return own
        return f"{HOST_PLANS}_{configuration_name}"

    def _planned_spacing(self, configuration_name: str) -> np.ndarray:
        """Target spacing of this plan, in nnU-Net's transposed axis order."""
        transpose, _ = self.determine_transpose()
        spacing = np.asarray(self.determine_fullres_target_spacing())[transpose]
        return spacing[1:] if configuration_name == "2d" else spacing

    def _host_spacing(self, configuration_name: str) -> np.ndarray:
        """Target spacing of ``nnUNetPlans``: from the file where there is one, else what the default planner would take."""
        file = Path(nnUNet_preprocessed, self.dataset_name, f"{HOST_PLANS}.json")
        if file.is_file():
            configuration = load_json(str(file))["configurations"].get(configuration_name)
            if configuration and "spacing" in configuration:
                return np.asarray(configuration["spacing"])
        default = ExperimentPlanner(self.dataset_name, suppress_transpose=self.suppress_transpose)
        transpose, _ = default.determine_transpose()
        spacing = np.asarray(default.determine_fullres_target_spacing())[transpose]
        return spacing[1:] if configuration_name == "2d" else spacing

    def _smaller_sizes(self) -> str:
        smaller = [name for name, preset in PRESETS.items() if preset.parameters < self.preset.parameters and name != "tiny"]
        return f" or plan a smaller size: {', '.join(smaller)}" if smaller else ""

    def _shape(self, strides: Sequence[Sequence[int]], input_channels: int, output_channels: int) -> STUNetShape:
        return STUNetShape.of_preset(self.preset, published_strides(strides), input_channels, output_channels)

    def _batch_size(self, patch_size: Sequence[int], strides: Sequence[Sequence[int]], dataset_voxels: float) -> int:
        """Largest batch that fits the target, within nnU-Net's share of the dataset and at least two."""
        channels = self.dataset_json.get("channel_names") or self.dataset_json["modality"]
        shape = self._shape(strides, len(channels), len(self.dataset_json["labels"]))
        target = self.UNet_vram_target_GB * GIGABYTE
        two, three = (shape.training_memory(patch_size, batch).total for batch in (2, 3))
        fits = 2 + int(max(target - two, 0) / (three - two))
        share = round(dataset_voxels * self.max_dataset_covered / np.prod(patch_size, dtype=np.float64))
        if share < fits:
            print(
                f"STU-Net {self.preset.name}: a batch of {fits} would fit {self.UNet_vram_target_GB:g} GB, but nnU-Net allows "
                f"{max(share, MIN_BATCH_SIZE)} (5 % of the voxels of the data set, and at least {MIN_BATCH_SIZE})."
            )
        return max(min(fits, share), MIN_BATCH_SIZE)


def make_planner(preset: STUNetPreset) -> type[STUNetPlanner]:
    """Make the planner class of a size."""
    document = f"Plans ``STUNetPlans_{preset.name}`` for STU-Net {preset.name}, {preset.gpu_memory_gb:g} GB by default."
    return type(f"STUNetPlanner_{preset.name}", (STUNetPlanner,), {"__doc__": document, "__module__": __name__, "preset": preset})


PLANNERS = {planner.__name__: planner for planner in map(make_planner, PRESETS.values())}
globals().update(PLANNERS)

__all__ = list(PLANNERS)


def hint_for_unknown(name: str) -> str | None:
    """Return a line for someone who asked for a planner of this family that does not exist, or None if it is no such name."""
    if not name.startswith("STUNetPlanner") or name in PLANNERS:
        return None
    nearest = difflib.get_close_matches(name, PLANNERS, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return f"stunet-plugin has no planner {name}. Planners: {', '.join(PLANNERS)}.{hint}"


def __getattr__(name: str) -> Any:
    # As in stunet_trainers: nnU-Net's own last word on an unknown planner is that None cannot be called.
    hint = hint_for_unknown(name)
    if hint:
        print(hint, file=sys.stderr)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
