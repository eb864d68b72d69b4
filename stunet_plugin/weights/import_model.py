"""Import of published weights: a checkpoint becomes a model folder of nnU-Net v2."""

from __future__ import annotations

import re
import reprlib
import shlex
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRETEXT_OUTPUTS
from stunet_plugin.nnunet.names import CHECKPOINT, CONFIGURATION, PLANS_NAME
from stunet_plugin.nnunet.registration import missing_variables
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.utils.validation import is_integer, is_list
from stunet_plugin.weights import model_folder, nnssl
from stunet_plugin.weights.choose_plan import choose_plan, find_plan
from stunet_plugin.weights.file_formats import check_integrity
from stunet_plugin.weights.identify import HEADS, UNETS, NetworkWeights, Origin, read_weights
from stunet_plugin.weights.import_sam import import_sam
from stunet_plugin.weights.locate import Source, find_model, published_facts, shared_folds
from stunet_plugin.weights.output_labels import check_labels, choose_labels
from stunet_plugin.weights.pretrained import VOLUME_FUSION_ENTRY
from stunet_plugin.weights.safe_loading import load_checkpoint
from stunet_plugin.weights.sam_keys import sam_weights
from stunet_plugin.weights.tensors import DIMENSIONS, check_finite
from stunet_plugin.weights.trained_options import refuse_options

if TYPE_CHECKING:
    from stunet_plugin.commands.import_ import Import


@dataclass(frozen=True)
class _Model:
    """What an import writes: ``files`` are all but the checkpoint and the record, which says where
    ``plan`` and ``labels`` come from."""

    folder: Path
    weights: NetworkWeights
    plan: str
    labels: str
    init_args: dict[str, Any]
    files: model_folder.Files
    entries: dict[str, Any] = field(default_factory=dict)  # more of the checkpoint


def import_checkpoint(options: Import) -> int:
    """Import a checkpoint; wrong input leaves nothing. What is found, and what to run next, is
    printed."""
    if options.fold != "all" and not options.fold.isdigit():
        raise PluginError(f"--fold must be a number or 'all', not {options.fold!r}.")
    if options.in_channels is not None and options.in_channels < 1:
        raise PluginError(f"--in-channels must be at least 1, not {options.in_channels}.")
    source = find_model(options.source)
    if shared_folds(source.checkpoint):
        options = replace(options, fold=source.checkpoint.parent.name.removeprefix("fold_"))
    checkpoint = load_checkpoint(source.checkpoint)
    if sam_weights(checkpoint):
        return import_sam(options, source, checkpoint)
    weights = read_weights(source.checkpoint, options.mode, checkpoint=checkpoint)
    already = "Its model folder is nnU-Net's already: predict with it, or fine-tune from the file."
    refuse_options(weights.checkpoint, source.checkpoint, already)
    print(f"Checkpoint:   {source.checkpoint.name}, {weights.origin.value}")
    print(f"Network:      {weights.description}")
    make = _pretext_model if _is_pretext(options, source, weights) else _segmentation_model
    model = make(options, source, weights)
    _write(options, source, weights, model)
    for name, text in (("Model folder", str(model.folder)), *_advice(options, model)):
        print(f"{name + ':':<14}{text}")
    return 0


def _write(options: Import, source: Source, weights: NetworkWeights, model: _Model) -> None:
    """Write the folder, unless it is there."""
    record = _record(options, source, weights, model)
    folds = shared_folds(source.checkpoint) or {options.fold: source.checkpoint}
    file = f"fold_{options.fold}/{CHECKPOINT}"
    if model_folder.is_there(model.folder, record, model.files, file, options.force):
        print(f"Already there: {model.folder} holds this very import. Nothing was written.")
        return
    check_integrity(source.checkpoint)
    check_finite(weights.tensors, source.checkpoint)
    channels = options.in_channels or weights.input_channels
    files = dict(model.files)
    for name, path in folds.items():
        one = model.weights if path == source.checkpoint else _same_network(path, weights)
        written = one.with_input_channels(channels, options.stem)
        files[f"fold_{name}/{CHECKPOINT}"] = partial(
            model_folder.save_checkpoint,
            written.tensors,
            written.trainer,
            model.init_args | {"fold": int(name) if name.isdigit() else name},
            _mirroring_axes(weights),
            model.entries,
        )
    model_folder.write_model_folder(model.folder, record, files, file)


def _same_network(path: Path, first: NetworkWeights) -> NetworkWeights:
    """Read another fold of a shared model; raise PluginError if it is of another network."""
    weights = read_weights(path)
    if (weights.description, weights.trainer) != (first.description, first.trainer):
        raise PluginError(f"{path} is {weights.description}, the first fold {first.description}.")
    check_finite(weights.tensors, path)
    return weights


def _segmentation_model(options: Import, source: Source, weights: NetworkWeights) -> _Model:
    plan = choose_plan(source, weights, options)
    labels, origin = choose_labels(source, weights, plan, options.labels)
    plan.check_network(weights)
    check_labels(labels, origin, weights.outputs)
    print(f"Plan:         {plan.origin}: {plan.summary()}\nLabels:       {origin}")
    if (short := len(weights.features) - 1 - len(plan.poolings)) > 0:
        print(f"Note:         {short} of the poolings are not in the plan: they take stride 1.")
    name = published_facts()["dataset_name"] if plan.published else _name_of_file(source)
    model_name = f"{weights.trainer}__{PLANS_NAME}__{CONFIGURATION}"
    dataset_name, folder = model_folder.find_place(options, name, model_name)
    plan = plan.with_channels(options.in_channels or plan.channels)
    plans = plan.to_plans(weights, dataset_name)
    weights.check_plan(plans["configurations"][CONFIGURATION])
    dataset = {
        "name": dataset_name,
        "description": f"Weights of {source.checkpoint.name}; there are no training cases here.",
        "channel_names": {str(channel): name for channel, name in enumerate(plan.channel_names)},
        **labels,
        "numTraining": 0,
        "file_ending": plan.file_ending,
    }
    arguments = {
        "plans": plans,
        "configuration": CONFIGURATION,
        "fold": int(options.fold) if options.fold.isdigit() else options.fold,
        "dataset_json": dataset,
    }
    note = "imported by `stunet import`; the training that wrote these weights left no such file"
    summary = {"note": note, "metric_per_case": [], "mean": {}}
    files: model_folder.Files = {
        "plans.json": plans,
        "dataset.json": dataset,
        # Without these three nnUNetv2_export_model_to_zip stops.
        "dataset_fingerprint.json": {"note": note},
        f"fold_{options.fold}/progress.png": _save_progress,
        f"fold_{options.fold}/validation/summary.json": summary,
    }
    return _Model(folder, weights, plan.origin, origin, arguments, files)


def _pretext_model(options: Import, source: Source, weights: NetworkWeights) -> _Model:
    """Return weights of a pretext task without their heads, for ``-pretrained_weights``."""
    outputs = (
        f"{weights.outputs} outputs of a pretext task" if weights.outputs else "there are none"
    )
    advice = " (a segmentation model has --spacing and --patch-size)" if weights.mode else ""
    print(f"Heads:        left out: {outputs}{advice}")
    mode = f"mode{weights.mode.number}" if weights.mode else ""
    name = "_".join(filter(None, (_name_of_file(source), mode)))
    model_name = "__".join(filter(None, (weights.trainer, "pretext", mode)))
    dataset_name, folder = model_folder.find_place(options, name, model_name)
    arguments: dict[str, Any] = {"configuration": CONFIGURATION}
    if weights.mode:
        arguments["mode"] = weights.mode.number
    kept = {name: value for name, value in weights.tensors.items() if HEADS not in name}
    bare = replace(weights, tensors=kept, outputs=0)
    entries, origin = dict[str, Any](), "none: weights of a pretext task"
    if weights.origin in UNETS and (plan := find_plan(source, weights)):
        plan = plan.with_channels(options.in_channels or weights.input_channels)
        plans, origin = plan.to_plans(weights, dataset_name), plan.origin
        chosen = plans["configurations"][CONFIGURATION]
        made = nnssl.make_plan(plans, chosen, plan.channels, weights.network)
        entries = {nnssl.ENTRY: made}
    return _Model(folder, bare, origin, "none: heads left out", arguments, {}, entries)


def _is_pretext(options: Import, source: Source, weights: NetworkWeights) -> bool:
    """Return whether weights are those of a pretext task: the user says so (``--pretext``), or a
    PyMIC checkpoint has the pretext task's five outputs and the user gives neither a plan nor
    labels, which a segmentation model needs."""
    file, pymic = source.checkpoint, weights.origin.pymic
    if VOLUME_FUSION_ENTRY in (weights.training_argument("dataset_json", dict) or {}):
        trainer = reprlib.repr(weights.checkpoint.get("trainer_name"))
        raise PluginError(
            f"{file} is from pretraining with Volume Fusion (trainer {trainer}) and segments"
            f" nothing. Fine-tune with it as it is: -pretrained_weights {shlex.quote(str(file))}"
        )
    segments = any((options.plans, options.spacing, options.patch_size, options.labels))
    if weights.encoder_only or weights.origin is Origin.NNSSL:
        what = "an encoder without a decoder" if weights.encoder_only else "of a pretext task"
        if segments:
            raise PluginError(
                f"{file} is {what}, so it segments nothing. Leave out --plans, --spacing,"
                " --patch-size and --labels; the import is then for -pretrained_weights."
            )
        return True
    if options.pretext and weights.outputs and (segments or not pymic):
        raise PluginError(
            "--pretext is for PyMIC checkpoints whose outputs mean nothing: leave it out, or"
            " --plans, --spacing, --patch-size and --labels."
        )
    if pymic and not segments and not options.pretext and weights.outputs != PRETEXT_OUTPUTS:
        raise PluginError(
            f"{file} has {weights.outputs} outputs, and a {weights.origin.value} does not say what"
            " they are. If it segments: --spacing Z Y X --patch-size Z Y X (or --plans FILE), and"
            " --labels background NAME ... If it was pretrained and you fine-tune it: --pretext."
        )
    return weights.outputs == 0 or (pymic and not segments)


def _record(
    options: Import, source: Source, weights: NetworkWeights, model: _Model
) -> dict[str, Any]:
    adapted = options.in_channels not in (None, weights.input_channels)
    return {
        **model_folder.describe_source(options.source, source.checkpoint),
        "plans_pickle_sha256": sha256_of(source.plans_pickle) if source.plans_pickle else None,
        "format": weights.origin.value,
        "network": weights.description,
        "plan": model.plan,
        "labels": model.labels,
        "input_channels": options.in_channels or weights.input_channels,
        "stem": (options.stem or weights.default_stem) if adapted else "as in the source",
    }


def _name_of_file(source: Source) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", source.checkpoint.stem).lstrip("_-") or "imported"


def _advice(options: Import, model: _Model) -> tuple[tuple[str, str], ...]:
    """Return (what it does, command) of each thing to run next."""
    import torch

    weights, network, place = model.weights, model.weights.misfm, shlex.quote(str(model.folder))
    advised = (("First", "stunet register    # nnU-Net does not find our trainers"),)
    first = advised if missing_variables() else ()
    file = shlex.quote(str(model.folder / f"fold_{options.fold}" / CHECKPOINT))
    mode = f"must come to mode {weights.mode.number}" if weights.mode else ""
    train = (
        f"nnUNetv2_train DATASET {CONFIGURATION} FOLD -tr {weights.trainer}_ft -pretrained_weights"
        f" {file}"
    )
    if not weights.outputs and weights.origin in UNETS:
        return (*first, ("Fine-tune", f"stunet fine-tune {place} -d DATASET"))
    if network and not weights.outputs:
        plan = (
            f"nnUNetv2_plan_experiment -d DATASET -pl {network.planner} && nnUNetv2_preprocess -d"
            f" DATASET -plans_name {network.plans} -c {CONFIGURATION}    # {mode}"
        )
        widths = (
            f'"features_per_stage": {list(weights.features)} into the arch_kwargs of'
            f" {CONFIGURATION} in {network.plans}.json (the planner takes the published widths)"
        )
        then = () if weights.published_size else (("Then write", widths),)
        return (*first, ("Plan", plan), *then, ("Fine-tune", f"{train} -p {network.plans}"))
    if network:
        train += f" -p {network.plans}    # planner {network.planner}; {mode}"
    elif not weights.published_size:
        train += f" -p NAME    # plans from: stunet plan-like {place} -d DATASET"
    installed = f" -d {options.dataset_id} -c {CONFIGURATION} -tr {weights.trainer}"
    where = f"_from_modelfolder -m {place}" if options.out else installed
    predict = f"nnUNetv2_predict{where} -f {options.fold} -i IMAGES -o PREDICTIONS"
    predict += "" if torch.cuda.is_available() else " -device cpu"
    segment = f"stunet segment SCAN -o OUT -m {place}"
    return (("Segment", segment), *first, ("Predict", predict), ("Fine-tune", train))


def _mirroring_axes(weights: NetworkWeights) -> tuple[int, ...] | None:
    """Return the axes for prediction that an nnU-Net v2 checkpoint names; published trainings
    mirror on all."""
    known = range(DIMENSIONS)
    axes = weights.checkpoint.get("inference_allowed_mirroring_axes", tuple(known))
    if axes is None:
        return None
    if not is_list(axes) or not all(is_integer(axis) and axis in known for axis in axes):
        given = reprlib.repr(axes)
        raise PluginError(f"The checkpoint allows mirroring on {given}, not on {list(known)}.")
    return tuple(map(int, axes)) or None


def _save_progress(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 1))
    figure.text(0.5, 0.5, "Imported weights: no training curve", ha="center", va="center")
    figure.savefig(path, dpi=80)
