"""Plan and labels of an imported checkpoint: the user's word first, then what is nearest to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.topology import Strides
from stunet_plugin.nnunet.names import AS_IN_FILE, CONFIGURATION, NIFTI_ENDINGS, TO_RAS
from stunet_plugin.utils.validation import Fields
from stunet_plugin.weights.identify import DIMENSIONS, NetworkWeights, Origin
from stunet_plugin.weights.locate import PLANS_SUFFIX, Source
from stunet_plugin.weights.misfm import PYMIC_ORIGINS
from stunet_plugin.weights.output_labels import Labels
from stunet_plugin.weights.read_plans import (
    plan_from_v1,
    plan_from_v2,
    read_plans_file,
    with_dataset,
)
from stunet_plugin.weights.safe_loading import load_plans_pickle
from stunet_plugin.weights.source_plan import ZSCORE, SourcePlan
from stunet_plugin.weights.stunet import STUNetWeights

if TYPE_CHECKING:
    from stunet_plugin.commands.import_ import Import

DATA_FILE = "published_stunet.json"


def choose_plan(source: Source, weights: NetworkWeights, options: Import) -> SourcePlan:
    """Return the plan: ``--plans``, the ``.pkl`` beside the file, the checkpoint's own, the
    published one, or the options; each option replaces that part of what is found.

    Raises:
        PluginError: none of them, with what to give.
    """
    dictated = weights.poolings
    if dictated and options.strides:
        network = weights.description.partition(" (")[0]
        raise PluginError(
            f"{network} has the strides {[list(step) for step in dictated]}. Leave --strides out."
        )
    plan = find_plan(source, weights, options.plans)
    if plan is None and options.spacing and options.patch_size and (options.strides or dictated):
        plan = _blank(weights)
    if plan is not None:
        plan = _with_options(plan, options)
        return replace(plan, poolings=dictated) if dictated else plan
    if dictated:
        raise PluginError(
            f"{source.checkpoint} does not say how its images were prepared. Give the spacing and"
            " the patch size of that training: --spacing Z Y X --patch-size Z Y X (or --plans"
            " FILE, a plans.json of nnU-Net v2)."
        )
    raise PluginError(
        f"{source.checkpoint} does not say how its images were prepared: there is no"
        f" {source.checkpoint.name}{PLANS_SUFFIX} beside it, no plan in it, and it is none of the"
        " four published TotalSegmentator weights (small, base, large, huge; 1 channel, 105"
        " outputs). Give --plans FILE (plans.json of nnU-Net v2, or the .pkl of v1), or all of"
        " --spacing Z Y X --patch-size Z Y X --strides 2,2,2 2,2,2 ... (one per pooling)."
    )


def _with_options(plan: SourcePlan, options: Import) -> SourcePlan:
    """Return the plan with the options in place of its own values."""
    fields = Fields(
        {"--spacing": options.spacing, "--patch-size": options.patch_size}, "the command line"
    )
    changes: dict[str, Any] = {}
    if options.spacing is not None:
        changes["spacing"] = fields.positives("--spacing", DIMENSIONS, whole=False)
    if options.patch_size is not None:
        changes["patch_size"] = fields.positives("--patch-size", DIMENSIONS, whole=True)
    if options.strides is not None:
        changes["poolings"] = parse_strides(options.strides)
    if changes:
        changes["origin"] = f"{plan.origin}, with options" if plan.origin else "the command line"
    if options.mask_for_norm:
        changes["mask_for_norm"] = (True,) * plan.channels
    if options.reader is not None:
        changes["reader"] = options.reader
        if options.reader.startswith("Nibabel") and plan.file_ending not in NIFTI_ENDINGS:
            changes["file_ending"] = NIFTI_ENDINGS[0]
    return replace(plan, **changes)


def _blank(weights: NetworkWeights) -> SourcePlan:
    """Return a plan whose spacing, patch and strides are still to be set. Published trainings all
    take a z-score per image."""
    channels = weights.input_channels
    return SourcePlan(
        origin="",
        spacing=(1.0,) * DIMENSIONS,
        patch_size=(1,) * DIMENSIONS,
        poolings=(),
        normalization=(ZSCORE,) * channels,
        mask_for_norm=(False,) * channels,
        channel_names=tuple(f"channel_{channel}" for channel in range(channels)),
        intensities=({},) * channels,
        # PyMIC reads images as they lie in the file; TotalSegmentator's, which STU-Net was trained
        # on, are all RAS.
        reader=AS_IN_FILE if weights.origin in PYMIC_ORIGINS else TO_RAS,
    )


def find_plan(
    source: Source, weights: NetworkWeights, plans_file: str | None = None
) -> SourcePlan | None:
    """Return the plan that the user names, that lies beside or in the checkpoint, or the published
    one; None if there is none."""
    configuration = weights.training_argument("configuration", str) or CONFIGURATION
    dataset = weights.training_argument("dataset_json", dict)
    published = published_checkpoint(weights)
    if plans_file:
        found = read_plans_file(Path(plans_file), configuration)
    elif source.plans_pickle and weights.origin is Origin.V1:
        found = plan_from_v1(load_plans_pickle(source.plans_pickle), source.plans_pickle.name)
    elif plans := weights.training_argument("plans", dict):
        found = plan_from_v2(plans, configuration, f"plans in {source.checkpoint.name}")
    elif published and weights.origin is Origin.V1:
        return published_plan(published)
    else:
        return None
    if dataset:
        return with_dataset(found, dataset, f"dataset_json in {source.checkpoint.name}")
    # The .pkl of a published file says nothing about labels, but it is the published plan, whose
    # labels are known.
    same = published is not None and replace(found, origin="") == replace(
        published_plan(published), origin="", published=False
    )
    return replace(found, published=same)


def choose_labels(
    source: Source, weights: NetworkWeights, plan: SourcePlan | None, given: Sequence[str] | None
) -> Labels:
    """Return the labels: ``--labels``, the checkpoint's own, the published ones, or numbers."""
    if given:
        return Labels.from_option(given)
    if dataset := weights.training_argument("dataset_json", dict):
        return Labels.from_dataset(dataset, f"dataset_json in {source.checkpoint.name}")
    if plan and plan.published:
        return Labels.from_names(published_facts()["labels"], "the published label order")
    return Labels.numbered(weights.outputs)


def parse_strides(texts: Sequence[str]) -> Strides:
    """Read ``2,2,2`` and the like; a first entry of ones (v2 plans have one) is left out.

    Raises:
        PluginError: not three whole numbers each.
    """
    rows = []
    for text in texts:
        parts = text.split(",")
        if len(parts) != DIMENSIONS or not all(
            part.strip().isdigit() and int(part) > 0 for part in parts
        ):
            raise PluginError(f"--strides takes one entry such as 2,2,2 per pooling, not {text!r}.")
        rows.append(tuple(int(part) for part in parts))
    return tuple(rows[1:] if rows[0] == (1,) * DIMENSIONS else rows)


def published_facts() -> dict[str, Any]:
    """Return the content of the data file."""
    content: dict[str, Any] = json.loads(
        files("stunet_plugin").joinpath("data", DATA_FILE).read_text()
    )
    return content


def published_checkpoint(weights: NetworkWeights) -> str | None:
    """Return the name of the published file that weights of these sizes, channels and outputs are,
    or None."""
    facts = published_facts()
    if not isinstance(weights, STUNetWeights) or weights.preset is None:
        return None
    if (weights.input_channels, weights.outputs) != (1, len(facts["labels"])):
        return None
    names = {size: name for name, size in facts["checkpoints"].items()}
    return names.get(weights.preset.name)


def published_plan(checkpoint: str) -> SourcePlan:
    """Return the plan for a checkpoint that :func:`published_checkpoint` named."""
    plan = plan_from_v1(published_facts(), DATA_FILE)
    return replace(
        plan,
        origin=f"the published plan, as size, channels and outputs are those of {checkpoint}",
        published=True,
    )
