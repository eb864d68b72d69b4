"""Which PCT-Net or FMUNet a trainer builds for a plan; trainers (at training and at inference) and
planners go through here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import (
    DIMENSIONS,
    USE_FOR_2D,
    AnisotropyMode,
    choose_mode,
    get_mode,
)
from stunet_plugin.networks.from_plan import HOST_ARCHITECTURES, REPLAN
from stunet_plugin.networks.topology import check_patch_size


@dataclass(frozen=True)
class MISFMNetwork:
    """One of the two networks.

    Attributes:
        name: what users type, as in ``PCTNetTrainer``.
        class_name: dotted path that a plans file names.
        gpu_memory_gb: default of the planner's ``-gpu_memory_target``.
    """

    name: str
    class_name: str
    gpu_memory_gb: float = 8.0

    @property
    def planner(self) -> str:
        return f"{self.name}Planner"

    @property
    def plans(self) -> str:
        return f"{self.name}Plans"

    def architecture(self, mode: AnisotropyMode) -> dict[str, Any]:
        """Return the ``architecture`` entry of a plans file for one mode."""
        # The strides say nothing that the mode does not; nnU-Net reads them there for its
        # deep-supervision scales.
        kwargs = {"mode": mode.number, "strides": [list(stage) for stage in mode.strides]}
        return {
            "network_class_name": self.class_name,
            "arch_kwargs": kwargs,
            "_kw_requires_import": [],
        }


PCTNET = MISFMNetwork("PCTNet", "stunet_plugin.networks.pctnet.PCTNet")
FMUNET = MISFMNetwork("FMUNet", "stunet_plugin.networks.fmunet.FMUNet")
NETWORKS = (PCTNET, FMUNET)


def resolve_misfm(
    configuration: Mapping[str, Any], network: MISFMNetwork, who: str
) -> tuple[dict[str, Any], str]:
    """Return the architecture that a trainer builds for a configuration of a plan, and why its mode
    was chosen.

    Args:
        configuration: of a plans file, inheritance resolved.
        network: that the trainer's name promises.
        who: the trainer's name, for messages.

    Raises:
        PluginError: a plan of another architecture, two axes, or a patch that the mode's strides do
            not divide.
    """
    architecture, patch_size = configuration.get("architecture"), configuration.get("patch_size")
    if not isinstance(architecture, Mapping) or not isinstance(
        architecture.get("arch_kwargs"), Mapping
    ):
        raise PluginError(f"The plan of {who} has no architecture with arch_kwargs. {REPLAN}")
    if not isinstance(patch_size, (list, tuple)) or not all(
        isinstance(size, (int, np.integer)) for size in patch_size
    ):
        raise PluginError(
            f"patch_size in the plan of {who} must be a list of whole numbers, not {patch_size!r}."
            f" {REPLAN}"
        )
    if len(patch_size) != DIMENSIONS:
        raise PluginError(
            f"{who} cannot train a configuration with patch size {list(patch_size)}. {USE_FOR_2D}"
        )
    class_name, kwargs = str(architecture.get("network_class_name")), architecture["arch_kwargs"]
    if class_name == network.class_name:
        if "mode" not in kwargs:
            raise PluginError(f"The {network.name} in the plan of {who} lacks its mode. {REPLAN}")
        mode, reason = get_mode(kwargs["mode"]), f"Mode {kwargs['mode']}, as the plan says."
        # Widths and the like that somebody set in the plans file are kept.
        resolved = {
            **architecture,
            "arch_kwargs": {**kwargs, **network.architecture(mode)["arch_kwargs"]},
        }
    elif class_name.startswith(HOST_ARCHITECTURES):
        mode, reason = choose_mode(_spacing(configuration, who), patch_size)
        resolved = network.architecture(mode)
    else:
        raise PluginError(
            f"{who} cannot use a plan for the network {class_name or '(none named)'!r}. Allowed:"
            " plans of nnU-Net's own planners (-p nnUNetPlans, ...) whose patch size fits, and of"
            f" {network.planner} (-p {network.plans})."
        )
    advice = (
        f"Plan with -pl {network.planner}, which makes {network.plans} of such sizes, or set"
        " patch_size in the plans file."
    )
    check_patch_size(patch_size, mode.strides, f"{network.name} in mode {mode.number}", advice)
    return resolved, reason


def fitting_patch(
    spacing: Sequence[float], patch_size: Sequence[int]
) -> tuple[list[int], AnisotropyMode]:
    """Return the patch size nearest to a wished one that its mode divides, and the mode.

    Each axis is rounded to the nearest multiple of the mode's reduction, at least two of them
    in-plane and on axis 0: a single voxel at the deepest level leaves nothing to attend to, and
    batch norm with little to count.
    """
    wished = [int(size) for size in patch_size]
    # Without regard to the patch: the patch is made to fit the mode that suits the spacing.
    mode, _ = choose_mode(spacing, [step * 2 for step in get_mode(0).reduction])
    # Half a step is rounded up: a patch that covers the image is worth some padding.
    fitted = [
        max((size + step // 2) // step, 2) * step
        for size, step in zip(wished, mode.reduction, strict=True)
    ]
    return fitted, mode


def _spacing(configuration: Mapping[str, Any], who: str) -> Sequence[float]:
    spacing = configuration.get("spacing")
    if not isinstance(spacing, (list, tuple, np.ndarray)):
        raise PluginError(
            f"spacing in the plan of {who} must be a list of millimetres, not {spacing!r}. {REPLAN}"
        )
    return [float(step) for step in spacing]
