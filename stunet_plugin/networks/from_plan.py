"""Which network a plans file asks for, and the STU-Net that a trainer builds from it.

The trainers, at training and at inference, and the planners go through here, so the network, its
deep-supervision scales and the checks of a plan can never disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import (
    DEFAULT_SIZE,
    PRESETS,
    STUNetPreset,
    find_preset,
    get_preset,
)
from stunet_plugin.networks.topology import (
    as_strides,
    check_patch_size,
    published_strides,
    total_stride,
)

STUNET_CLASS = "stunet_plugin.networks.stunet.STUNet"
HOST_ARCHITECTURES = "dynamic_network_architectures.architectures.unet."
"""Plans of nnU-Net's own planners name networks of this module: U-Nets whose strides we take
over."""

REPLAN = "Mend the plans file, or plan again with nnUNetv2_plan_experiment."


def stunet_architecture(preset: STUNetPreset, strides: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the ``architecture`` entry of a plans file for a published size.

    Args:
        preset: the size.
        strides: of a plan; cut or padded to the published six stages.
    """
    fitted = published_strides(strides)
    dimensions = len(fitted[0])
    return {
        "network_class_name": STUNET_CLASS,
        "arch_kwargs": {
            "n_stages": len(fitted),
            "features_per_stage": list(preset.features_per_stage),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions for _ in fitted],
            "strides": [list(stage) for stage in fitted],
            "n_blocks_per_stage": list(preset.blocks_per_stage),
            "n_blocks_per_stage_decoder": list(preset.blocks_per_stage[:-1]),
        },
        "_kw_requires_import": ["conv_op"],
    }


def resolve_stunet(
    configuration: Mapping[str, Any], preset: STUNetPreset | None, who: str
) -> dict[str, Any]:
    """Return the architecture that an STU-Net trainer builds for a configuration of a plan.

    Args:
        configuration: of a plans file, inheritance resolved.
        preset: the size the trainer's name asks for; None takes the plan's own size, or the
            published default.
        who: the trainer's name, for messages.

    Returns:
        An ``architecture`` entry: the plan's own where it carries an STU-Net, else the preset's
        with the plan's strides.

    Raises:
        PluginError: the plan belongs to another architecture or another size, or its patch does not
            fit the strides.
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
    class_name, kwargs = str(architecture.get("network_class_name")), architecture["arch_kwargs"]
    if class_name == STUNET_CLASS:
        missing = [
            name
            for name in ("strides", "features_per_stage", "n_blocks_per_stage")
            if name not in kwargs
        ]
        if missing:
            raise PluginError(
                f"The STU-Net in the plan of {who} lacks {', '.join(missing)}. {REPLAN}"
            )
        _check_size(kwargs, preset, who)
        resolved = dict(architecture)
    elif class_name.startswith(HOST_ARCHITECTURES) and "strides" in kwargs:
        resolved = stunet_architecture(preset or get_preset(DEFAULT_SIZE), kwargs["strides"])
    else:
        raise PluginError(
            f"{who} cannot use a plan for the network {class_name or '(none named)'!r}. Allowed:"
            " plans of nnU-Net's own planners (-p nnUNetPlans, nnUNetResEncUNetLPlans, ...) and of"
            " STUNetPlanner_<size> (-p STUNetPlans_<size>)."
        )
    strides = as_strides(resolved["arch_kwargs"]["strides"])
    advice = (
        "Set patch_size in the plans file to one of them, or plan again with"
        " nnUNetv2_plan_experiment."
    )
    check_patch_size(configuration["patch_size"], strides, f"The network of {who}", advice)
    if all(
        size == step
        for size, step in zip(configuration["patch_size"], total_stride(strides), strict=True)
    ):
        raise PluginError(
            f"With patch size {list(configuration['patch_size'])} a single voxel is left at the"
            f" deepest stage of {who}, and instance normalisation cannot train on one. Double at"
            " least one axis of the patch in the plans file."
        )
    return resolved


def _check_size(kwargs: Mapping[str, Any], preset: STUNetPreset | None, who: str) -> None:
    """Raise if the STU-Net of a plan is not the published network that the trainer's name
    promises."""
    if preset is None:
        return
    features, blocks = kwargs["features_per_stage"], kwargs["n_blocks_per_stage"]
    features = tuple(features) if isinstance(features, (list, tuple)) else (features,)
    blocks = (blocks,) * len(features) if isinstance(blocks, int) else tuple(blocks)
    if features == preset.features_per_stage and blocks == preset.blocks_per_stage:
        published = stunet_architecture(preset, kwargs["strides"])["arch_kwargs"]
        for name in ("n_stages", "kernel_sizes", "n_blocks_per_stage_decoder"):
            if kwargs.get(name) != published[name] and kwargs.get(name) not in (3, preset.blocks):
                raise PluginError(
                    f"{who} trains the published STU-Net {preset.name}, but the plan has {name}"
                    f" {kwargs.get(name)}, not {published[name]}, and published weights would not"
                    " fit. Use -tr STUNetTrainer to train it as planned."
                )
        return
    planned = find_preset(features, blocks)
    description = (
        f"STU-Net {planned.name}"
        if planned
        else f"an STU-Net with widths {list(features)} and blocks {list(blocks)}"
    )
    advice = (
        f"-tr {who.replace(preset.name, planned.name, 1)} with this plan, or "
        if planned
        else "-tr STUNetTrainer with this plan, or "
    )
    raise PluginError(
        f"{who} trains STU-Net {preset.name} (widths {list(preset.features_per_stage)}), but the"
        f" plan is for {description}. Use {advice}-p STUNetPlans_{preset.name} with this trainer"
        f" (planner STUNetPlanner_{preset.name}). Sizes: {', '.join(PRESETS)}."
    )
