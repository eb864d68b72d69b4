"""Import of published weights: a checkpoint becomes a model folder of nnU-Net v2.

PyMIC checkpoints say neither how images were prepared nor what outputs mean. Those that MIS-FM
publishes were trained on Volume Fusion, whose outputs mean nothing to anyone else: their heads are
left out, as stock ``-pretrained_weights`` would.
"""

from __future__ import annotations

import platform
import re
import reprlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRETEXT_OUTPUTS
from stunet_plugin.nnunet.names import CHECKPOINT, CONFIGURATION, PLANS_NAME
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.utils.validation import is_integer, is_list
from stunet_plugin.weights.choose_plan import choose_labels, choose_plan, published_facts
from stunet_plugin.weights.file_formats import FileFormat, check_integrity, recognise
from stunet_plugin.weights.identify import DIMENSIONS, NetworkWeights, check_finite
from stunet_plugin.weights.input_channels import adapt_input_channels
from stunet_plugin.weights.locate import Hub, Source, find_source
from stunet_plugin.weights.misfm import PYMIC_ORIGINS, MISFMWeights
from stunet_plugin.weights.model_folder import (
    Writer,
    check_replaceable,
    checkpoint_writer,
    dataset_folder_name,
    find_import,
    is_same_import,
    json_writer,
    results_folder,
    write_model_folder,
)
from stunet_plugin.weights.output_labels import Labels
from stunet_plugin.weights.pretrained import VOLUME_FUSION_ENTRY
from stunet_plugin.weights.read_weights import read_weights
from stunet_plugin.weights.source_plan import SourcePlan

if TYPE_CHECKING:
    from stunet_plugin.commands.import_ import Import

PRETEXT = "pretext"


@dataclass(frozen=True)
class ImportedModel:
    """What an import writes.

    Attributes:
        folder: the model folder.
        weights: to write, without the heads of a pretext task.
        plan, labels: where they come from, for the record.
        init_args: of the trainer in the checkpoint.
        mirroring: axes that prediction may mirror.
        contents: path within the folder to the content of each JSON file that tells the model.
        others: path within the folder to what writes the files that nnU-Net's export asks for.
        advice: (what it does, command) of each thing to run next.
    """

    folder: Path
    weights: NetworkWeights
    plan: str
    labels: str
    init_args: dict[str, Any]
    mirroring: tuple[int, ...] | None = None
    contents: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Writer] = field(default_factory=dict)
    advice: tuple[tuple[str, str], ...] = ()


def run_import(options: Import, hub: Hub | None = None) -> int:
    """Import, and say what to run next."""
    model = import_checkpoint(options, hub)
    for name, text in (("Model folder", str(model.folder)), *model.advice):
        print(f"{name + ':':<14}{text}")
    return 0


def import_checkpoint(options: Import, hub: Hub | None = None) -> ImportedModel:
    """Import a checkpoint and return what was written.

    Args:
        options: what to import and how.
        hub: see :func:`stunet_plugin.weights.locate.find_source`.

    Raises:
        PluginError: with what is wrong and what to do; no output is left.
    """
    if options.fold != "all" and not options.fold.isdigit():
        raise PluginError(f"--fold must be a number or 'all', not {options.fold!r}.")
    source = find_source(options.source, hub)
    file_format = recognise(source.checkpoint)
    weights = read_weights(source.checkpoint, file_format, options.mode)
    _refuse_own_pretext(weights.checkpoint, source.checkpoint)
    if isinstance(weights, MISFMWeights) and _is_pretext(options, weights, source):
        model = _pretext_model(options, source, weights)
    else:
        model = _segmentation_model(options, source, weights)
    there = find_import(model.folder)
    if file_format is FileFormat.TORCH_ZIP:
        check_integrity(source.checkpoint)
    check_finite(weights.tensors, source.checkpoint)
    record = _make_record(options, source, weights, model.plan, model.labels)
    checkpoint = f"fold_{options.fold}/{CHECKPOINT}"
    if there is not None:
        if not options.force and is_same_import(model.folder, record, model.contents, checkpoint):
            print(f"Already there: {model.folder} holds this very import. Nothing was written.")
            return model
        check_replaceable(model.folder, there, options.force)
    tensors: Mapping[str, Any] = model.weights.tensors
    if options.in_channels is not None:
        stem = options.stem or weights.default_stem
        names = weights.input_weights
        tensors = adapt_input_channels(tensors, names, options.in_channels, stem)
    files = {
        **{name: json_writer(content) for name, content in model.contents.items()},
        checkpoint: checkpoint_writer(tensors, weights.trainer, model.init_args, model.mirroring),
        **model.others,
    }
    write_model_folder(model.folder, files, record, checkpoint)
    return model


def _segmentation_model(options: Import, source: Source, weights: NetworkWeights) -> ImportedModel:
    plan = choose_plan(source, weights, options)
    labels = choose_labels(source, weights, plan, options.labels)
    plan.check_network(weights)
    labels.check_outputs(weights.outputs)
    _print_source(source, weights)
    print(f"Plan:         {plan.origin}: {plan.summary()}\nLabels:       {labels.origin}")
    name = published_facts()["dataset_name"] if plan.published else _name_of_file(source)
    dataset_name = dataset_folder_name(options.dataset_id, options.name or name)
    folder = _folder(options, dataset_name, f"{weights.trainer}__{PLANS_NAME}__{CONFIGURATION}")
    if options.in_channels is not None:
        plan = plan.with_channels(options.in_channels)
    plans = plan.to_plans(weights, dataset_name)
    weights.check_plan(plans["configurations"][CONFIGURATION])
    dataset = _dataset(plan, labels, dataset_name, source)
    return ImportedModel(
        folder,
        weights,
        plan.origin,
        labels.origin,
        {
            "plans": plans,
            "configuration": CONFIGURATION,
            "fold": int(options.fold) if options.fold.isdigit() else options.fold,
            "dataset_json": dataset,
        },
        _mirroring_axes(weights.checkpoint),
        {"plans.json": plans, "dataset.json": dataset},
        _files_for_export(options.fold, plan, plans),
        _advice(options, folder, weights),
    )


def _pretext_model(options: Import, source: Source, weights: MISFMWeights) -> ImportedModel:
    """Return weights of a pretext task without their heads, for ``-pretrained_weights``."""
    _print_source(source, weights)
    print(
        f"Heads:        left out: {weights.outputs} outputs of a pretext task (a segmentation model"
        " has --spacing and --patch-size)"
    )
    mode = f"mode{weights.mode.number}"
    name = options.name or f"{_name_of_file(source)}_{mode}"
    dataset_name = dataset_folder_name(options.dataset_id, name)
    folder = _folder(options, dataset_name, f"{weights.trainer}__{PRETEXT}__{mode}")
    return ImportedModel(
        folder,
        weights.without_heads(),
        "none: weights of a pretext task",
        "none: heads left out",
        {"configuration": CONFIGURATION, "mode": weights.mode.number},
        advice=_pretext_advice(weights, folder / f"fold_{options.fold}" / CHECKPOINT),
    )


def _refuse_own_pretext(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Raise if a checkpoint is of a VolumeFusionTrainer, which fine-tuning takes as it is."""
    arguments = checkpoint.get("init_args")
    dataset = arguments.get("dataset_json") if isinstance(arguments, Mapping) else None
    if isinstance(dataset, Mapping) and VOLUME_FUSION_ENTRY in dataset:
        raise PluginError(
            f"{file} is from pretraining with Volume Fusion (trainer"
            f" {reprlib.repr(checkpoint.get('trainer_name'))}) and segments nothing. There is"
            f" nothing to import: fine-tune with -pretrained_weights {shlex.quote(str(file))}"
        )


def _is_pretext(options: Import, weights: MISFMWeights, source: Source) -> bool:
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


def _pretext_advice(weights: MISFMWeights, file: Path) -> tuple[tuple[str, str], ...]:
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


def _make_record(
    options: Import, source: Source, weights: NetworkWeights, plan: str, labels: str
) -> dict[str, Any]:
    """Return the record of an import.

    Args:
        options, source, weights: what is imported.
        plan, labels: where they come from.
    """
    import numpy
    import torch

    adapted = options.in_channels not in (None, weights.input_channels)
    return {
        "source": options.source,
        "file": source.checkpoint.name,
        "sha256": sha256_of(source.checkpoint),
        "plans_pickle_sha256": sha256_of(source.plans_pickle) if source.plans_pickle else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "format": weights.origin.value,
        "network": weights.description,
        "plan": plan,
        "labels": labels,
        "input_channels": options.in_channels or weights.input_channels,
        "stem": (options.stem or weights.default_stem) if adapted else "as in the source",
        "versions": {
            "stunet-plugin": __version__,
            "nnunetv2": host_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def _print_source(source: Source, weights: NetworkWeights) -> None:
    print(f"Checkpoint:   {source.checkpoint.name}, {weights.origin.value}")
    print(f"Network:      {weights.description}")


def _name_of_file(source: Source) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", source.checkpoint.stem).lstrip("_-") or "imported"


def _folder(options: Import, dataset_name: str, model_name: str) -> Path:
    if options.out:
        return Path(options.out).expanduser().absolute()
    return results_folder(dataset_name).absolute() / model_name


def _advice(options: Import, folder: Path, weights: NetworkWeights) -> tuple[tuple[str, str], ...]:
    place = shlex.quote(str(folder))
    file = shlex.quote(str(folder / f"fold_{options.fold}" / CHECKPOINT))
    installed = f" -d {options.dataset_id} -c {CONFIGURATION} -tr {weights.trainer}"
    where = f"_from_modelfolder -m {place}" if options.out else installed
    plans = ""
    if isinstance(weights, MISFMWeights):
        network = weights.network
        plans = (
            f" -p {network.plans}    # planner {network.planner}; must come to mode"
            f" {weights.mode.number}"
        )
    elif not weights.published_size:
        plans = f" -p NAME    # plans from: stunet plan-like {place} -d DATASET"
    train = f"nnUNetv2_train DATASET {CONFIGURATION} FOLD -tr {weights.trainer}_ft"
    return (
        ("Predict", f"nnUNetv2_predict{where} -f {options.fold} -i IMAGES -o PREDICTIONS"),
        ("Fine-tune", f"{train} -pretrained_weights {file}{plans}"),
    )


def _mirroring_axes(checkpoint: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return axes that prediction may mirror: what an nnU-Net v2 checkpoint says, else all, as
    every published training mirrors on all."""
    axes = checkpoint.get("inference_allowed_mirroring_axes", tuple(range(DIMENSIONS)))
    known = range(DIMENSIONS)
    if axes is not None and not (
        is_list(axes) and all(is_integer(axis) and axis in known for axis in axes)
    ):
        raise PluginError(
            f"The checkpoint allows mirroring on {reprlib.repr(axes)}; expected some of"
            f" {list(known)}."
        )
    return tuple(int(axis) for axis in axes) if axes else None


def _files_for_export(fold: str, plan: SourcePlan, plans: dict[str, Any]) -> dict[str, Writer]:
    """Return the files without which nnUNetv2_export_model_to_zip stops."""
    note = "imported by `stunet import`; the training that wrote these weights left no such file"
    intensities = "foreground_intensity_properties_per_channel"
    fingerprint = {
        "note": note,
        "spacings": [list(plan.spacing)],
        "shapes_after_crop": [list(plan.median_shape or plan.patch_size)],
        intensities: plans[intensities],
        "median_relative_size_after_cropping": 1.0,
    }
    summary = {"note": note, "metric_per_case": [], "mean": {}}
    return {
        "dataset_fingerprint.json": json_writer(fingerprint),
        f"fold_{fold}/progress.png": _save_progress,
        f"fold_{fold}/validation/summary.json": json_writer(summary),
    }


def _save_progress(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 1))
    figure.text(0.5, 0.5, "Imported weights: no training curve", ha="center", va="center")
    figure.savefig(path, dpi=80)


def _dataset(plan: SourcePlan, labels: Labels, name: str, source: Source) -> dict[str, Any]:
    return {
        "name": name,
        "description": (
            f"Labels and channels of the weights in {source.checkpoint.name}; there are no training"
            " cases here."
        ),
        "channel_names": {str(channel): name for channel, name in enumerate(plan.channel_names)},
        **labels.to_dataset(),
        "numTraining": 0,
        "file_ending": plan.file_ending,
    }
