"""Memory of a training step of STU-Net: by stage, kept for the backward pass, by checkpointing.

In float32 on the CPU, in bytes that torch allocates (``measure_step.py``), which no clock and no
other program disturbs. Buffers inside of convolutions depend on the processor and the number of
threads; the rest is the same on any device, but for mixed precision, which halves activations.
Writes a JSON file and a Markdown table beside it.

    python benchmarks/memory_of_step.py --out memory.json
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import report as reports
import torch
from measure_step import OURS, TRAIN, Case, Step, allocation_peaks, make_step, storage_bytes
from networks import find_subject
from torch import Tensor, nn
from torch.profiler import record_function

from stunet_plugin.networks.activation_checkpointing import SETTINGS
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.memory import PUBLISHED_STRIDES, STUNetShape
from stunet_plugin.networks.presets import get_preset

PATCH = (64, 64, 64)
SIZE, OUTPUTS = "small", (3, 15, 105)
CASE = Case(OURS, SIZE, TRAIN, False, "cpu", PATCH, batch=1, classes=OUTPUTS[0], steps=1)
STAGES = ("forward", "loss", "backward", "optimizer", "validation")
MAKERS = {
    "ConvolutionBackward0": "outputs of convolutions (inputs of the norms)",
    "LeakyReluBackward1": "outputs of LeakyReLU (inputs of convolutions)",
    "CatBackward0": "concatenations",
}
"""By the operation that made a tensor, what it is."""
LOSS_KIND, OTHERS = "in the loss", "image and targets, statistics of norms, small maps"
WIDTH, CHECKPOINTED = 8, ((1, 3), (2, 3), (3, 3), (2, 105))
"""Of the networks with checkpointing: base width; blocks per stage and outputs."""
MEBIBYTE = 2**20


def peaks_by_stage(step: Step, keep_gradients: bool) -> dict[str, int]:
    """Return the peak in bytes of each stage of a training step and of the validation after it."""

    def run() -> None:
        step.network.train()
        with record_function("forward"):
            outputs = step.network(step.data)
        with record_function("loss"):
            loss = step.loss(outputs, step.targets)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            # nnU-Net's step has outputs and loss until it returns.
            nn.utils.clip_grad_norm_(step.parameters.parameters(), 12)
            step.optimizer.step()
        del outputs, loss
        if not keep_gradients:
            step.optimizer.zero_grad(set_to_none=True)
        step.network.eval()
        with record_function("validation"), torch.no_grad():
            step.loss(step.network(step.data), step.targets)

    resident = step.resident()
    return {stage: resident + peak for stage, peak in allocation_peaks(run, STAGES).items()}


def kept_for_backward(step: Step) -> dict[str, int]:
    """Return the bytes that autograd keeps when the loss is there, by what they are."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in step.parameters.parameters()}
    kept: dict[int, tuple[Tensor, str]] = {}
    in_loss = False
    step.network.train()

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tensor.numel():
            made_by = MAKERS.get(tensor.grad_fn.name() if tensor.grad_fn else "", OTHERS)
            # An operation that keeps its own output does not say who made it; whoever takes it
            # does. Held on to, so that no later storage has the same place.
            if place not in kept or kept[place][1] == OTHERS:
                kept[place] = tensor, LOSS_KIND if in_loss and place not in kept else made_by
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = step.network(step.data)
        in_loss = True
        loss = step.loss(outputs, step.targets)
    total: Counter[str] = Counter()
    for tensor, what in kept.values():
        total[what] += tensor.untyped_storage().nbytes()
    del loss
    return dict(total)


def measure(outputs: int) -> dict[str, int]:
    """Return bytes by what they are, of one number of outputs."""
    step = make_step(replace(CASE, classes=outputs))
    step()
    weights = storage_bytes(step.parameters.parameters())
    peaks = peaks_by_stage(step, keep_gradients=True)
    without = peaks_by_stage(step, keep_gradients=False)["validation"]
    return {
        "weights (gradients and momentum are as large)": weights,
        **{f"peak of {stage}": size for stage, size in peaks.items()},
        "peak of validation, gradients discarded": without,
        **{f"kept for backward: {name}": size for name, size in kept_for_backward(step).items()},
    }


def checkpointed(blocks: int, outputs: int) -> dict[str, int]:
    """Return the peak of a step and its estimate, for each setting of activation checkpointing."""
    preset = replace(get_preset("tiny"), width=WIDTH, blocks=blocks)
    shape = STUNetShape.of_preset(preset, PUBLISHED_STRIDES, 1, outputs)
    architecture = stunet_architecture(preset, PUBLISHED_STRIDES)
    subject = replace(find_subject(SIZE), architecture=architecture)
    found = {}
    for setting in SETTINGS:
        step = make_step(replace(CASE, classes=outputs), subject)
        step.network.checkpointing = setting
        step()
        found[setting] = step.peak()
        estimate = shape.training_memory(PATCH, 1, mixed_precision=False, checkpointing=setting)
        found[f"{setting}, estimated"] = estimate
    return found


def markdown_tables(report: dict[str, Any]) -> str:
    """Return the numbers in MiB: a column per number of outputs, a row per checkpointed network."""

    def row(name: str, values: list[int]) -> list[str]:
        return [name, *(f"{value / MEBIBYTE:.0f}" for value in values)]

    parts = dict.fromkeys(name for found in report["parts"].values() for name in found)
    rows = [row(name, [found.get(name, 0) for found in report["parts"].values()]) for name in parts]
    first = reports.markdown(["MiB", *(f"{name} outputs" for name in report["parts"])], rows)
    networks = report["checkpointing"]
    rows = [row(name, list(found.values())) for name, found in networks.items()]
    return first + "\n\n" + reports.markdown(["MiB", *next(iter(networks.values()))], rows)


def run(out: Path) -> None:
    """Measure and write."""
    reports.check_output(out)
    report = {
        **reports.about(threads=torch.get_num_threads()),
        "settings": {"size": SIZE, "patch": PATCH, "batch": 1, "checkpointed width": WIDTH},
        "parts": {str(outputs): measure(outputs) for outputs in OUTPUTS},
        "checkpointing": {
            f"{blocks} blocks per stage, {outputs} outputs": checkpointed(blocks, outputs)
            for blocks, outputs in CHECKPOINTED
        },
    }
    reports.write(out, report, markdown_tables(report))
    print(markdown_tables(report))


def main(arguments: Sequence[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the table goes to .md")
    options = parser.parse_args(arguments)
    return reports.run_script(lambda: run(options.out), __file__)


if __name__ == "__main__":
    sys.exit(main())
