"""Planner base: what all planners of this project share on top of nnU-Net's own.

nnU-Net's planner plans (spacing, patch shape, cascade, normalisation). These replace its measure of
memory by an estimate of the network's training step, and its architecture by that network, so a
stock ``nnUNetTrainer`` trains from these plans too. Preprocessed data has folders of its own:
nnU-Net empties a folder before it fills it, and a training that reads from it dies.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.memory import GIGABYTE, traced_training_memory
from stunet_plugin.nnunet.names import PLANS_NAME
from stunet_plugin.options import SHARE_DATA, Options

MIN_BATCH_SIZE = 2

Axes = Sequence[int]
Fitted = tuple[list[int], dict[str, Any]]
"""Patch size, and the ``architecture`` entry of a plans file."""


class PluginPlanner(ExperimentPlanner):
    """Base of the planners of this project.

    ``gpu_memory_target_in_gb`` is what a training step may take; None is the network's default.
    """

    network_name: ClassVar[str]  # in messages
    default_plans_name: ClassVar[str]
    default_memory_gb: ClassVar[float]

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        target = gpu_memory_target_in_gb
        target = self.default_memory_gb if target is None else target
        if not 0 < target < np.inf:
            raise PluginError(f"-gpu_memory_target must be a number of gigabytes, not {target}.")
        spacing = overwrite_target_spacing
        if spacing and not all(0 < step < np.inf for step in spacing):
            raise PluginError(
                f"-overwrite_target_spacing takes three millimetres above 0, not {list(spacing)}."
            )
        name = plans_name or self.default_plans_name
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise PluginError(
                f"-overwrite_plans_name may hold letters, digits, '_', '-' and '.', not {name!r}."
            )
        super().__init__(
            dataset_name_or_id, target, preprocessor_name, name, spacing, suppress_transpose
        )
        self._refuse_to_replace_plans_of_others()
        self.UNet_min_batch_size = MIN_BATCH_SIZE
        # nnU-Net shrinks the patch while estimate / reference_batch * 2 > reference; with the bytes
        # of a batch of two that reads: until a batch of two fits.
        self.UNet_reference_val_corresp_bs_2d = self.UNet_reference_val_corresp_bs_3d = 2
        self.UNet_reference_val_corresp_GB = self.UNet_vram_target_GB
        self._target_bytes = self.UNet_vram_target_GB * GIGABYTE
        self.UNet_reference_val_2d = self.UNet_reference_val_3d = self._target_bytes
        self._spacing: Sequence[float] = ()

    def fit(self, spacing: Sequence[float], patch: Axes, host_strides: Sequence[Axes]) -> Fitted:
        """Fit the network to the spacing (mm), patch size and strides that nnU-Net would plan."""
        raise NotImplementedError

    def training_bytes(
        self, architecture: dict[str, Any], patch: Axes, batch: int, channels: tuple[int, int]
    ) -> float:
        """Return the estimated peak of a training step; channels are of input and output."""
        raise NotImplementedError

    def advice_for_small_memory(self) -> str:
        """What else to do than to raise the memory target; appended to a sentence."""
        return ""

    def static_estimate_VRAM_usage(
        self, patch_size: Axes, inputs: int, outputs: int, _: str, kwargs: dict[str, Any], __: Any
    ) -> float:
        """Return the bytes of a training step with a batch of two."""
        fitted, architecture = self.fit(self._spacing, patch_size, kwargs["strides"])
        channels = inputs, outputs
        estimate = self.training_bytes(architecture, fitted, MIN_BATCH_SIZE, channels)
        # nnU-Net would shrink on, to patches of no voxels.
        smallest = max(patch_size) < 4 * self.UNet_featuremap_min_edge_length
        if estimate > self._target_bytes and smallest:
            raise PluginError(
                f"{self.network_name} does not fit into {self.UNet_vram_target_GB:g} GB: even a"
                f" patch of {[int(size) for size in fitted]} with a batch of {MIN_BATCH_SIZE} takes"
                f" about {estimate / GIGABYTE:.1f} GB. Raise -gpu_memory_target (default for this"
                f" network: {self.default_memory_gb:g}){self.advice_for_small_memory()}."
            )
        return estimate

    def get_plans_for_configuration(self, spacing: Any, *arguments: Any) -> dict[str, Any]:
        self._spacing = [float(step) for step in spacing]
        *others, dataset_voxels, _ = arguments
        # An empty cache: nnU-Net's knows an estimate by patch and strides, ours depends on the
        # spacing too.
        plan = super().get_plans_for_configuration(spacing, *others, dataset_voxels, {})
        strides, patch = plan["architecture"]["arch_kwargs"]["strides"], plan["patch_size"]
        plan["patch_size"], plan["architecture"] = self.fit(self._spacing, patch, strides)
        plan["batch_size"] = self._batch_size(plan, dataset_voxels)
        return plan

    def _batch_size(self, plan: dict[str, Any], dataset_voxels: float) -> int:
        """The largest batch that fits: nnU-Net's share of the dataset at most, two at least."""
        inputs = len(self.dataset_json.get("channel_names") or self.dataset_json["modality"])
        patch, channels = plan["patch_size"], (inputs, len(self.dataset_json["labels"]))
        two, three = (
            self.training_bytes(plan["architecture"], patch, batch, channels) for batch in (2, 3)
        )
        fits = 2 + int(max(self._target_bytes - two, 0) / (three - two))
        share = round(dataset_voxels * self.max_dataset_covered / np.prod(patch, dtype=np.float64))
        if share < fits:
            print(
                f"{self.network_name}: a batch of {fits} would fit {self.UNet_vram_target_GB:g} GB,"
                f" but nnU-Net allows {max(share, 2)} (5 % of the dataset's voxels, at least 2)."
            )
        return max(min(fits, share), MIN_BATCH_SIZE)

    def _refuse_to_replace_plans_of_others(self) -> None:
        """Keep plans that this planner did not write, nnU-Net's own above all."""
        file = Path(nnUNet_preprocessed, self.dataset_name, f"{self.plans_identifier}.json")
        planner = load_json(str(file)).get("experiment_planner_used", "") if file.is_file() else ""
        family = type(self).__name__.partition("_")[0]
        if self.plans_identifier.startswith("nnUNet") or (
            file.is_file() and not planner.startswith(family)
        ):
            raise PluginError(
                f"The name {self.plans_identifier} belongs to plans of {planner or 'nnU-Net'},"
                " which are kept. Choose another -overwrite_plans_name (default:"
                f" {self.default_plans_name})."
            )

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Return the name of the folder of preprocessed data: the plans' own.

        With ``STUNET_SHARE_DATA=1`` it is that of nnUNetPlans where this plan preprocesses alike,
        as with nnU-Net's ResEnc planners.
        """
        alike = (
            Options().whole(SHARE_DATA, 0)
            and configuration_name in ("2d", "3d_fullres")
            and self.preprocessor_name == "DefaultPreprocessor"
            and np.allclose(
                self._host_spacing(configuration_name), _spacing(self, configuration_name)
            )
        )
        if not alike:
            return f"{self.plans_identifier}_{configuration_name}"
        shared = f"{PLANS_NAME}_{configuration_name}"
        folder = Path(nnUNet_preprocessed, self.dataset_name, shared)
        preprocesses = Path(sys.argv[0]).stem == "nnUNetv2_plan_and_preprocess"
        if preprocesses and "--no_pp" not in sys.argv and folder.is_dir():
            raise PluginError(
                f"STUNET_SHARE_DATA=1 takes the data in {folder}, and nnUNetv2_plan_and_preprocess"
                " would delete them before it fills them again. Use nnUNetv2_plan_experiment, or"
                " unset STUNET_SHARE_DATA."
            )
        return shared

    def _host_spacing(self, configuration_name: str) -> np.ndarray:
        """Return the target spacing of nnUNetPlans: its file's, else the default planner's."""
        file = Path(nnUNet_preprocessed, self.dataset_name, f"{PLANS_NAME}.json")
        if file.is_file():
            configuration = load_json(str(file))["configurations"].get(configuration_name)
            if configuration and "spacing" in configuration:
                return np.asarray(configuration["spacing"])
        default = ExperimentPlanner(self.dataset_name, suppress_transpose=self.suppress_transpose)
        return _spacing(default, configuration_name)


def _spacing(planner: ExperimentPlanner, configuration_name: str) -> np.ndarray:
    """Return a planner's target spacing, in nnU-Net's transposed axis order."""
    transpose, _ = planner.determine_transpose()
    spacing = np.asarray(planner.determine_fullres_target_spacing())[transpose]
    return spacing[1:] if configuration_name == "2d" else spacing


@cache  # nnU-Net's planner asks the same many times
def traced_bytes(
    architecture: str,
    patch: tuple[int, ...],
    batch: int,
    channels: tuple[int, int],
    optimizer_values: int,
) -> float:
    """Return the estimated peak of a training step of an ``architecture`` entry (JSON)."""
    with torch.device("meta"):
        network = get_network_from_plans(
            *json.loads(architecture).values(), *channels, allow_init=False, deep_supervision=True
        )
    return traced_training_memory(network, channels[0], patch, batch, optimizer_values)


def named_planner(
    name: str, base: type[Any], network: str, plans: str, gigabytes: float, **attributes: Any
) -> type[Any]:
    """Make the planner class of one network, as nnU-Net finds it by name."""
    attributes["__doc__"] = f"Plans ``{plans}``, {gigabytes:g} GB by default."
    attributes |= {"network_name": network, "default_plans_name": plans}
    attributes |= {"__module__": base.__module__, "default_memory_gb": gigabytes}
    return type(name, (base,), attributes)
