"""``stunet import``: a published checkpoint becomes an nnU-Net v2 model folder."""

from __future__ import annotations

import argparse
import platform
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin import __version__
from stunet_plugin.checkpoints.file_formats import FileFormat, check_integrity, recognise
from stunet_plugin.checkpoints.found_network import DIMENSIONS, STUNetWeights, check_finite, read_stunet
from stunet_plugin.checkpoints.safe_loading import load_checkpoint, sha256_of
from stunet_plugin.checkpoints.stem import REPEAT, inflate_stem
from stunet_plugin.errors import PluginError
from stunet_plugin.importing.choose_plan import PlanOptions, choose_labels, choose_plan
from stunet_plugin.importing.fields import is_list, is_whole
from stunet_plugin.importing.labels import Labels
from stunet_plugin.importing.model_folder import (
    Writer,
    check_target,
    dataset_folder_name,
    json_writer,
    leftovers,
    results_folder,
    write_model_folder,
)
from stunet_plugin.importing.names import CHECKPOINT, CONFIGURATION, DEFAULT_DATASET_ID, DEFAULT_FOLD, PLANS_NAME
from stunet_plugin.importing.published import published_facts
from stunet_plugin.importing.source_plan import SourcePlan
from stunet_plugin.importing.sources import Hub, Source, find_source
from stunet_plugin.plan_architecture import resolve_stunet
from stunet_plugin.registration import host_version

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImportOptions:
    """What the user asked for; see ``stunet import --help``."""

    source: str
    out: str | None = None
    dataset_id: int = DEFAULT_DATASET_ID
    name: str | None = None
    fold: str = DEFAULT_FOLD
    plan: PlanOptions = field(default_factory=PlanOptions)
    labels: Sequence[str] | None = None
    in_channels: int | None = None
    stem: str = REPEAT
    force: bool = False

    @classmethod
    def from_arguments(cls, given: argparse.Namespace) -> ImportOptions:
        plan = PlanOptions(given.plans, given.spacing, given.patch_size, given.strides, given.mask_for_norm, given.reader)
        place = (given.out, given.dataset_id, given.name, given.fold)
        return cls(given.source, *place, plan, given.labels, given.in_channels, given.stem, given.force)


@dataclass(frozen=True)
class ImportedModel:
    """The model folder of an import, the trainer that builds its network, and whether that is a published size."""

    folder: Path
    trainer: str
    published_size: bool


def import_checkpoint(options: ImportOptions, hub: Hub | None = None) -> ImportedModel:
    """Import a checkpoint and return its model folder.

    Args:
        options: what to import and how.
        hub: see :func:`stunet_plugin.importing.sources.find_source`.

    Raises:
        PluginError: with what is wrong and what to do; no output is left.
    """
    if options.fold != "all" and not options.fold.isdigit():
        raise PluginError(f"--fold must be a number or 'all', not {options.fold!r}.")
    source = find_source(options.source, hub)
    checkpoint = load_checkpoint(source.checkpoint)
    weights = read_stunet(checkpoint, source.checkpoint)
    plan = choose_plan(source, checkpoint, weights, options.plan)
    labels = choose_labels(source, checkpoint, weights, plan, options.labels)
    plan.check_network(weights)
    labels.check_outputs(weights.outputs)
    print(
        f"Checkpoint:   {source.checkpoint.name}, {weights.origin.value}\nNetwork:      {describe_size(weights)}\n"
        f"Plan:         {plan.origin}: {plan.summary()}\nLabels:       {labels.origin}"
    )
    name = options.name or (published_facts()["dataset_name"] if plan.published else _file_stem(source))
    dataset_name = dataset_folder_name(options.dataset_id, name)
    trainer = trainer_name(weights)
    target = Path(options.out) if options.out else results_folder(dataset_name) / f"{trainer}__{PLANS_NAME}__{CONFIGURATION}"
    check_target(target, options.force)

    if recognise(source.checkpoint) is FileFormat.TORCH_ZIP:
        check_integrity(source.checkpoint)
    check_finite(weights.tensors, source.checkpoint)
    provenance = _provenance(options, source, weights, plan, labels)
    # From here on the weights and the plan are the ones to write.
    tensors = weights.tensors
    if options.in_channels is not None:
        tensors = inflate_stem(tensors, options.in_channels, options.stem)
        plan = plan.with_channels(options.in_channels)
    plans = plan.to_plans(weights, dataset_name)
    resolve_stunet(plans["configurations"][CONFIGURATION], weights.preset, trainer)
    dataset = _dataset(plan, labels, dataset_name, source)
    mirroring = _mirroring_axes(checkpoint)
    files = _files(options.fold, plans, dataset, plan, tensors, trainer, mirroring)
    published_size = weights.preset is not None
    del checkpoint, weights
    for leftover in leftovers(target):
        print(f"Left over from an import that was killed: {leftover}. Delete it if no import is running.")
    write_model_folder(target, files, provenance, options.force)
    return ImportedModel(target, trainer, published_size)


def run_import(options: ImportOptions, hub: Hub | None = None) -> int:
    """Import, and say what to run next."""
    from stunet_plugin.stock_commands import terminate_as_interrupt

    with terminate_as_interrupt():
        model = import_checkpoint(options, hub)
    installed = f" -d {options.dataset_id} -c {CONFIGURATION} -tr {model.trainer}"
    where = f"_from_modelfolder -m {model.folder}" if options.out else installed
    weights = model.folder / f"fold_{options.fold}" / CHECKPOINT
    plans = "" if model.published_size else f" -p NAME    # plans from: stunet plan-like {model.folder} -d DATASET"
    print(
        f"Model folder: {model.folder}\n"
        f"Predict:      nnUNetv2_predict{where} -f {options.fold} -i IMAGES -o PREDICTIONS\n"
        f"Fine-tune:    nnUNetv2_train DATASET {CONFIGURATION} FOLD -tr {model.trainer}_ft -pretrained_weights {weights}{plans}"
    )
    return 0


def trainer_name(weights: STUNetWeights) -> str:
    """Return the trainer that builds this network: the size's, or the one that follows the plan."""
    return f"STUNetTrainer_{weights.preset.name}" if weights.preset else "STUNetTrainer"


def describe_size(weights: STUNetWeights) -> str:
    size = f"STU-Net {weights.preset.name}" if weights.preset else "an STU-Net of no published size"
    return (
        f"{size} (widths {list(weights.features)}, blocks {list(weights.blocks)}), {weights.parameters:,} parameters, "
        f"{weights.input_channels} input channel(s), {weights.outputs} outputs"
    )


def _mirroring_axes(checkpoint: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Axes that prediction may mirror: what an nnU-Net v2 checkpoint says, else all, as every published training mirrors on all."""
    axes = checkpoint.get("inference_allowed_mirroring_axes", tuple(range(DIMENSIONS)))
    if axes is not None and not (is_list(axes) and all(is_whole(axis) and axis in range(DIMENSIONS) for axis in axes)):
        raise PluginError(f"The checkpoint allows mirroring on {reprlib.repr(axes)}; expected some of {list(range(DIMENSIONS))}.")
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
    """Return the folder's files. The last three are only there for nnUNetv2_export_model_to_zip, which stops without them."""
    note = "imported by `stunet import`; the training that wrote these weights left no such file"
    content = {
        "network_weights": {name: _standing_alone(tensor) for name, tensor in tensors.items()},
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": {
            "plans": plans,
            "configuration": CONFIGURATION,
            "fold": int(fold) if fold.isdigit() else fold,
            "dataset_json": dataset,
        },
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": mirroring,
    }
    fingerprint = {
        "note": note,
        "spacings": [list(plan.spacing)],
        "shapes_after_crop": [list(plan.median_shape or plan.patch_size)],
        "foreground_intensity_properties_per_channel": plans["foreground_intensity_properties_per_channel"],
        "median_relative_size_after_cropping": 1.0,
    }
    return {
        "plans.json": json_writer(plans),
        "dataset.json": json_writer(dataset),
        f"fold_{fold}/{CHECKPOINT}": lambda path: _save(content, path),
        "dataset_fingerprint.json": json_writer(fingerprint),
        f"fold_{fold}/progress.png": _save_progress,
        f"fold_{fold}/validation/summary.json": json_writer({"note": note, "metric_per_case": [], "mean": {}}),
    }


def _standing_alone(tensor: Tensor) -> Tensor:
    """Return float32 values that share no memory with others (torch would write that memory along); mostly the tensor itself."""
    import torch

    tensor = tensor.to(torch.float32)
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _save(content: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(content, path)


def _save_progress(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 1))
    figure.text(0.5, 0.5, "Imported weights: no training curve", ha="center", va="center")
    figure.savefig(path, dpi=80)


def _dataset(plan: SourcePlan, labels: Labels, dataset_name: str, source: Source) -> dict[str, Any]:
    return {
        "name": dataset_name,
        "description": f"Labels and channels of the weights in {source.checkpoint.name}; there are no training cases here.",
        "channel_names": {str(channel): name for channel, name in enumerate(plan.channel_names)},
        **labels.to_dataset(),
        "numTraining": 0,
        "file_ending": plan.file_ending,
    }


def _provenance(options: ImportOptions, source: Source, weights: STUNetWeights, plan: SourcePlan, labels: Labels) -> dict[str, Any]:
    import numpy
    import torch

    return {
        "source": options.source,
        "file": source.checkpoint.name,
        "sha256": sha256_of(source.checkpoint),
        "plans_pickle_sha256": sha256_of(source.plans_pickle) if source.plans_pickle else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "format": weights.origin.value,
        "network": describe_size(weights),
        "plan": plan.origin,
        "labels": labels.origin,
        "input_channels": options.in_channels or weights.input_channels,
        "stem": options.stem if options.in_channels not in (None, weights.input_channels) else "as in the source",
        "versions": {
            "stunet-plugin": __version__,
            "nnunetv2": host_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def _file_stem(source: Source) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", source.checkpoint.stem).lstrip("_-") or "imported"
