"""Where the memory of a training step goes: its peak by stage, what is kept for the backward pass,
and single suspects.

    python benchmarks/memory_of_step.py --out benchmarks/results/memory_of_step_cpu.json

One STU-Net in float32 on the CPU, counted in bytes that torch allocates (``measure_step.py``),
which no clock and no other program disturbs. Buffers inside of convolutions depend on the processor
and the number of threads; the rest is the same on any device, but for mixed precision, which halves
activations. Writes a JSON file and a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure_step import (
    OURS,
    SEED,
    TRAIN,
    Case,
    TrainingStep,
    allocation_peak,
    allocation_peaks,
    storage_bytes,
)
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

SIZE, PATCH = "small", (64, 64, 64)
OUTPUTS = (3, 15, 105)
FORWARD, LOSS, BACKWARD, OPTIMIZER, VALIDATION = (
    "forward",
    "loss",
    "backward",
    "optimizer",
    "validation",
)
STAGES = (FORWARD, LOSS, BACKWARD, OPTIMIZER, VALIDATION)
MAKERS = {
    "convolution": "outputs of convolutions (inputs of the norms)",
    "leaky_relu_": "outputs of LeakyReLU (inputs of convolutions)",
    "cat": "concatenations",
}
"""By the operation that made a tensor, what it is."""
LOSS_KIND, OTHERS = "in the loss", "image and targets, statistics of norms, small maps"
MEBIBYTE = 2**20


class Makers(TorchDispatchMode):
    """Notes for each storage the operation that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.maker: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            # Views are made by what made the whole; what works in place counts.
            if isinstance(value, Tensor) and (
                name.endswith("_") or value.untyped_storage().data_ptr() not in given
            ):
                self.maker[value.untyped_storage().data_ptr()] = name
        return result


def peaks_by_stage(step: TrainingStep, keep_gradients: bool) -> dict[str, int]:
    """Return the peak in bytes of each stage of a training step and the validation step after it,
    with all that stays."""

    def run() -> None:
        step.network.train()
        with record_function(FORWARD):
            outputs = step.network(step.data)
        with record_function(LOSS):
            loss = step.loss(outputs, step.targets)
        with record_function(BACKWARD):
            loss.backward()
        with record_function(OPTIMIZER):
            # nnU-Net's step has outputs and loss until it returns.
            nn.utils.clip_grad_norm_(step.parameters.parameters(), 12)
            step.optimizer.step()
        del outputs, loss
        if not keep_gradients:
            step.optimizer.zero_grad(set_to_none=True)
        step.network.eval()
        with record_function(VALIDATION), torch.no_grad():
            step.loss(step.network(step.data), step.targets)

    resident = storage_bytes(step.resident())
    return {stage: resident + peak for stage, peak in allocation_peaks(run, STAGES).items()}


def kept_for_backward(step: TrainingStep) -> dict[str, int]:
    """Return the bytes that autograd keeps when the loss is there, by what they are."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in step.parameters.parameters()}
    kept: dict[int, tuple[Tensor, str]] = {}
    makers, kind = Makers(), ""

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tensor.numel():
            made_by = MAKERS.get(makers.maker.get(place, ""), OTHERS)
            # Held on to, so that no later storage has the same place.
            kept.setdefault(place, (tensor, kind or made_by))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), makers:
        outputs = step.network(step.data)
        kind = LOSS_KIND
        loss = step.loss(outputs, step.targets)
    total: Counter[str] = Counter()
    for tensor, what in kept.values():
        total[what] += tensor.untyped_storage().nbytes()
    del loss
    return dict(total)


def optimizer_extra(step: TrainingStep) -> dict[str, int]:
    """Return the bytes that each implementation of the optimizer's step takes for itself."""
    extra = {}
    for name, options in (
        ("foreach", {"foreach": True}),
        ("one by one", {"foreach": False}),
        ("fused", {"fused": True}),
    ):
        optimizer = torch.optim.SGD(
            step.parameters.parameters(),
            1e-2,
            weight_decay=3e-5,
            momentum=0.99,
            nesterov=True,
            **options,
        )
        for parameter in step.parameters.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the momentum
        extra[name] = allocation_peak(optimizer.step)
        optimizer.zero_grad(set_to_none=True)
    return extra


def loss_extra(step: TrainingStep) -> dict[str, int]:
    """Return what each term of the loss at full resolution alone takes above its logits and target,
    forward and backward."""
    criterion = step.loss.loss
    target = step.targets[0]
    logits = torch.randn(
        len(target), step.parameters.decoder.num_classes, *target.shape[2:], requires_grad=True
    )

    def run(term: Callable[[], Tensor]) -> None:
        term().backward()
        logits.grad = None

    terms = {
        "Dice": lambda: criterion.dc(logits, target),
        "cross-entropy": lambda: criterion.ce(logits, target[:, 0].long()),
        "both": lambda: criterion(logits, target),
    }
    return {
        "logits": storage_bytes([logits]),
        **{name: allocation_peak(partial(run, term)) for name, term in terms.items()},
    }


def measure(outputs: int) -> dict[str, Any]:
    """Measure one number of outputs."""
    torch.manual_seed(SEED)
    step = TrainingStep(Case(OURS, SIZE, TRAIN, False, "cpu", PATCH, 1, outputs, 1))
    step()
    parameters = list(step.parameters.parameters())
    return {
        "outputs": outputs,
        "parameter_bytes": storage_bytes(parameters),
        "peaks": peaks_by_stage(step, keep_gradients=True),
        "validation_without_gradients": peaks_by_stage(step, keep_gradients=False)[VALIDATION],
        "kept": kept_for_backward(step),
        "optimizer_extra": optimizer_extra(step),
        "loss_extra": loss_extra(step),
    }


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the numbers as Markdown: one column per number of outputs, MiB."""
    heads = [f"{row['outputs']} outputs" for row in rows]
    lines = [f"| MiB | {' | '.join(heads)} |", f"|---|{'---:|' * len(rows)}"]

    def add(name: str, value: Callable[[dict[str, Any]], int]) -> None:
        lines.append(f"| {name} | {' | '.join(f'{value(row) / MEBIBYTE:.0f}' for row in rows)} |")

    add("weights (gradients and momentum are as large)", lambda row: row["parameter_bytes"])
    for stage in STAGES:
        add(f"peak of {stage}", lambda row, stage=stage: row["peaks"][stage])
    add("peak of validation, gradients discarded", lambda row: row["validation_without_gradients"])
    kinds = dict.fromkeys(kind for row in rows for kind in row["kept"])
    for kind in kinds:
        add(f"kept for backward: {kind}", lambda row, kind=kind: row["kept"].get(kind, 0))
    for part, title in (
        ("optimizer_extra", "optimizer's step above that"),
        ("loss_extra", "full resolution alone"),
    ):
        for name in rows[0][part]:
            add(f"{title}: {name}", lambda row, part=part, name=name: row[part][name])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the table goes to .md")
    out = parser.parse_args().out
    rows = [measure(outputs) for outputs in OUTPUTS]
    host = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    out.write_text(
        json.dumps({"size": SIZE, "patch": PATCH, "batch": 1, **host, "rows": rows}, indent=1)
        + "\n"
    )
    out.with_suffix(".md").write_text(markdown_table(rows) + "\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
