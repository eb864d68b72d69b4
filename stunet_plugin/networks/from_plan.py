"""Architecture of a plan: the network that trainers and planners build for a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import presets
from stunet_plugin.networks.anisotropy import USE_FOR_2D, AnisotropyMode, choose_mode, get_mode
from stunet_plugin.networks.presets import MISFMPreset, STUNetPreset, UNETRPreset
from stunet_plugin.networks.topology import (
    as_strides,
    check_patch_size,
    published_strides,
    token_strides,
    total_stride,
)

STUNET_CLASS = "stunet_plugin.networks.stunet.STUNet"
HOST_ARCHITECTURES = "dynamic_network_architectures.architectures.unet."
"""Module of the U-Nets that nnU-Net's own planners plan; we take over their strides."""

WITH_OPTIONS = "stunet_plugin.networks.network_options.build_with_options"
"""What a plan with network options names as its network."""
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})

REPLAN = "Fix the plans file, or plan again with nnUNetv2_plan_experiment."


class Resolved(NamedTuple):
    """An ``architecture`` entry of a plans file, for a mode of MIS-FM why it was chosen, and a line
    for each network option."""

    architecture: dict[str, Any]
    reason: str = ""
    options: tuple[str, ...] = ()


def resolve(
    configuration: Mapping[str, Any],
    network: STUNetPreset | MISFMPreset | UNETRPreset | None,
    who: str,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> Resolved:
    """Return the architecture that a trainer builds for a configuration of a plan.

    It is the plan's own where that names the trainer's network, else the trainer's with the
    strides, or for a network of MIS-FM the mode, that suit the plan of nnU-Net's planner. The
    plan's network options are kept.

    Args:
        configuration: of a plans file, inheritance resolved.
        network: what the trainer's name asks for; None is an STU-Net of the plan's size, or base.
        who: the trainer's name, for messages.
        options: network options that the trainer adds, by name, with numbers that are not to be
            chosen by the plan.
    """
    configuration, planned = _without_options(configuration, who)
    architecture, patch = configuration.get("architecture"), configuration.get("patch_size")
    kwargs = architecture.get("arch_kwargs") if isinstance(architecture, Mapping) else None
    if not isinstance(architecture, Mapping) or not isinstance(kwargs, Mapping):
        raise PluginError(f"The plan of {who} has no architecture with arch_kwargs. {REPLAN}")
    if not isinstance(patch, (list, tuple)) or not all(
        isinstance(size, (int, np.integer)) for size in patch
    ):
        raise PluginError(
            f"patch_size in the plan of {who} must be a list of integers, not {patch!r}. {REPLAN}"
        )
    if isinstance(network, UNETRPreset):
        # Pads images to what its strides divide.
        found = _resolve_unetr(configuration, network, who)
        return with_options(found, {**options, **planned}, patch, who)
    if isinstance(network, MISFMPreset):
        resolved = _resolve_misfm(configuration, network, who)
        advice = f"Plan with -pl {network.planner}, or set patch_size in the plans file."
    else:
        resolved = _resolve_stunet(architecture, network, who)
        advice = "Set patch_size in the plans file to one of them, or plan again."
    strides = as_strides(resolved.architecture["arch_kwargs"]["strides"])
    check_patch_size(patch, strides, f"The network of {who}", advice)
    if tuple(patch) == total_stride(strides) and network is not presets.PCTNET:
        raise PluginError(
            f"Patch size {list(patch)} leaves a single voxel at the deepest stage of {who}, too few"
            " for instance norm. Double at least one axis in the plans file."
        )
    return with_options(resolved, {**options, **planned}, patch, who)


def resolve_planned(
    configuration: Mapping[str, Any], who: str, options: Mapping[str, Any] = NO_OPTIONS
) -> Resolved:
    """Return the architecture that a configuration of a plan names, with network options that the
    trainer adds; raise a PluginError unless it lists its strides, by which outputs and targets
    pair, and these divide the patch."""
    configuration, planned = _without_options(configuration, who)
    architecture = configuration.get("architecture")
    kwargs = architecture.get("arch_kwargs") if isinstance(architecture, Mapping) else None
    if not isinstance(architecture, Mapping) or "strides" not in (kwargs or {}):
        raise PluginError(
            f"{who} needs a plan whose network has one output per resolution stage, with its"
            f" strides under arch_kwargs, as nnU-Net plans its U-Nets. {REPLAN}"
        )
    strides = as_strides(architecture["arch_kwargs"]["strides"])
    if is_host_unet(architecture):
        advice = "Set patch_size in the plans file to one of them, or plan again."
        check_patch_size(configuration["patch_size"], strides, f"The network of {who}", advice)
    resolved, added = Resolved(dict(architecture)), {**options, **planned}
    return with_options(resolved, added, configuration["patch_size"], who)


def options_of(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the network options of a configuration of a plan, by name, as they are there."""
    architecture = configuration.get("architecture")
    if not isinstance(architecture, Mapping) or not _has_options(architecture):
        return NO_OPTIONS
    kwargs = architecture.get("arch_kwargs")
    options = kwargs.get("options") if isinstance(kwargs, Mapping) else None
    return options if isinstance(options, Mapping) else {"unreadable": {}}


def _has_options(architecture: Mapping[str, Any]) -> bool:
    return architecture.get("network_class_name") == WITH_OPTIONS


def _without_options(
    configuration: Mapping[str, Any], who: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return a configuration with its network alone, and its network options."""
    architecture = configuration.get("architecture")
    if not isinstance(architecture, Mapping) or not _has_options(architecture):
        return configuration, NO_OPTIONS
    kwargs = architecture.get("arch_kwargs")
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    network, options = kwargs.get("network"), kwargs.get("options")
    if not isinstance(network, Mapping) or not isinstance(options, Mapping):
        raise PluginError(
            f"The plan of {who} has network options, but its arch_kwargs lack network or options"
            f" (tables). {REPLAN}"
        )
    return {**configuration, "architecture": network}, options


def with_options(
    resolved: Resolved, options: Mapping[str, Any], patch: Sequence[int], who: str
) -> Resolved:
    """Return the same with network options around the network; without any, as it is."""
    if not options:
        return resolved
    # Imports torch.
    from stunet_plugin.networks.network_options import complete_options

    network = resolved.architecture
    numbers, lines = complete_options(network, options, patch, who)
    kwargs = {
        "network": network,
        "options": numbers,
        "patch_size": [int(size) for size in patch],
        "strides": network["arch_kwargs"]["strides"],
    }
    entry = {"network_class_name": WITH_OPTIONS, "arch_kwargs": kwargs, "_kw_requires_import": []}
    return resolved._replace(architecture=entry, options=tuple(lines))


def is_host_unet(architecture: Mapping[str, Any]) -> bool:
    """Return whether an ``architecture`` entry names one of nnU-Net's U-Nets."""
    return str(architecture.get("network_class_name")).startswith(HOST_ARCHITECTURES)


def _resolve_stunet(
    architecture: Mapping[str, Any], preset: STUNetPreset | None, who: str
) -> Resolved:
    planned, kwargs = str(architecture.get("network_class_name")), architecture["arch_kwargs"]
    if planned == STUNET_CLASS:
        needed = ("strides", "features_per_stage", "n_blocks_per_stage")
        if missing := [name for name in needed if name not in kwargs]:
            raise PluginError(f"The plan of {who} lacks {', '.join(missing)}. {REPLAN}")
        if preset is not None:
            _check_size(kwargs, preset, who)
        return Resolved(dict(architecture))
    if planned.startswith(HOST_ARCHITECTURES) and "strides" in kwargs:
        size = preset or presets.PRESETS[presets.DEFAULT_SIZE]
        return Resolved(stunet_architecture(size, kwargs["strides"]))
    raise _other_network(who, planned, "STUNetPlanner_<size> (-p STUNetPlans_<size>)")


def _check_size(kwargs: Mapping[str, Any], preset: STUNetPreset, who: str) -> None:
    features, blocks = kwargs["features_per_stage"], kwargs["n_blocks_per_stage"]
    features = tuple(features) if isinstance(features, (list, tuple)) else (features,)
    blocks = (blocks,) * len(features) if isinstance(blocks, int) else tuple(blocks)
    if (features, blocks) == (preset.features_per_stage, preset.blocks_per_stage):
        published = stunet_architecture(preset, kwargs["strides"])["arch_kwargs"]
        for name in ("n_stages", "kernel_sizes", "n_blocks_per_stage_decoder"):
            if kwargs.get(name) not in (published[name], 3, preset.blocks):
                raise PluginError(
                    f"{who} trains the published STU-Net {preset.name} with {name}"
                    f" {published[name]}, but the plan has {kwargs.get(name)}, which published"
                    " weights do not fit. Use -tr STUNetTrainer to train it as planned."
                )
        return
    planned = presets.find_preset(features, blocks)
    description = f"STU-Net {planned.name}" if planned else f"widths {features}, blocks {blocks}"
    trainer = who.replace(preset.name, planned.name, 1) if planned else "STUNetTrainer"
    raise PluginError(
        f"{who} trains STU-Net {preset.name}, but the plan is for {description}. Use -tr {trainer},"
        f" or -p STUNetPlans_{preset.name} (planner STUNetPlanner_{preset.name})."
    )


def _resolve_misfm(configuration: Mapping[str, Any], network: MISFMPreset, who: str) -> Resolved:
    architecture, patch = configuration["architecture"], configuration["patch_size"]
    planned, kwargs = str(architecture.get("network_class_name")), architecture["arch_kwargs"]
    if len(patch) != 3:
        raise PluginError(f"{who} cannot train with patch size {list(patch)}. {USE_FOR_2D}")
    if planned == network.class_name:
        if "mode" not in kwargs:
            raise PluginError(f"The {network.name} in the plan of {who} lacks its mode. {REPLAN}")
        mode, reason = (
            get_mode(kwargs["mode"]),
            f"{network.name}: Mode {kwargs['mode']}, as the plan says.",
        )
        # Widths and the like that somebody set in the plans file are kept.
        kwargs = {**kwargs, **network.architecture(mode)["arch_kwargs"]}
        return Resolved({**architecture, "arch_kwargs": kwargs}, reason)
    if not planned.startswith(HOST_ARCHITECTURES):
        raise _other_network(who, planned, f"{network.planner} (-p {network.plans})")
    mode, reason = choose_mode(_spacing(configuration, who), patch)
    return Resolved(network.architecture(mode), f"{network.name}: {reason}")


def _resolve_unetr(configuration: Mapping[str, Any], preset: UNETRPreset, who: str) -> Resolved:
    """Return the UNETR of a plan, if it is of this size and prunes tokens or not as the preset
    does, else the preset's for a plan of nnU-Net's U-Nets."""
    architecture, patch = configuration["architecture"], configuration["patch_size"]
    planned, kwargs = str(architecture.get("network_class_name")), architecture["arch_kwargs"]
    if planned == preset.class_name:
        own = preset.architecture((), ())["arch_kwargs"]
        wrong = [x for x in ("width", "depth", "heads", "features") if kwargs.get(x) != own[x]]
        if (kwargs.get("pruning") is None) != (preset.ratio is None):
            wrong.append("pruning")
        if wrong:
            raise PluginError(
                f"{who} trains {preset.name}, but the UNETR in the plan has {wrong[0]}"
                f" {kwargs.get(wrong[0])}, not {own[wrong[0]]}. Train it as planned with -tr"
                " PlannedTrainer, or with the trainer of its size (`stunet list --trainers`)."
            )
        return Resolved({**architecture, "arch_kwargs": {**kwargs, "patch_size": list(patch)}})
    if not is_host_unet(architecture):
        raise _other_network(who, planned, f"UNETRPlanner{preset.suffix}")
    strides = token_strides(_spacing(configuration, who), patch)
    token = " x ".join(map(str, total_stride(strides[:-1])))
    return Resolved(preset.architecture(strides, patch), f"{preset.name}: tokens of {token} voxels")


def _spacing(configuration: Mapping[str, Any], who: str) -> list[float]:
    spacing = configuration.get("spacing")
    if not isinstance(spacing, (list, tuple, np.ndarray)):
        raise PluginError(f"spacing in the plan of {who} must be a list, not {spacing!r}. {REPLAN}")
    return [float(step) for step in spacing]


def _other_network(who: str, planned: str, ours: str) -> PluginError:
    return PluginError(
        f"{who} cannot use a plan for the network {planned or '(none named)'!r}. Allowed: plans of"
        f" nnU-Net's own planners (-p nnUNetPlans, ...) and of {ours}."
    )


def stunet_architecture(preset: STUNetPreset, strides: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the ``architecture`` entry of a plans file for a size of STU-Net; a plan's strides are
    cut or padded to the published six stages."""
    blocks, fitted = preset.blocks_per_stage, published_strides(strides)
    return architecture_entry(preset.features_per_stage, blocks, blocks[:-1], fitted)


def architecture_entry(
    features: Sequence[int],
    blocks: Sequence[int],
    decoder_blocks: Sequence[int],
    strides: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Return the same for an STU-Net of any size; all arguments are one value per stage."""
    dimensions = len(strides[0])
    return {
        "network_class_name": STUNET_CLASS,
        "arch_kwargs": {
            "n_stages": len(strides),
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions for _ in strides],
            "strides": [list(stage) for stage in strides],
            "n_blocks_per_stage": list(blocks),
            "n_blocks_per_stage_decoder": list(decoder_blocks),
        },
        "_kw_requires_import": ["conv_op"],
    }


def fitting_patch(
    spacing: Sequence[float], patch_size: Sequence[int]
) -> tuple[list[int], AnisotropyMode]:
    """Return the multiples of a mode's reduction nearest to a wished patch, and the mode of MIS-FM
    that suits the spacing.

    At least two per axis: a single voxel leaves nothing to attend to, and batch norm little to
    count.
    """
    # A patch that every mode divides: here the patch follows the mode.
    mode, _ = choose_mode(spacing, [step * 2 for step in get_mode(0).reduction])
    # Half a step is rounded up: a patch that covers the image is worth some padding.
    fitted = [
        max((int(size) + step // 2) // step, 2) * step
        for size, step in zip(patch_size, mode.reduction, strict=True)
    ]
    return fitted, mode
