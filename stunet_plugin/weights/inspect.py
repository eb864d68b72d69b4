"""Inspection of a checkpoint or a model folder, reading no more of it than that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stunet_plugin.networks.anisotropy import MODE_PURPOSES
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights.choose_plan import choose_labels, find_plan
from stunet_plugin.weights.file_formats import FileFormat, recognise
from stunet_plugin.weights.identify import NetworkWeights, Origin
from stunet_plugin.weights.locate import find_model
from stunet_plugin.weights.misfm import MISFMWeights
from stunet_plugin.weights.model_folder import PROVENANCE
from stunet_plugin.weights.output_labels import Labels
from stunet_plugin.weights.read_plans import plan_from_v1
from stunet_plugin.weights.read_weights import read_weights
from stunet_plugin.weights.safe_loading import load_plans_pickle

SHOWN_LABELS = 12


def inspect(given: str) -> int:
    """Print what is known, one line per fact.

    Raises:
        PluginError: the file is no checkpoint, or one that is refused.
    """
    for name, text in facts(given):
        print(f"{name + ':':<13}{text}")
    return 0


def facts(given: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every fact. The tensors of zip-format files are only mapped; what is
    not asked for is not read."""
    source = find_model(given)
    path = source.checkpoint
    yield "file", str(path)
    file_format = recognise(path)
    yield "size", f"{path.stat().st_size / 1024**2:,.1f} MB, {file_format.value}"
    if file_format is FileFormat.PICKLE:
        yield "format", "plans of nnU-Net v1"
        yield "plan", plan_from_v1(load_plans_pickle(path), path.name).summary()
        return
    weights = read_weights(path, file_format, any_mode=True)
    yield "format", weights.origin.value
    yield "network", weights.description
    if weights.origin is Origin.PCTNET:
        yield "modes", f"it holds all: choose one with `stunet import --mode N`. {MODE_PURPOSES}"
    yield from _training(weights.checkpoint)
    plan = find_plan(source, weights)
    yield "plan", f"{plan.summary()} ({plan.origin})" if plan else _no_plan(weights)
    if weights.outputs:
        labels = choose_labels(source, weights, plan, None)
        yield "labels", f"{_list_labels(labels)} ({labels.origin})"
    yield from _provenance(path)


def _no_plan(weights: NetworkWeights) -> str:
    """Say why there is no plan, and what that means."""
    if isinstance(weights, MISFMWeights) and not weights.outputs:
        network = weights.network
        own = f"the dataset's own, of {network.planner} (-p {network.plans})"
        return f"none, as these are the weights of a pretext task: fine-tune with {own}"
    return "unknown: `stunet import` will ask for --plans or plan options"


def _training(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    trainer, epoch = (
        checkpoint.get("trainer_name"),
        checkpoint.get("epoch", checkpoint.get("current_epoch")),
    )
    if isinstance(trainer, str):
        yield "trainer", trainer[:80]
    # An import writes epoch 0: it does not know better.
    if isinstance(epoch, int) and epoch > 0:
        yield "epochs", str(epoch)
    if isinstance(checkpoint.get("iteration"), int):
        yield "iterations", str(checkpoint["iteration"])


def _list_labels(labels: Labels) -> str:
    shown = ", ".join(labels.names[:SHOWN_LABELS])
    return f"{len(labels.names)}: {shown}{' ...' if len(labels.names) > SHOWN_LABELS else ''}"


def _provenance(checkpoint: Path) -> Iterator[tuple[str, str]]:
    """The record of an import, where the checkpoint lies in a folder that one wrote."""
    record = checkpoint.parent.parent / PROVENANCE
    if record.is_file():
        content = read_json(record)
        versions = content.get("versions")
        tools = (
            [f"{name} {version}" for name, version in versions.items()]
            if isinstance(versions, dict)
            else ["unknown tools"]
        )
        yield (
            "imported",
            f"{content.get('date')} from {content.get('source')} by {', '.join(tools)}",
        )
        yield "sha256", f"{content.get('sha256')} (of the source)"
