"""Weights of a pretext task: a checkpoint for ``-pretrained_weights``, and nothing that pretends to
predict.

PyMIC checkpoints say neither how images were prepared nor what outputs mean. Those that MIS-FM
publishes were trained on
Volume Fusion, whose outputs mean nothing to anyone else: their heads are left out, as stock
    ``-pretrained_weights`` would.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRETEXT_OUTPUTS
from stunet_plugin.nnunet.names import CHECKPOINT, CONFIGURATION
from stunet_plugin.weights.import_record import ImportOptions, check_content, is_there, name_of_file
from stunet_plugin.weights.locate import Source
from stunet_plugin.weights.misfm import PYMIC_ORIGINS, MISFMWeights
from stunet_plugin.weights.model_folder import (
    check_target,
    checkpoint_writer,
    dataset_folder_name,
    results_folder,
    was_imported,
    write_model_folder,
)
from stunet_plugin.weights.pretrained import VOLUME_FUSION_ENTRY

PRETEXT = "pretext"


def refuse_own_pretext(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Raise if a checkpoint is of a VolumeFusionTrainer, which fine-tuning takes as it is."""
    arguments = checkpoint.get("init_args")
    dataset = arguments.get("dataset_json") if isinstance(arguments, Mapping) else None
    if isinstance(dataset, Mapping) and VOLUME_FUSION_ENTRY in dataset:
        raise PluginError(
            f"{file} is from pretraining with Volume Fusion (trainer"
            f" {reprlib.repr(checkpoint.get('trainer_name'))}) and segments nothing. There is"
            f" nothing to import: fine-tune with -pretrained_weights {file}"
        )


def is_pretext(options: ImportOptions, weights: MISFMWeights, source: Source) -> bool:
    """Return whether weights are those of a pretext task.

    They are if the user says so (``--pretext``), or if a PyMIC checkpoint has the pretext task's
    five outputs and the user gives neither a plan nor labels. A segmentation model needs a plan to
    predict, so who imports one gives it.

    Raises:
        PluginError: that cannot be told, or the options contradict each other.
    """
    if weights.outputs == 0:
        return True
    says_segmentation = options.plan.says_how_images_were_prepared or bool(options.labels)
    if options.pretext and (says_segmentation or weights.origin not in PYMIC_ORIGINS):
        raise PluginError(
            "--pretext is for PyMIC checkpoints whose outputs mean nothing outside of pretraining,"
            " so it goes with neither --plans, --spacing, --patch-size nor --labels. Leave one or"
            " the other out."
        )
    if options.pretext or says_segmentation or weights.origin not in PYMIC_ORIGINS:
        return options.pretext
    if weights.outputs != PRETEXT_OUTPUTS:
        raise PluginError(
            f"{source.checkpoint} has {weights.outputs} outputs, and a {weights.origin.value} does"
            " not say what they are. If it was trained to segment, say how its images were"
            " prepared, so that it can predict: --spacing Z Y X --patch-size Z Y X (or --plans"
            " FILE), and --labels background NAME ... If it was pretrained and you want to"
            " fine-tune it: --pretext."
        )
    return True


def import_pretext(
    options: ImportOptions, source: Source, weights: MISFMWeights
) -> tuple[Path, tuple[tuple[str, str], ...]]:
    """Write a folder with a checkpoint for ``-pretrained_weights``; return it and what to run next.

    Raises:
        PluginError: with what is wrong and what to do; no output is left.
    """
    network, mode = weights.network, weights.mode.number
    print(
        f"Checkpoint:   {source.checkpoint.name}, {weights.origin.value}\nNetwork:     "
        f" {weights.description}\nHeads:        left out: {weights.outputs} outputs of a pretext"
        " task (a segmentation model has --spacing and --patch-size)"
    )
    dataset_name = dataset_folder_name(
        options.dataset_id, options.name or f"{name_of_file(source)}_mode{mode}"
    )
    target = (
        Path(options.out)
        if options.out
        else results_folder(dataset_name) / f"{weights.trainer}__{PRETEXT}__mode{mode}"
    )
    if options.force or not was_imported(target):
        check_target(target, options.force)
    check_content(source, weights.tensors)
    provenance = options.provenance(
        source, weights, "none: weights of a pretext task", "none: heads left out"
    )
    tensors = options.fit_channels(weights.without_heads(), weights)
    file = f"fold_{options.fold}/{CHECKPOINT}"
    if not is_there(options, target, provenance, {}, tensors):
        writer = checkpoint_writer(
            tensors, weights.trainer, {"configuration": CONFIGURATION, "mode": mode}, mirroring=None
        )
        write_model_folder(target, {file: writer}, provenance, options.force)
    train = (
        f"nnUNetv2_train DATASET {CONFIGURATION} FOLD -p {network.plans} -tr {weights.trainer}_ft"
    )
    plan = (
        f"nnUNetv2_plan_and_preprocess -d DATASET -c {CONFIGURATION} -pl {network.planner}    #"
        f" must come to mode {mode}"
    )
    widths = (
        f'"features_per_stage": {list(weights.features)} into the arch_kwargs of {CONFIGURATION} in'
        f" {network.plans}.json"
    )
    return target, (
        ("Plan", plan),
        *(
            ()
            if weights.published_size
            else (("Then write", f"{widths}, since the planner takes the published widths"),)
        ),
        ("Fine-tune", f"{train} -pretrained_weights {target / file}"),
    )
