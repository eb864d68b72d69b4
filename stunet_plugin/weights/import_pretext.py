"""Pretext weights: an import for ``-pretrained_weights`` that does not pretend to predict.

PyMIC checkpoints say neither how images were prepared nor what outputs mean. Those that MIS-FM
publishes were trained on Volume Fusion, whose outputs mean nothing to anyone else: their heads are
left out, as stock ``-pretrained_weights`` would.
"""

from __future__ import annotations

import reprlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRETEXT_OUTPUTS
from stunet_plugin.nnunet.names import CONFIGURATION
from stunet_plugin.weights.locate import Source
from stunet_plugin.weights.misfm import PYMIC_ORIGINS, MISFMWeights
from stunet_plugin.weights.pretrained import VOLUME_FUSION_ENTRY

if TYPE_CHECKING:
    from stunet_plugin.commands.import_ import Import

PRETEXT = "pretext"


def refuse_own_pretext(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Raise if a checkpoint is of a VolumeFusionTrainer, which fine-tuning takes as it is."""
    arguments = checkpoint.get("init_args")
    dataset = arguments.get("dataset_json") if isinstance(arguments, Mapping) else None
    if isinstance(dataset, Mapping) and VOLUME_FUSION_ENTRY in dataset:
        raise PluginError(
            f"{file} is from pretraining with Volume Fusion (trainer"
            f" {reprlib.repr(checkpoint.get('trainer_name'))}) and segments nothing. There is"
            f" nothing to import: fine-tune with -pretrained_weights {shlex.quote(str(file))}"
        )


def is_pretext(options: Import, weights: MISFMWeights, source: Source) -> bool:
    """Return whether weights are those of a pretext task.

    They are if the user says so (``--pretext``), or if a PyMIC checkpoint has the pretext task's
    five outputs and the user gives neither a plan nor labels, which a segmentation model needs.

    Raises:
        PluginError: that cannot be told, or the options contradict each other.
    """
    if weights.outputs == 0:
        return True
    given = (options.plans, options.spacing, options.patch_size, options.labels)
    segments = any(given)
    if options.pretext and (segments or weights.origin not in PYMIC_ORIGINS):
        raise PluginError(
            "--pretext is for PyMIC checkpoints whose outputs mean nothing outside of pretraining,"
            " so it goes with neither --plans, --spacing, --patch-size nor --labels. Leave one or"
            " the other out."
        )
    if options.pretext or segments or weights.origin not in PYMIC_ORIGINS:
        return options.pretext
    if weights.outputs != PRETEXT_OUTPUTS:
        raise PluginError(
            f"{source.checkpoint} has {weights.outputs} outputs, and a {weights.origin.value} does"
            " not say what they are. If it segments, say how its images were prepared: --spacing Z"
            " Y X --patch-size Z Y X (or --plans FILE), and --labels background NAME ... If it was"
            " pretrained and you want to fine-tune it: --pretext."
        )
    return True


def pretext_advice(weights: MISFMWeights, file: Path) -> tuple[tuple[str, str], ...]:
    """Return (what it does, command) of each thing to run with the checkpoint that was written."""
    network = weights.network
    plan = (
        f"nnUNetv2_plan_experiment -d DATASET -pl {network.planner} && nnUNetv2_preprocess -d"
        f" DATASET -plans_name {network.plans} -c {CONFIGURATION}    # must come to mode"
        f" {weights.mode.number}"
    )
    widths = (
        f'"features_per_stage": {list(weights.features)} into the arch_kwargs of {CONFIGURATION} in'
        f" {network.plans}.json, since the planner takes the published widths"
    )
    train = f"nnUNetv2_train DATASET {CONFIGURATION} FOLD -p {network.plans}"
    fine_tune = f"{train} -tr {weights.trainer}_ft -pretrained_weights {shlex.quote(str(file))}"
    then = () if weights.published_size else (("Then write", widths),)
    return (("Plan", plan), *then, ("Fine-tune", fine_tune))
