"""Choice of the plan that weights were trained with: the user's, the file's, the published one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import AS_IN_FILE, CONFIGURATION, NIFTI_ENDINGS, READERS
from stunet_plugin.utils.validation import Fields
from stunet_plugin.weights import nnssl
from stunet_plugin.weights.identify import NetworkWeights, Origin
from stunet_plugin.weights.locate import FACTS, PLANS_SUFFIX, Source, published_facts
from stunet_plugin.weights.read_plans import (
    plan_from_v1,
    plan_from_v2,
    read_plans_file,
    with_dataset,
)
from stunet_plugin.weights.source_plan import ZSCORE, SourcePlan
from stunet_plugin.weights.tensors import DIMENSIONS

if TYPE_CHECKING:
    from stunet_plugin.commands.import_ import Import


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
        return with_dataset(found, dataset, f"dataset_json in {source.checkpoint.name}")
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
