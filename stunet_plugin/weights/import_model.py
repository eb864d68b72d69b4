"""``stunet import``: a published checkpoint becomes an nnU-Net v2 model folder."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT, CONFIGURATION, PLANS_NAME
from stunet_plugin.utils.validation import is_list, is_whole
from stunet_plugin.weights.choose_plan import choose_labels, choose_plan, published_facts
from stunet_plugin.weights.identify import DIMENSIONS, FoundWeights
from stunet_plugin.weights.import_pretext import import_pretext, is_pretext, refuse_own_pretext
from stunet_plugin.weights.import_record import ImportOptions, check_content, is_there, name_of_file
from stunet_plugin.weights.locate import Hub, Source, find_source
from stunet_plugin.weights.misfm import MISFMWeights
from stunet_plugin.weights.model_folder import (
    Writer,
    check_target,
    checkpoint_writer,
    dataset_folder_name,
    json_writer,
    leftovers,
    results_folder,
    was_imported,
    write_model_folder,
)
from stunet_plugin.weights.output_labels import Labels
from stunet_plugin.weights.read_weights import read_weights
from stunet_plugin.weights.safe_loading import load_checkpoint
from stunet_plugin.weights.source_plan import SourcePlan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImportedModel:
    """The folder that an import wrote, and what to run with it.

    Attributes:
        folder: the model's.
        advice: (what it does, command) of each thing to run next.
    """

    folder: Path
    advice: tuple[tuple[str, str], ...]


def import_checkpoint(options: ImportOptions, hub: Hub | None = None) -> ImportedModel:
    """Import a checkpoint and return its model folder.

    Args:
        options: what to import and how.
        hub: see :func:`stunet_plugin.weights.locate.find_source`.

    Raises:
        PluginError: with what is wrong and what to do; no output is left.
    """
    source = find_source(options.source, hub)
    checkpoint = load_checkpoint(source.checkpoint)
    refuse_own_pretext(checkpoint, source.checkpoint)
    weights = read_weights(checkpoint, source.checkpoint, options.mode)
    if isinstance(weights, MISFMWeights) and is_pretext(options, weights, source):
        return ImportedModel(*import_pretext(options, source, weights))
    plan = choose_plan(source, checkpoint, weights, options.plan)
    labels = choose_labels(source, checkpoint, weights, plan, options.labels)
    plan.check_network(weights)
    labels.check_outputs(weights.outputs)
    print(
        f"Checkpoint:   {source.checkpoint.name}, {weights.origin.value}\nNetwork:     "
        f" {weights.description}\nPlan:         {plan.origin}: {plan.summary()}\nLabels:      "
        f" {labels.origin}"
    )
    name = options.name or (
        published_facts()["dataset_name"] if plan.published else name_of_file(source)
    )
    dataset_name = dataset_folder_name(options.dataset_id, name)
    trainer = weights.trainer
    target = (
        Path(options.out)
        if options.out
        else results_folder(dataset_name) / f"{trainer}__{PLANS_NAME}__{CONFIGURATION}"
    )
    if options.force or not was_imported(target):
        check_target(target, options.force)

    check_content(source, weights.tensors)
    provenance = options.provenance(source, weights, plan.origin, labels.origin)
    # From here on the weights and the plan are the ones to write.
    tensors = options.fit_channels(weights.tensors, weights)
    if options.in_channels is not None:
        plan = plan.with_channels(options.in_channels)
    plans = plan.to_plans(weights, dataset_name)
    weights.check_plan(plans["configurations"][CONFIGURATION])
    dataset = _dataset(plan, labels, dataset_name, source)
    mirroring = _mirroring_axes(checkpoint)
    advice = _advice(options, target, weights)
    if is_there(
        options, target, provenance, {"plans.json": plans, "dataset.json": dataset}, tensors
    ):
        return ImportedModel(target, advice)
    files = _files(options.fold, plans, dataset, plan, tensors, trainer, mirroring)
    del checkpoint, weights, tensors
    for leftover in leftovers(target):
        print(
            f"Left over from an import that was killed: {leftover}. Delete it if no import is"
            " running."
        )
    write_model_folder(target, files, provenance, options.force)
    return ImportedModel(target, advice)


def run_import(options: ImportOptions, hub: Hub | None = None) -> int:
    """Import, and say what to run next."""
    from stunet_plugin.nnunet.commands import terminate_as_interrupt

    with terminate_as_interrupt():
        model = import_checkpoint(options, hub)
    for name, text in (("Model folder", str(model.folder)), *model.advice):
        print(f"{name + ':':<14}{text}")
    return 0


def _advice(
    options: ImportOptions, target: Path, weights: FoundWeights
) -> tuple[tuple[str, str], ...]:
    installed = f" -d {options.dataset_id} -c {CONFIGURATION} -tr {weights.trainer}"
    where = f"_from_modelfolder -m {target}" if options.out else installed
    file = target / f"fold_{options.fold}" / CHECKPOINT
    if isinstance(weights, MISFMWeights):
        plans = (
            f" -p {weights.network.plans}    # planner {weights.network.planner}; must come to mode"
            f" {weights.mode.number}"
        )
    else:
        plans = (
            ""
            if weights.published_size
            else f" -p NAME    # plans from: stunet plan-like {target} -d DATASET"
        )
    return (
        ("Predict", f"nnUNetv2_predict{where} -f {options.fold} -i IMAGES -o PREDICTIONS"),
        (
            "Fine-tune",
            (
                f"nnUNetv2_train DATASET {CONFIGURATION} FOLD -tr {weights.trainer}_ft"
                f" -pretrained_weights {file}{plans}"
            ),
        ),
    )


def _mirroring_axes(checkpoint: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Axes that prediction may mirror: what an nnU-Net v2 checkpoint says, else all, as every
    published training mirrors on all."""
    axes = checkpoint.get("inference_allowed_mirroring_axes", tuple(range(DIMENSIONS)))
    if axes is not None and not (
        is_list(axes) and all(is_whole(axis) and axis in range(DIMENSIONS) for axis in axes)
    ):
        raise PluginError(
            f"The checkpoint allows mirroring on {reprlib.repr(axes)}; expected some of"
            f" {list(range(DIMENSIONS))}."
        )
    return tuple(int(axis) for axis in axes) if axes else None


def _files(
    fold: str,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    plan: SourcePlan,
    tensors: Mapping[str, Tensor],
    trainer: str,
    mirroring: tuple[int, ...] | None,
) -> dict[str, Writer]:
    """Return the folder's files. The last three are only there for nnUNetv2_export_model_to_zip,
    which stops without them."""
    note = "imported by `stunet import`; the training that wrote these weights left no such file"
    init_args = {
        "plans": plans,
        "configuration": CONFIGURATION,
        "fold": int(fold) if fold.isdigit() else fold,
        "dataset_json": dataset,
    }
    fingerprint = {
        "note": note,
        "spacings": [list(plan.spacing)],
        "shapes_after_crop": [list(plan.median_shape or plan.patch_size)],
        "foreground_intensity_properties_per_channel": plans[
            "foreground_intensity_properties_per_channel"
        ],
        "median_relative_size_after_cropping": 1.0,
    }
    return {
        "plans.json": json_writer(plans),
        "dataset.json": json_writer(dataset),
        f"fold_{fold}/{CHECKPOINT}": checkpoint_writer(tensors, trainer, init_args, mirroring),
        "dataset_fingerprint.json": json_writer(fingerprint),
        f"fold_{fold}/progress.png": _save_progress,
        f"fold_{fold}/validation/summary.json": json_writer(
            {"note": note, "metric_per_case": [], "mean": {}}
        ),
    }


def _save_progress(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 1))
    figure.text(0.5, 0.5, "Imported weights: no training curve", ha="center", va="center")
    figure.savefig(path, dpi=80)


def _dataset(plan: SourcePlan, labels: Labels, dataset_name: str, source: Source) -> dict[str, Any]:
    return {
        "name": dataset_name,
        "description": (
            f"Labels and channels of the weights in {source.checkpoint.name}; there are no training"
            " cases here."
        ),
        "channel_names": {str(channel): name for channel, name in enumerate(plan.channel_names)},
        **labels.to_dataset(),
        "numTraining": 0,
        "file_ending": plan.file_ending,
    }
