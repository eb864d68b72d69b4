"""``stunet plan-like``: a plan for a dataset that prepares its images as those of a pretrained
model were.

The authors of STU-Net fine-tune with the target's own plan. This is the other way, for any network
that is known here: spacing, normalisation, patch and resampling of the model; labels, channels and
    fingerprint of the dataset.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CONFIGURATION, NIFTI_ENDINGS, PLANS_NAME, PREPROCESSED
from stunet_plugin.utils.files import read_json, write_atomically
from stunet_plugin.utils.validation import Fields
from stunet_plugin.weights.choose_plan import find_plan
from stunet_plugin.weights.identify import DIMENSIONS, NetworkWeights
from stunet_plugin.weights.locate import find_model
from stunet_plugin.weights.misfm import MISFMWeights
from stunet_plugin.weights.read_weights import read_weights
from stunet_plugin.weights.source_plan import CT, SourcePlan

_PLANS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def plan_like(given: str, dataset_id: int, name: str | None, force: bool) -> int:
    """Write the plan, and say what to run next.

    Args:
        given: the pretrained model: a folder or a checkpoint.
        dataset_id: of a dataset that nnU-Net has planned (``nnUNetPlans.json`` is the base).
        name: of the new plan; None is ``STUNetPlans_like_<size>``, or ``PCTNetPlans_like_mode<N>``
            and the like.
        force: replace a plan of that name.

    Raises:
        PluginError: model or dataset are not there or do not fit, or the name is taken.
    """
    source = find_model(given)
    weights = read_weights(source.checkpoint, any_mode=True)
    model = find_plan(source, weights)
    if model is None:
        raise PluginError(
            f"{source.checkpoint} has no plan. {_without_plan(given, weights, dataset_id)}"
        )
    if weights.poolings:
        model = replace(model, poolings=weights.poolings)
    folder = find_preprocessed(dataset_id)
    base, dataset = (_read_beside(folder, file) for file in (f"{PLANS_NAME}.json", "dataset.json"))
    name = name or weights.plans_like
    target = _check_name(folder, name, force)
    plans = make_plans(model, weights, base, dataset, name)
    weights.check_plan(plans["configurations"][CONFIGURATION])
    data = folder / plans["configurations"][CONFIGURATION]["data_identifier"]
    if data.is_dir():
        print(f"{data} holds data of an earlier plan of this name: preprocess again.")
    write_atomically(target, json.dumps(plans, indent=4) + "\n")

    channels = len(plans["configurations"][CONFIGURATION]["normalization_schemes"])
    print(
        f"Written:      {target}\nPreprocess:   nnUNetv2_preprocess -d {dataset_id} -plans_name"
        f" {name} -c {CONFIGURATION}"
    )
    if channels != weights.input_channels:
        advice = f"import the weights with --in-channels {channels} first"
        print(
            f"Channels:     {weights.input_channels} in the model, {channels} in the dataset:"
            f" {advice}"
        )
    train = f"nnUNetv2_train {dataset_id} {CONFIGURATION} 0 -p {name} -tr {weights.trainer}_ft"
    print(f"Fine-tune:    {train} -pretrained_weights {source.checkpoint}")
    return 0


def _without_plan(given: str, weights: NetworkWeights, dataset_id: int) -> str:
    """What to do where nothing says how the images of pretraining were prepared."""
    if not isinstance(weights, MISFMWeights):
        return f"Import it first, with one: stunet import {given} --plans FILE"
    network = weights.network
    own = f"nnUNetv2_plan_and_preprocess -d {dataset_id} -c {CONFIGURATION} -pl {network.planner}"
    if weights.outputs == 0:
        return (
            f"It holds weights of a pretext task, which go with any plan of {network.name} in mode"
            f" {weights.mode.number}. Take the dataset's own: {own}"
        )
    return (
        "If it segments, import it with the spacing and patch of its training (stunet import"
        f" {given} --spacing Z Y X --patch-size Z Y X) and name the folder that this writes. If it"
        f" was pretrained without labels, take the dataset's own plan: {own}"
    )


def find_preprocessed(dataset_id: int) -> Path:
    """Return the folder of a dataset in nnUNet_preprocessed."""
    root = os.environ.get(PREPROCESSED)
    if not root:
        raise PluginError(
            f"{PREPROCESSED} is not set. Set it: export {PREPROCESSED}=/path/to/{PREPROCESSED}"
        )
    found = sorted(path for path in Path(root).glob(f"Dataset{dataset_id:03d}_*") if path.is_dir())
    if len(found) != 1:
        raise PluginError(
            f"Expected one Dataset{dataset_id:03d}_* in {root}, found {len(found)}. Plan the"
            f" dataset first: nnUNetv2_extract_fingerprint -d {dataset_id} &&"
            f" nnUNetv2_plan_experiment -d {dataset_id}"
        )
    return found[0]


def make_plans(
    model: SourcePlan, weights: NetworkWeights, base: Fields, dataset: Fields, name: str
) -> dict[str, Any]:
    """Return the content of the plans file.

    Args:
        model: plan of the pretrained model.
        weights: whose architecture the plan carries.
        base: ``nnUNetPlans.json`` of the dataset.
        dataset: its ``dataset.json``.
        name: of the new plan.

    Raises:
        PluginError: the dataset's channels cannot be prepared as the model's.
    """
    channels = len(
        dataset.per_channel("channel_names" if "channel_names" in dataset else "modality")
    )
    if (
        channels != model.channels
        and len(set(zip(model.normalization, model.mask_for_norm, strict=True))) > 1
    ):
        raise PluginError(
            f"The dataset has {channels} channels and the model {model.channels}, which it"
            f" normalises in different ways ({', '.join(model.normalization)}): which of them is"
            " whose cannot be told. Use the dataset's own plan."
        )
    model = model.with_channels(channels)
    own = base.fields("configurations").fields(CONFIGURATION)
    axes = base.permutation("transpose_forward", DIMENSIONS)
    spacing, shape = (
        _retranspose(base.positives(key, DIMENSIONS, whole=False), axes, model.transpose_forward)
        for key in ("original_median_spacing_after_transp", "original_median_shape_after_transp")
    )
    plans = model.to_plans(weights, str(base.get("dataset_name")))
    configuration = plans["configurations"][CONFIGURATION]
    configuration["data_identifier"] = f"{name}_{CONFIGURATION}"
    configuration["batch_dice"] = own.boolean("batch_dice", False)
    configuration["median_image_size_in_voxels"] = [
        size * old / new for size, old, new in zip(shape, spacing, model.spacing, strict=True)
    ]
    # Images are turned as in pretraining where the model's reader can read them.
    readable = (
        not model.reader.startswith("Nibabel")
        or str(dataset.get("file_ending", "")).lower() in NIFTI_ENDINGS
    )
    intensities = dict(base.fields("foreground_intensity_properties_per_channel").values)
    for channel, scheme in enumerate(model.normalization):
        # The constants of this normalisation are part of it; all others take their numbers from
        # each image.
        if scheme == CT:
            intensities[str(channel)] = dict(model.intensities[channel])
    return {
        **plans,
        "plans_name": name,
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": [round(size) for size in shape],
        "image_reader_writer": model.reader if readable else base.get("image_reader_writer"),
        "experiment_planner_used": base.get("experiment_planner_used"),
        "label_manager": base.get("label_manager"),
        "foreground_intensity_properties_per_channel": intensities,
    }


def _read_beside(folder: Path, file: str) -> Fields:
    path = folder / file
    if not path.is_file():
        dataset_id = folder.name[len("Dataset") :][:3]
        raise PluginError(
            f"{path} is missing. Plan the dataset first: nnUNetv2_plan_experiment -d"
            f" {int(dataset_id)}"
        )
    return Fields(read_json(path), str(path))


def _check_name(folder: Path, name: str, force: bool) -> Path:
    """Return the plan's file; raise if the name is unusable or taken, or another plan has its data
    under it."""
    if not _PLANS_NAME.fullmatch(name) or "__" in name:
        raise PluginError(
            f"--name may hold letters, digits, '.', '-' and single '_', not {name!r}."
        )
    target = folder / f"{name}.json"
    if name == PLANS_NAME or name in ("dataset", "dataset_fingerprint", "splits_final"):
        raise PluginError(f"--name {name} would replace a file of nnU-Net. Choose another.")
    if target.exists() and not force:
        raise PluginError(
            f"{target} is there already. Nothing was changed. Replace it with --force, or choose"
            " another --name."
        )
    identifier = f"{name}_{CONFIGURATION}"
    for other in sorted(folder.glob("*.json")):
        if other != target and identifier in _data_identifiers(other):
            raise PluginError(
                f"{other} already names its data {identifier}, which would be overwritten. Choose"
                " another --name."
            )
    return target


def _data_identifiers(file: Path) -> set[str]:
    """Return the data identifiers of a plans file, none if it is another JSON file."""
    try:
        configurations = read_json(file).get("configurations")
    except PluginError:
        return set()
    entries = configurations.values() if isinstance(configurations, dict) else ()
    return {str(entry.get("data_identifier")) for entry in entries if isinstance(entry, dict)}


def _retranspose(
    values: Sequence[float], given: Sequence[int], wanted: Sequence[int]
) -> tuple[float, ...]:
    """Reorder values per axis from one of nnU-Net's transpositions to another."""
    original = dict(zip(given, values, strict=True))
    return tuple(original[axis] for axis in wanted)
