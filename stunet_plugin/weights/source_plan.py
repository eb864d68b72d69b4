"""Plan that weights were trained with: read from untrusted plans of nnU-Net v1 or v2, chosen, and
written as a plans file of v2.

Only values that are known and checked are taken over. What nnU-Net looks up by name (normalisation,
resampling, reader, and above all the network's class) is taken from a list or set by us, so no plan
can make nnU-Net import a module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import NUM_STAGES
from stunet_plugin.networks.topology import Strides, check_patch_size, published_strides
from stunet_plugin.nnunet.names import AS_IN_FILE, CONFIGURATION, NIFTI_ENDINGS, PLANS_NAME, READERS
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.validation import Fields, is_number
from stunet_plugin.weights import nnssl
from stunet_plugin.weights.identify import DIMENSIONS, NetworkWeights, Origin
from stunet_plugin.weights.locate import FACTS, PLANS_SUFFIX, Source, published_facts
from stunet_plugin.weights.safe_loading import load_plans_pickle

if TYPE_CHECKING:
    from stunet_plugin.commands.import_ import Import

ZSCORE, CT = "ZScoreNormalization", "CTNormalization"
NORMALIZATIONS = (ZSCORE, CT, "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")

INTENSITIES = "foreground_intensity_properties_per_channel"

_ORDERS = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
_RESAMPLE = "resample_data_or_seg_to_shape"
RESAMPLING: dict[str, Any] = {
    "resampling_fn_data": _RESAMPLE,
    "resampling_fn_seg": _RESAMPLE,
    "resampling_fn_data_kwargs": _ORDERS,
    "resampling_fn_seg_kwargs": _ORDERS | {"is_seg": True, "order": 1},
    "resampling_fn_probabilities": _RESAMPLE,
    "resampling_fn_probabilities_kwargs": _ORDERS | {"order": 1},
}
"""nnU-Net's defaults, v1 and v2 alike: cubic for images, linear for labels and probabilities,
nearest across thick slices."""

_RESAMPLING_FUNCTIONS = (
    _RESAMPLE,
    "resample_torch_simple",
    "resample_torch_fornnunet",
    "no_resampling_hack",
)
_STATISTICS = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
"""Of the foreground, as nnU-Net v2 names them."""
_V1_NAMES = {"max": "mx", "min": "mn", "std": "sd"}


@dataclass(frozen=True)
class SourcePlan:
    """A plan in v2 terms; axes in nnU-Net's transposed order, spacing in mm, sizes in voxels.

    Attributes:
        origin: where it comes from, for people.
        poolings: strides of the stages after the first, not yet fitted to the network.
        normalization, mask_for_norm, channel_names, intensities: one per channel; intensities are
            foreground statistics by nnU-Net's names, empty where the plan has none.
        median_shape: of the training images after resampling.
        published: these are the plan and labels of the published weights.
    """

    origin: str
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    poolings: Strides
    normalization: tuple[str, ...]
    mask_for_norm: tuple[bool, ...]
    channel_names: tuple[str, ...]
    intensities: tuple[dict[str, float], ...]
    batch_size: int = 2
    transpose_forward: tuple[int, ...] = tuple(range(DIMENSIONS))
    median_shape: tuple[float, ...] | None = None
    batch_dice: bool = False
    reader: str = READERS[0]
    file_ending: str = NIFTI_ENDINGS[0]
    resampling: Mapping[str, Any] = field(default_factory=lambda: dict(RESAMPLING))
    published: bool = False

    @property
    def channels(self) -> int:
        return len(self.normalization)

    def strides(self, weights: NetworkWeights) -> Strides:
        """Return the strides of a network: the published six stages of STU-Net cut or pad the
        poolings; any other number must be the plan's own."""
        full: Strides = ((1,) * DIMENSIONS, *self.poolings)
        stages = len(weights.features)
        if stages == NUM_STAGES and weights.kind == "STUNet":
            return published_strides(full)
        if len(full) != stages:
            raise PluginError(
                f"The weights have {stages} stages, so {stages - 1} poolings, but the plan"
                f" ({self.origin}) has {len(self.poolings)}. Give --plans or --strides."
            )
        return full

    def check_network(self, weights: NetworkWeights) -> None:
        """Raise unless the channels are those of the weights, and the strides divide the patch."""
        if self.channels != weights.input_channels:
            raise PluginError(
                f"The weights take {weights.input_channels} image channels, but the plan"
                f" ({self.origin}) has {self.channels}. Give that of the training: --plans FILE."
            )
        check_patch_size(
            self.patch_size,
            self.strides(weights),
            f"The network with the strides of the plan ({self.origin})",
            "Give the plan of the training (--plans), or --patch-size and --strides.",
        )

    def with_channels(self, channels: int) -> SourcePlan:
        """Return the plan for so many channels: the channels' settings over and over."""
        names = ("normalization", "mask_for_norm", "channel_names", "intensities")
        order = [channel % self.channels for channel in range(channels)]
        changes: dict[str, Any] = {x: tuple(getattr(self, x)[i] for i in order) for x in names}
        return replace(self, **changes)

    def to_plans(self, weights: NetworkWeights, dataset_name: str) -> dict[str, Any]:
        """Return the content of ``plans.json``; the architecture is that of the weights."""
        median_shape = list(self.median_shape or self.patch_size)
        return {
            "dataset_name": dataset_name,
            "plans_name": PLANS_NAME,
            # nnU-Net asks for these two, but uses them for nothing once a model is trained.
            "original_median_spacing_after_transp": list(self.spacing),
            "original_median_shape_after_transp": [round(size) for size in median_shape],
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transpose_forward),
            "transpose_backward": list(map(self.transpose_forward.index, range(DIMENSIONS))),
            "configurations": {
                CONFIGURATION: {
                    "data_identifier": f"{PLANS_NAME}_{CONFIGURATION}",
                    "preprocessor_name": "DefaultPreprocessor",
                    "batch_size": self.batch_size,
                    "patch_size": list(self.patch_size),
                    "median_image_size_in_voxels": median_shape,
                    "spacing": list(self.spacing),
                    "normalization_schemes": list(self.normalization),
                    "use_mask_for_norm": list(self.mask_for_norm),
                    **self.resampling,
                    "architecture": weights.architecture(self.strides(weights)),
                    "batch_dice": self.batch_dice,
                }
            },
            # nnU-Net looks this class up by name, so it must be one of its own.
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            INTENSITIES: {
                str(channel): dict(values) for channel, values in enumerate(self.intensities)
            },
        }

    def summary(self) -> str:
        """Return the plan in one line."""
        schemes = self.normalization[: None if len(set(self.normalization)) > 1 else 1]
        return (
            f"spacing {' x '.join(f'{value:g}' for value in self.spacing)} mm, patch"
            f" {' x '.join(map(str, self.patch_size))}, batch {self.batch_size}, poolings"
            f" {list(map(list, self.poolings))}, {', '.join(schemes)}, {self.reader}"
        )


# --- choice


def choose_plan(source: Source, weights: NetworkWeights, options: Import) -> SourcePlan:
    """Return the plan: ``--plans``, the ``.pkl`` beside the file, the checkpoint's own, the
    published one, or the options; each option replaces that part of what is found."""
    dictated = weights.poolings
    if dictated and options.strides:
        raise PluginError(
            f"{weights.title} has the strides {list(map(list, dictated))}. Leave --strides out."
        )
    plan = find_plan(source, weights, options.plans)
    if plan is None and options.spacing and options.patch_size and (options.strides or dictated):
        channels = weights.input_channels
        plan = SourcePlan(
            origin="",
            spacing=options.spacing,
            patch_size=options.patch_size,
            poolings=dictated or (),
            # Published trainings all take a z-score per image.
            normalization=(ZSCORE,) * channels,
            mask_for_norm=(False,) * channels,
            channel_names=tuple(f"channel_{channel}" for channel in range(channels)),
            intensities=({},) * channels,
            # Those that STU-Net saw are all RAS; PyMIC and nnU-Net read as it lies in the file.
            reader=READERS[0] if weights.kind == "STUNet" else AS_IN_FILE,
        )
    if plan is None:
        needed = "--spacing Z Y X --patch-size Z Y X"
        if not dictated:
            needed += " --strides 2,2,2 2,2,2 ... (one per pooling)"
        raise PluginError(
            f"{source.checkpoint} has no plan, no {source.checkpoint.name}{PLANS_SUFFIX} beside it,"
            f" and is none of the published TotalSegmentator weights. Give {needed}, or --plans"
            " FILE (plans.json of nnU-Net v2, or the .pkl of v1)."
        )
    plan = _with_options(plan, options)
    return replace(plan, poolings=dictated) if dictated else plan


def find_plan(
    source: Source, weights: NetworkWeights, plans_file: str | None = None
) -> SourcePlan | None:
    """Return the plan that the user names, that lies beside or in the checkpoint, or the published
    one; None if there is none."""
    configuration = weights.training_argument("configuration", str) or CONFIGURATION
    dataset = weights.training_argument("dataset_json", dict)
    published = _published_plan(weights)
    if plans_file:
        found = read_plans_file(Path(plans_file), configuration)
    elif source.plans_pickle and weights.origin is Origin.V1:
        found = read_plans_file(source.plans_pickle)
    elif plans := weights.training_argument("plans", dict):
        found = plan_from_v2(plans, configuration, f"plans in {source.checkpoint.name}")
    elif plan := nnssl.adaptation_plan(weights.checkpoint):
        return nnssl.read_plan(plan, weights, f"{nnssl.ENTRY} in {source.checkpoint.name}")
    else:
        return published if weights.origin is Origin.V1 else None
    if dataset:
        return _with_dataset(found, dataset, f"dataset_json in {source.checkpoint.name}")
    # The .pkl of a published file says nothing about labels, but these are known.
    same = published and replace(found, origin=published.origin, published=True) == published
    return replace(found, published=bool(same))


def _published_plan(weights: NetworkWeights) -> SourcePlan | None:
    """Return the published plan if size, channels and outputs are those of a published file."""
    facts = published_facts()
    names = {size: name for name, size in facts["checkpoints"].items()}
    name = names.get(weights.preset.name) if weights.preset else None
    if not name or (weights.input_channels, weights.outputs) != (1, len(facts["labels"])):
        return None
    origin = f"the published plan, as size, channels and outputs are those of {name}"
    return replace(plan_from_v1(facts, FACTS), origin=origin, published=True)


def _with_options(plan: SourcePlan, options: Import) -> SourcePlan:
    """Return the plan with the options in place of its own values."""
    given = {"--spacing": options.spacing, "--patch-size": options.patch_size}
    fields, changes = Fields(given, "the command line"), dict[str, Any]()
    if options.spacing is not None:
        changes["spacing"] = fields.positives("--spacing", DIMENSIONS, whole=False)
    if options.patch_size is not None:
        changes["patch_size"] = fields.positives("--patch-size", DIMENSIONS, whole=True)
    if options.strides is not None:
        rows = [[int(x) if x.isdecimal() else x for x in row.split(",")] for row in options.strides]
        steps = Fields({"--strides": rows}, "the command line").strides("--strides", DIMENSIONS)
        # Those of v2 begin with ones.
        changes["poolings"] = steps[1:] if set(steps[0]) == {1} else steps
    if changes:
        changes["origin"] = f"{plan.origin}, with options" if plan.origin else "the command line"
    if options.mask_for_norm:
        changes["mask_for_norm"] = (True,) * plan.channels
    if options.reader is not None:
        changes["reader"] = options.reader
        if options.reader.startswith("Nibabel") and plan.file_ending not in NIFTI_ENDINGS:
            changes["file_ending"] = NIFTI_ENDINGS[0]
    return replace(plan, **changes)


# --- files


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


def _with_dataset(plan: SourcePlan, dataset: Mapping[str, Any], where: str) -> SourcePlan:
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
