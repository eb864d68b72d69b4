"""Plans of nnU-Net v1 and v2, from a file that nobody vouches for to :class:`SourcePlan`.

Only values that are known and checked are taken over. Everything that nnU-Net looks up by name
(normalisation, resampling, reader, and above all the network's class) is taken from a list or set
by us, so no plan can make nnU-Net import a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CONFIGURATION, NIFTI_ENDINGS, READERS
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import Fields, is_number
from stunet_plugin.weights.identify import DIMENSIONS
from stunet_plugin.weights.safe_loading import load_plans_pickle
from stunet_plugin.weights.source_plan import (
    CT,
    IDENTITY,
    INTENSITIES,
    NORMALIZATIONS,
    RESAMPLING,
    ZSCORE,
    SourcePlan,
)

# nnU-Net v1's names of the foreground statistics where they differ from v2's.
_V1_INTENSITIES = {"max": "mx", "min": "mn", "std": "sd"}
_RESAMPLING_FUNCTIONS = (
    "resample_data_or_seg_to_shape",
    "resample_torch_simple",
    "resample_torch_fornnunet",
    "no_resampling_hack",
)
_MAX_INHERITANCE = 5
# Positions in the arguments of an nnU-Net v1 trainer, as `init` in a .model.pkl keeps them.
_INIT_BATCH_DICE, _INIT_STAGE = 4, 5


def read_plans_file(path: Path, configuration: str = CONFIGURATION) -> SourcePlan:
    """Read the plans that a user names: ``plans.json`` of nnU-Net v2, or a ``.pkl`` of nnU-Net v1.

    Raises:
        PluginError: not such a file, or values that make no sense.
    """
    content = read_json(path) if path.suffix == ".json" else load_plans_pickle(path)
    if "configurations" in content:
        return plan_from_v2(content, configuration, path.name)
    return plan_from_v1(content, path.name)


def plan_from_v1(content: Mapping[str, Any], where: str) -> SourcePlan:
    """Translate the plans of nnU-Net v1.

    v1 and v2 store spacing and patch alike (transposed), v1 leaves out the first stage's stride of
    ones, and its scheme for every channel but CT and noNorm is a z-score per image.

    Args:
        content: a ``.model.pkl`` (with ``plans`` and ``init``) or a bare plans file.
        where: its name, for messages.
    """
    trainer = content.get("init", ())
    plans = Fields(content.get("plans", content), where)
    if "plans_per_stage" not in plans:
        raise PluginError(
            f"{where} has no 'plans_per_stage', so spacing and patch size are unknown (the"
            " published plans.pkl lacks them too). Take the .model.pkl that belongs to the"
            " checkpoint."
        )
    stages = plans.per_channel("plans_per_stage")
    wanted = (
        str(trainer[_INIT_STAGE])
        if isinstance(trainer, tuple) and len(trainer) > _INIT_STAGE
        else ""
    )
    number = wanted if wanted in stages else list(stages)[-1]
    stage = Fields(stages[number], f"{where}, stage {number}")
    schemes = plans.per_channel("normalization_schemes")
    channels = [str(channel) for channel in schemes]
    masks = plans.per_channel("use_mask_for_norm", dict.fromkeys(channels, False))
    names = plans.per_channel("modalities", schemes)
    if not len(schemes) == len(masks) == len(names):
        raise PluginError(
            f"{where} has {len(schemes)} normalisation schemes, {len(masks)} masks and {len(names)}"
            " modalities."
        )
    normalization = tuple(_v1_normalization(schemes[channel], where) for channel in channels)
    return SourcePlan(
        origin=where,
        spacing=stage.positives("current_spacing", DIMENSIONS, whole=False),
        patch_size=stage.positives("patch_size", DIMENSIONS, whole=True),
        poolings=stage.strides("pool_op_kernel_sizes", DIMENSIONS),
        batch_size=stage.integer("batch_size", 1),
        normalization=normalization,
        mask_for_norm=tuple(Fields(masks, where).boolean(channel) for channel in channels),
        channel_names=tuple(str(names[channel])[:50] for channel in channels),
        intensities=_v1_intensities(plans, channels, normalization),
        transpose_forward=plans.permutation("transpose_forward", DIMENSIONS),
        transpose_backward=plans.permutation("transpose_backward", DIMENSIONS),
        median_shape=_median_shape(stage, "median_patient_size_in_voxels"),
        batch_dice=(
            bool(trainer[_INIT_BATCH_DICE])
            if isinstance(trainer, tuple) and len(trainer) > _INIT_BATCH_DICE
            else False
        ),
    )


def plan_from_v2(content: Mapping[str, Any], configuration: str, where: str) -> SourcePlan:
    """Translate one configuration of nnU-Net v2 plans, of the present format or that before 2.3.

    Raises:
        PluginError: no such configuration, one in 2D or of a cascade, or values that make no sense.
    """
    plans = Fields(content, where)
    chosen = _resolve_configuration(plans, configuration)
    if "previous_stage" in chosen:
        raise PluginError(
            f"{where}, {configuration} is the second stage of a cascade, which cannot be imported"
            " on its own."
        )
    if "architecture" in chosen:
        strides = chosen.fields("architecture").fields("arch_kwargs").strides("strides", DIMENSIONS)
    else:
        strides = chosen.strides("pool_op_kernel_sizes", DIMENSIONS)
    if any(step != 1 for step in strides[0]):
        raise PluginError(
            f"{where}: the first stage's stride must be all ones, not {list(strides[0])}."
        )
    normalization = chosen.per_channel("normalization_schemes")
    masks = chosen.per_channel("use_mask_for_norm", dict.fromkeys(normalization, False))
    if len(masks) != len(normalization):
        raise PluginError(
            f"{where} has {len(normalization)} normalisation schemes and {len(masks)} masks."
        )
    schemes = tuple(
        Fields(normalization, where).choice(channel, NORMALIZATIONS) for channel in normalization
    )
    resampling: dict[str, Any] = {}
    for key, default in RESAMPLING.items():
        if isinstance(default, str):
            resampling[key] = chosen.choice(key, _RESAMPLING_FUNCTIONS, default)
        else:
            resampling[key] = _plain_options(chosen.fields(key, default))
    return SourcePlan(
        origin=where,
        spacing=chosen.positives("spacing", DIMENSIONS, whole=False),
        patch_size=chosen.positives("patch_size", DIMENSIONS, whole=True),
        poolings=strides[1:],
        batch_size=chosen.integer("batch_size", 1),
        normalization=schemes,
        mask_for_norm=tuple(Fields(masks, where).boolean(channel) for channel in masks),
        channel_names=tuple(f"channel_{channel}" for channel in normalization),
        intensities=_v2_intensities(plans, schemes),
        transpose_forward=plans.permutation("transpose_forward", DIMENSIONS, IDENTITY),
        transpose_backward=plans.permutation("transpose_backward", DIMENSIONS, IDENTITY),
        median_shape=_median_shape(chosen, "median_image_size_in_voxels"),
        batch_dice=chosen.boolean("batch_dice", False),
        reader=plans.choice("image_reader_writer", READERS, READERS[0]),
        resampling=resampling,
    )


def with_dataset(plan: SourcePlan, dataset: Mapping[str, Any], where: str) -> SourcePlan:
    """Take channel names and the images' file ending from a ``dataset.json``, where it has them."""
    fields = Fields(dataset, where)
    if "channel_names" in fields or "modality" in fields:
        names = fields.per_channel("channel_names" if "channel_names" in fields else "modality")
        if len(names) == plan.channels:
            plan = replace(plan, channel_names=tuple(str(name)[:50] for name in names.values()))
    ending = fields.get("file_ending", plan.file_ending)
    if plan.reader.startswith("Nibabel") and ending not in NIFTI_ENDINGS:
        ending = NIFTI_ENDINGS[0]
    if (
        not isinstance(ending, str)
        or not ending.startswith(".")
        or not ending.replace(".", "").isalnum()
    ):
        raise fields.wrong("file_ending", "an ending such as .nii.gz")
    return replace(plan, file_ending=ending)


def _resolve_configuration(plans: Fields, name: str) -> Fields:
    """Follow ``inherits_from``, as nnU-Net does."""
    configurations = plans.fields("configurations")
    merged: dict[str, Any] = {}
    following: Any = name
    for _ in range(_MAX_INHERITANCE):
        current = configurations.fields(following)
        merged = {**current.values, **merged}
        following = current.get("inherits_from", None)
        if following is None:
            return Fields(merged, f"{plans.where}, {name}")
    raise PluginError(f"{plans.where}: the configuration {name} inherits without end.")


def _median_shape(fields: Fields, key: str) -> tuple[float, ...] | None:
    return fields.positives(key, DIMENSIONS, whole=False) if key in fields else None


def _v1_normalization(scheme: object, where: str) -> str:
    if scheme == "CT2":
        raise PluginError(
            f"{where} normalises with 'CT2' (a z-score within the clipping range), which nnU-Net v2"
            " does not have."
        )
    return {"CT": CT, "noNorm": "NoNormalization"}.get(str(scheme), ZSCORE)


def _v1_intensities(
    plans: Fields, channels: list[str], normalization: tuple[str, ...]
) -> tuple[dict[str, float], ...]:
    """Foreground statistics; v1 has them for CT alone, and ``None`` for datasets without CT."""
    properties = plans.get("dataset_properties", None) or {}
    statistics = Fields(properties, plans.where).get("intensityproperties", None)
    table = (
        Fields({"intensities": statistics}, plans.where).per_channel("intensities")
        if statistics
        else {}
    )
    found = []
    for channel, scheme in zip(channels, normalization, strict=True):
        entry = Fields(table.get(channel, {}), f"{plans.where}, intensities of channel {channel}")
        wanted = {name: _V1_INTENSITIES.get(name, name) for name in INTENSITIES}
        found.append(
            {name: entry.number(v1) for name, v1 in wanted.items() if scheme == CT or v1 in entry}
        )
    return tuple(found)


def _v2_intensities(plans: Fields, schemes: tuple[str, ...]) -> tuple[dict[str, float], ...]:
    key = "foreground_intensity_properties_per_channel"
    older = "foreground_intensity_properties_by_modality"
    table = Fields(plans.get(key, plans.get(older, {})) or {}, f"{plans.where}, {key}")
    found = []
    for channel, scheme in enumerate(schemes):
        entry = table.fields(str(channel), {})
        found.append(
            {name: entry.number(name) for name in INTENSITIES if scheme == CT or name in entry}
        )
    return tuple(found)


def _plain_options(options: Fields) -> dict[str, Any]:
    """Keyword arguments of a resampling function: numbers, text, true, false or nothing."""
    for name, value in options.values.items():
        if not isinstance(name, str) or not (
            value is None or isinstance(value, (bool, str)) or is_number(value)
        ):
            raise options.wrong(name, "a number, text, true, false or null")
    return dict(options.values)
