"""Reader of untrusted plans of nnU-Net v1 and v2.

Only values that are known and checked are taken over. What nnU-Net looks up by name (normalisation,
resampling, reader, and above all the network's class) is taken from a list or set by us, so no plan
can make nnU-Net import a module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CONFIGURATION, NIFTI_ENDINGS, READERS
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import Fields, is_number
from stunet_plugin.weights.safe_loading import load_plans_pickle
from stunet_plugin.weights.source_plan import (
    CT,
    INTENSITIES,
    NORMALIZATIONS,
    RESAMPLE,
    RESAMPLING,
    ZSCORE,
    SourcePlan,
)
from stunet_plugin.weights.tensors import DIMENSIONS

_RESAMPLING_FUNCTIONS = (
    RESAMPLE,
    "resample_torch_simple",
    "resample_torch_fornnunet",
    "no_resampling_hack",
)
_STATISTICS = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
"""Of the foreground, as nnU-Net v2 names them."""
_V1_NAMES = {"max": "mx", "min": "mn", "std": "sd"}


def read_plans_file(path: Path, configuration: str = CONFIGURATION) -> SourcePlan:
    """Read ``plans.json`` of nnU-Net v2, or a ``.pkl`` of nnU-Net v1."""
    content = read_json(path) if path.suffix == ".json" else load_plans_pickle(path)
    if "configurations" in content:
        return plan_from_v2(content, configuration, path.name)
    return plan_from_v1(content, path.name)


def plan_from_v1(content: Mapping[str, Any], where: str) -> SourcePlan:
    """Translate the plans of nnU-Net v1: a ``.model.pkl`` (with ``plans`` and ``init``) or a bare
    plans file. v1 leaves out the first stage's stride of ones; its schemes but CT and noNorm are a
    z-score per image."""
    plans = Fields(content.get("plans", content), where)
    if "plans_per_stage" not in plans:
        advice = "Take the .model.pkl of the checkpoint, which has spacing and patch size."
        raise PluginError(f"{where} has no 'plans_per_stage', as the published plans.pkl. {advice}")
    # Arguments of the trainer: the fifth is batch_dice, the sixth the stage; else the finest.
    trainer = content.get("init")
    batch_dice, wanted = trainer[4:6] if isinstance(trainer, tuple) and trainer[5:] else (False, "")
    stages = plans.per_channel("plans_per_stage")
    number = str(wanted) if str(wanted) in stages else list(stages)[-1]
    stage = Fields(stages[number], f"{where}, stage {number}")
    schemes = plans.per_channel("normalization_schemes")
    if "CT2" in schemes.values():
        raise PluginError(f"{where} normalises with 'CT2', which nnU-Net v2 does not have.")
    known = {"CT": CT, "noNorm": "NoNormalization"}
    normalization = tuple(known.get(str(scheme), ZSCORE) for scheme in schemes.values())
    # v1 has statistics for CT alone, and None for datasets without CT.
    properties = Fields(plans.get("dataset_properties", None) or {}, where)
    given = properties.get("intensityproperties", None)
    table = Fields(properties.per_channel("intensityproperties") if given else {}, where)
    return SourcePlan(
        origin=where,
        poolings=stage.strides("pool_op_kernel_sizes", DIMENSIONS),
        intensities=_intensities(table, normalization, _V1_NAMES),
        batch_dice=bool(batch_dice),
        **_common(plans, stage, normalization, plans.per_channel("modalities", schemes)),
    )


def plan_from_v2(content: Mapping[str, Any], configuration: str, where: str) -> SourcePlan:
    """Translate one configuration of nnU-Net v2 plans, of the present format or that before 2.3."""
    plans = Fields(content, where)
    chosen = resolve_configuration(plans, configuration)
    if "previous_stage" in chosen:
        raise PluginError(f"{chosen.where} is the second stage of a cascade, no use on its own.")
    if "architecture" in chosen:
        strides = chosen.fields("architecture").fields("arch_kwargs").strides("strides", DIMENSIONS)
    else:
        strides = chosen.strides("pool_op_kernel_sizes", DIMENSIONS)
    if set(strides[0]) != {1}:
        raise PluginError(f"{where}: the first stage's stride must be all ones, not {strides[0]}.")
    schemes = chosen.per_channel("normalization_schemes")
    normalization = tuple(Fields(schemes, where).choice(x, NORMALIZATIONS) for x in schemes)
    older = "foreground_intensity_properties_by_modality"
    table = Fields(plans.get(INTENSITIES, plans.get(older, {})) or {}, f"{where}, {INTENSITIES}")
    return SourcePlan(
        origin=where,
        poolings=strides[1:],
        intensities=_intensities(table, normalization, {}),
        batch_dice=chosen.boolean("batch_dice", False),
        reader=plans.choice("image_reader_writer", READERS, READERS[0]),
        resampling={key: _resampling(chosen, key) for key in RESAMPLING},
        **_common(plans, chosen, normalization, {x: f"channel_{x}" for x in schemes}),
    )


def _common(
    plans: Fields, chosen: Fields, normalization: tuple[str, ...], names: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what both versions have in the whole file or the chosen stage or configuration."""
    # v1 keeps the masks beside the stages, v2 in the configuration.
    holder = chosen if "use_mask_for_norm" in chosen else plans
    channels = {str(channel): False for channel in range(len(normalization))}
    masks = holder.per_channel("use_mask_for_norm", channels)
    if not len(masks) == len(normalization) == len(names):
        raise PluginError(
            f"{plans.where} has {len(normalization)} normalisation schemes, {len(masks)} masks and"
            f" {len(names)} channels."
        )
    spacing = "spacing" if "spacing" in chosen else "current_spacing"
    medians = ("median_image_size_in_voxels", "median_patient_size_in_voxels")
    median = next((key for key in medians if key in chosen), None)
    return {
        "spacing": chosen.positives(spacing, DIMENSIONS, whole=False),
        "patch_size": chosen.positives("patch_size", DIMENSIONS, whole=True),
        "batch_size": chosen.integer("batch_size", 1),
        "normalization": normalization,
        "channel_names": tuple(str(name)[:50] for name in names.values()),
        "mask_for_norm": tuple(Fields(masks, plans.where).boolean(channel) for channel in masks),
        "transpose_forward": plans.permutation("transpose_forward", DIMENSIONS),
        "median_shape": chosen.positives(median, DIMENSIONS, whole=False) if median else None,
    }


def _resampling(fields: Fields, key: str) -> Any:
    """Return the name of a resampling function, or its keyword arguments."""
    if isinstance(default := RESAMPLING[key], str):
        return fields.choice(key, _RESAMPLING_FUNCTIONS, default)
    options = fields.fields(key, default)
    for name, value in options.values.items():
        plain = value is None or isinstance(value, (bool, str)) or is_number(value)
        if not isinstance(name, str) or not plain:
            raise options.wrong(name, "a number, text, true, false or null")
    return dict(options.values)


def with_dataset(plan: SourcePlan, dataset: Mapping[str, Any], where: str) -> SourcePlan:
    """Take channel names and the images' file ending from a ``dataset.json``, where it has them."""
    fields = Fields(dataset, where)
    key = "channel_names" if "channel_names" in fields else "modality"
    if key in fields and len(names := fields.per_channel(key)) == plan.channels:
        plan = replace(plan, channel_names=tuple(str(name)[:50] for name in names.values()))
    ending = fields.get("file_ending", plan.file_ending)
    if plan.reader.startswith("Nibabel") and ending not in NIFTI_ENDINGS:
        ending = NIFTI_ENDINGS[0]
    if not re.fullmatch(r"(\.[A-Za-z0-9]+)+", str(ending)):
        raise fields.wrong("file_ending", "an ending such as .nii.gz")
    return replace(plan, file_ending=ending)


def resolve_configuration(plans: Fields, name: str) -> Fields:
    """Follow ``inherits_from``, as nnU-Net does."""
    configurations = plans.fields("configurations")
    merged, following = dict[str, Any](), name
    for _ in range(5):
        current = configurations.fields(following)
        merged = {**current.values, **merged}
        following = current.get("inherits_from", None)
        if following is None:
            return Fields(merged, f"{plans.where}, {name}")
    raise PluginError(f"{plans.where}: the configuration {name} inherits without end.")


def _intensities(
    table: Fields, normalization: tuple[str, ...], names: Mapping[str, str]
) -> tuple[dict[str, float], ...]:
    """Return the foreground statistics of each channel; those of a CT are needed. ``names``: v2's
    name of a statistic to that in the table, where these differ."""
    found = []
    for channel, scheme in enumerate(normalization):
        entry = table.fields(str(channel), {})
        given = {name: names.get(name, name) for name in _STATISTICS}
        found.append({x: entry.number(y) for x, y in given.items() if scheme == CT or y in entry})
    return tuple(found)
