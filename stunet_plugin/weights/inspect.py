"""Inspection of a checkpoint or a model folder, reading no more of it than that takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stunet_plugin.errors import few
from stunet_plugin.networks.anisotropy import MODE_PURPOSES
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights.choose_plan import find_plan
from stunet_plugin.weights.file_formats import FileFormat, recognise
from stunet_plugin.weights.identify import NetworkWeights, Origin, read_weights
from stunet_plugin.weights.locate import find_model
from stunet_plugin.weights.model_folder import PROVENANCE
from stunet_plugin.weights.output_labels import choose_labels
from stunet_plugin.weights.read_plans import read_plans_file
from stunet_plugin.weights.safe_loading import load_checkpoint
from stunet_plugin.weights.sam import read_sam
from stunet_plugin.weights.trained_options import trained_options

if TYPE_CHECKING:
    from stunet_plugin.commands.inspect import Inspect


def inspect(options: Inspect) -> int:
    """Print what is known, one line per fact, or as JSON."""
    facts = _facts(options.file)
    if options.json:
        print(json.dumps(dict(facts), indent=2))
        return 0
    for name, text in facts:
        print(f"{name + ':':<13}{text}")
    return 0


def _facts(given: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text). The tensors of zip-format files are only mapped; what is not asked for is
    not read."""
    source = find_model(given)
    path = source.checkpoint
    yield "file", str(path)
    file_format = recognise(path)
    yield "size", f"{path.stat().st_size / 1024**2:,.1f} MB, {file_format.value}"
    if file_format is FileFormat.PICKLE:
        yield "format", "plans of nnU-Net v1"
        yield "plan", read_plans_file(path).summary()
        return
    checkpoint = load_checkpoint(path)
    if sam := read_sam(checkpoint, path):
        yield "network", sam.description
        yield "use", "`stunet import` makes a model of it for `stunet prompt` and for fine-tuning"
        yield from _provenance(path)
        return
    weights = read_weights(path, any_mode=True, checkpoint=checkpoint)
    yield "format", weights.origin.value
    yield "network", weights.description
    if options := trained_options(weights.checkpoint):
        yield "options", ", ".join(options)
    if weights.origin is Origin.PCTNET:
        yield "modes", f"it holds all: choose one with `stunet import --mode N`. {MODE_PURPOSES}"
    known = {"trainer_name": "trainer", "epoch": "epochs", "current_epoch": "epochs"}
    for key, name in (known | {"iteration": "iterations"}).items():
        value = weights.checkpoint.get(key)
        # An import writes epoch 0: it does not know better.
        if isinstance(value, (str, int)) and value:
            yield name, str(value)[:80]
    plan = find_plan(source, weights)
    yield "plan", f"{plan.summary()} ({plan.origin})" if plan else _no_plan(weights)
    if weights.outputs and weights.origin is not Origin.NNSSL:
        labels, origin = choose_labels(source, weights, plan)
        names = list(labels["labels"])
        yield "labels", f"{len(names)}: {few(names, 12)} ({origin})"
    yield from _provenance(path)


def _no_plan(weights: NetworkWeights) -> str:
    network = weights.misfm
    if weights.encoder_only:
        return "unknown: fine-tune with a plan of the dataset that has this network"
    if not network or weights.outputs:
        return "unknown: `stunet import` will ask for --plans or plan options"
    return (
        "none, as these are the weights of a pretext task: fine-tune with the dataset's own, of"
        f" {network.planner} (-p {network.plans})"
    )


def _provenance(checkpoint: Path) -> Iterator[tuple[str, str]]:
    """The record of an import, where the checkpoint lies in a folder that one wrote."""
    record = checkpoint.parent.parent / PROVENANCE
    if record.is_file():
        content = read_json(record)
        versions = content.get("versions")
        known = versions.items() if isinstance(versions, dict) else [("unknown", "tools")]
        tools = ", ".join(f"{name} {version}" for name, version in known)
        yield "imported", f"{content.get('date')} from {content.get('source')} by {tools}"
        yield "sha256", f"{content.get('sha256')} (of the source)"
