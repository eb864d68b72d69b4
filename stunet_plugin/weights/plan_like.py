"""Plan for a dataset that prepares its images as those of a pretrained model were: spacing,
normalisation, patch and resampling of the model; labels, channels and fingerprint of the dataset.
(The authors of STU-Net fine-tune with the target's own plan.)"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError, setting
from stunet_plugin.nnunet.names import CONFIGURATION, NIFTI_ENDINGS, PLANS_NAME, PREPROCESSED
from stunet_plugin.utils.files import read_json, write_atomically
from stunet_plugin.utils.validation import Fields, channel_names
from stunet_plugin.weights.choose_plan import find_plan
from stunet_plugin.weights.identify import NetworkWeights, read_weights
from stunet_plugin.weights.locate import find_model
from stunet_plugin.weights.source_plan import CT, INTENSITIES, SourcePlan
from stunet_plugin.weights.tensors import DIMENSIONS
from stunet_plugin.weights.trained_options import USE_ITS_TRAINER, refuse_options

if TYPE_CHECKING:
    from stunet_plugin.commands.plan_like import PlanLike


def plan_like(options: PlanLike) -> int:
    """Write the plan, and say what to run next."""
    source = find_model(options.model)
    weights = read_weights(source.checkpoint, any_mode=True)
    refuse_options(weights.checkpoint, source.checkpoint, USE_ITS_TRAINER)
    model = find_plan(source, weights)
    if model is None:
        raise PluginError(f"{source.checkpoint} has no plan. {_without_plan(options, weights)}")
    if weights.poolings:
        model = replace(model, poolings=weights.poolings)
    folder = _find_preprocessed(options.dataset)
    files = folder / f"{PLANS_NAME}.json", folder / "dataset.json"
    base, dataset = (Fields(read_json(file), str(file)) for file in files)
    name = options.name or weights.plans_like
    target = _check_name(folder, name, options.force)
    plans = _make_plans(model, weights, base, dataset, name)
    configuration = plans["configurations"][CONFIGURATION]
    weights.check_plan(configuration)
    data = folder / configuration["data_identifier"]
    if data.is_dir():
        print(f"{data} holds data of an earlier plan of this name: preprocess again.")
    write_atomically(target, json.dumps(plans, indent=4) + "\n")

    number, channels = options.dataset, len(configuration["normalization_schemes"])
    train = f"nnUNetv2_train {number} {CONFIGURATION} 0 -p {name} -tr {weights.trainer}_ft"
    print(f"Written:      {target}")
    print(f"Preprocess:   nnUNetv2_preprocess -d {number} -plans_name {name} -c {CONFIGURATION}")
    if channels != weights.input_channels:
        print(f"Channels:     import the weights with --in-channels {channels} first")
    weights_file = shlex.quote(str(source.checkpoint.absolute()))
    print(f"Fine-tune:    {train} -pretrained_weights {weights_file}")
    return 0


def _without_plan(options: PlanLike, weights: NetworkWeights) -> str:
    """What to do where nothing says how the images of pretraining were prepared."""
    network, model = weights.misfm, options.model
    if network is None or weights.mode is None:
        return f"Import it first, with one: stunet import {model} --plans FILE"
    own = (
        f"take the dataset's own plan: nnUNetv2_plan_and_preprocess -d {options.dataset} -c"
        f" {CONFIGURATION} -pl {network.planner}"
    )
    if weights.outputs == 0:
        return f"It was pretrained and fits any plan in mode {weights.mode.number}: {own}"
    return (
        f"If it segments: stunet import {model} --spacing Z Y X --patch-size Z Y X, and name the"
        f" folder that this writes. If it was pretrained without labels, {own}"
    )


def _find_preprocessed(dataset_id: int) -> Path:
    root, pattern = os.environ.get(PREPROCESSED), f"Dataset{dataset_id:03d}_*/{PLANS_NAME}.json"
    found = list(Path(root).glob(pattern)) if root else []
    if len(found) != 1:
        where = root or f"nowhere ({setting(PREPROCESSED, f'/path/to/{PREPROCESSED}')})"
        raise PluginError(
            f"Expected one {pattern} in {PREPROCESSED}, which is {where}, found {len(found)}. Plan"
            f" the dataset first: nnUNetv2_extract_fingerprint -d {dataset_id} &&"
            f" nnUNetv2_plan_experiment -d {dataset_id}"
        )
    return found[0].parent


def _make_plans(
    model: SourcePlan, weights: NetworkWeights, base: Fields, dataset: Fields, name: str
) -> dict[str, Any]:
    """``base``, ``dataset``: the dataset's ``nnUNetPlans.json`` and ``dataset.json``."""
    channels = len(channel_names(dict(dataset.values), dataset.where))
    settings = set(zip(model.normalization, model.mask_for_norm, strict=True))
    if channels != model.channels and len(settings) > 1:
        raise PluginError(
            f"The dataset has {channels} channels and the model {model.channels}, which it"
            f" normalises in different ways ({', '.join(model.normalization)}): which of them is"
            " whose cannot be told. Use the dataset's own plan."
        )
    model = model.with_channels(channels)
    axes = base.permutation("transpose_forward", DIMENSIONS)

    def turned(key: str) -> list[float]:
        """Values per axis, from the dataset's order of the axes to the model's."""
        values = base.positives(key, DIMENSIONS, whole=False)
        original = dict(zip(axes, values, strict=True))
        return [original[axis] for axis in model.transpose_forward]

    spacing = turned("original_median_spacing_after_transp")
    shape = turned("original_median_shape_after_transp")
    # Images are turned as in pretraining where the model's reader can read them.
    ending = str(dataset.get("file_ending", "")).lower()
    readable = not model.reader.startswith("Nibabel") or ending in NIFTI_ENDINGS
    intensities = dict(base.fields(INTENSITIES).values)
    for channel, scheme in enumerate(model.normalization):
        # The constants of this normalisation are part of it; all others take each image's own.
        if scheme == CT:
            intensities[str(channel)] = dict(model.intensities[channel])
    plans = model.to_plans(weights, str(base.get("dataset_name")))
    own = base.fields("configurations").fields(CONFIGURATION)
    plans["configurations"][CONFIGURATION] |= {
        "data_identifier": f"{name}_{CONFIGURATION}",
        "batch_dice": own.boolean("batch_dice", False),
        "median_image_size_in_voxels": [
            size * old / new for size, old, new in zip(shape, spacing, model.spacing, strict=True)
        ],
    }
    return {
        **plans,
        "plans_name": name,
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": [round(size) for size in shape],
        "image_reader_writer": model.reader if readable else base.get("image_reader_writer"),
        "experiment_planner_used": base.get("experiment_planner_used"),
        "label_manager": base.get("label_manager"),
        INTENSITIES: intensities,
    }


def _check_name(folder: Path, name: str, force: bool) -> Path:
    """Return the plan's file; raise if its name, or that of its data, is unusable or taken."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or "__" in name:
        raise PluginError(f"--name may hold letters, digits, '.', '-', single '_', not {name!r}.")
    if name in (PLANS_NAME, "dataset", "dataset_fingerprint", "splits_final"):
        raise PluginError(f"--name {name} would replace a file of nnU-Net. Choose another.")
    target = folder / f"{name}.json"
    if target.exists() and not force:
        raise PluginError(
            f"{target} is there already. Nothing was changed. Replace it with --force, or choose"
            " another --name."
        )
    identifier = f"{name}_{CONFIGURATION}"
    for other in sorted(folder.glob("*.json")):
        if other != target and f'"{identifier}"' in other.read_text(errors="replace"):
            raise PluginError(
                f"{other} already names its data {identifier}, which would be overwritten. Choose"
                " another --name."
            )
    return target
