"""What a training step and the prediction of a patch spend their time on, ours beside the plain
transcription.

    python benchmarks/profile_step.py --sizes small base --patch 32 64 64 --batch 1 --out
    benchmarks/results/profile_step_cpu.json python benchmarks/profile_step.py --device cuda --amp
    --compile --peak-tflops 989 --patch 128 128 128 --out profile_h100.json

One step after warm-up under torch's profiler, in one process. Each operation's own time, without
what it calls, goes to a kind, by its name; on CUDA it is the time of the kernels. Writes a JSON
file and a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure_step
import torch
from measure_step import (
    INFERENCE,
    OURS,
    PLAIN,
    SEED,
    TRAIN,
    Case,
    InferenceStep,
    TrainingStep,
    timed,
)
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from stunet_plugin.networks.presets import PRESETS

WARM_UP_STEPS = 2
OTHER = "other"
KINDS = (
    (
        "convolution backward",
        ("convolution_backward", "conv_depthwise3d_backward", "dgrad", "wgrad"),
    ),
    ("optimizer", ("_foreach", "_fused", "sgd", "multi_tensor", "clip_grad")),
    ("loss", ("softmax", "nll_loss", "scatter", "one_hot", "gather")),
    (
        "convolution",
        (
            "convolution",
            "slow_conv",
            "aten::mm",
            "aten::addmm",
            "aten::bmm",
            "fprop",
            "gemm",
            "cudnn",
            "conv3d",
        ),
    ),
    (
        "norm and activation",
        (
            "group_norm",
            "batch_norm",
            "leaky_relu",
            "var_mean",
            "addcmul",
            "rsqrt",
            "bn_fw",
            "bn_bw",
        ),
    ),
    ("concatenation and upsampling", ("aten::cat", "CatArray", "upsample", "repeat")),
    (
        "copies",
        (
            "copy_",
            "clone",
            "contiguous",
            "Memcpy",
            "nchwToNhwc",
            "nhwcToNchw",
            "fill_",
            "zero_",
            "Memset",
        ),
    ),
    (
        "sums and products",
        (
            "aten::add",
            "aten::mul",
            "aten::sum",
            "aten::sub",
            "aten::mean",
            "aten::div",
            "elementwise",
            "reduce",
        ),
    ),
)
"""Kinds by parts of the names of operations and kernels; the first that fits."""


def kind_of(name: str) -> str:
    """Return the kind of an operation."""
    return next(
        (kind for kind, parts in KINDS if any(part.lower() in name.lower() for part in parts)),
        OTHER,
    )


def shares(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return the share of the time that each kind of operation has in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    time: Counter[str] = Counter()
    for event in profile.key_averages():
        if device == "cuda" and event.device_type == DeviceType.CUDA:
            time[kind_of(event.key)] += event.self_device_time_total
        elif device == "cpu":
            time[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: spent / time.total() for kind, spent in time.most_common()}


def profile_case(case: Case, amp: bool, peak_tflops: float | None) -> dict[str, Any]:
    """Measure one network in one mode."""
    torch.manual_seed(SEED)
    if not amp:
        measure_step.autocast = lambda _: nullcontext()
    with torch.device(case.device):
        step = TrainingStep(case) if case.mode == TRAIN else InferenceStep(case)
    for _ in range(WARM_UP_STEPS):
        step()
    seconds = min(timed(step, case.device) for _ in range(case.steps))
    row: dict[str, Any] = {
        "size": case.size,
        "mode": case.mode,
        "network": case.network,
        "seconds": seconds,
        "shares": shares(step, case.device),
    }
    if peak_tflops is not None:
        # Of the formula: what a compiler or another way to convolve saves does not count as work.
        counted = replace(case, network=PLAIN, compiled=False, device="meta")
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            (TrainingStep if case.mode == TRAIN else InferenceStep)(counted)()
        row["share_of_peak"] = counter.get_total_flops() / seconds / (peak_tflops * 1e12)
    return row


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the shares in percent as Markdown."""
    kinds = [kind for kind, _ in KINDS] + [OTHER]
    heads = [f"{row['size']}, {row['mode']}, {row['network']}" for row in rows]
    lines = [f"| share of time, % | {' | '.join(heads)} |", f"|---|{'---:|' * len(rows)}"]
    values = {kind: [row["shares"].get(kind, 0) for row in rows] for kind in kinds}
    if all("share_of_peak" in row for row in rows):
        values["**of the peak FLOP/s**"] = [row["share_of_peak"] for row in rows]
    lines += [
        f"| {name} | {' | '.join(f'{100 * value:.0f}' for value in found)} |"
        for name, found in values.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", choices=list(PRESETS), default=["small", "base"])
    add("--patch", type=int, nargs=3, default=[64] * 3, metavar="N")
    add("--batch", type=int, default=2, help="samples of a training step (default: %(default)s)")
    add("--classes", type=int, default=15)
    add(
        "--steps",
        type=int,
        default=1,
        help="timed steps, the fastest of which counts (default: %(default)s)",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--amp", action="store_true", help="autocast to float16, as nnU-Net on CUDA")
    add("--compile", action="store_true")
    add(
        "--peak-tflops",
        type=float,
        metavar="N",
        help="of the GPU in this precision; prints the share that is achieved",
    )
    add("--out", type=Path, required=True, help="JSON file; the table goes to .md")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = options.device == "cuda"
    rows = []
    for size in options.sizes:
        for mode in (TRAIN, INFERENCE):
            for network in (OURS, PLAIN):
                sizes = tuple(options.patch), options.batch, options.classes, options.steps
                case = Case(network, size, mode, options.compile, options.device, *sizes)
                rows.append(profile_case(case, options.amp, options.peak_tflops))
                gc.collect()
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    host = {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu}
    options.out.write_text(json.dumps({**settings, **host, "rows": rows}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown_table(rows) + "\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
