"""Profile of a training step and of a prediction: the share of time of each kind of operation.

One step after warm-up under torch's profiler, ours and the plain transcription. Each operation's
own time goes to a kind, by its name; on CUDA it is the time of the kernels. Writes a JSON file and
a Markdown table beside it.

    python benchmarks/profile_step.py --networks small base --out profile_cpu.json
    python benchmarks/profile_step.py --device cuda --compile --peak-tflops 989 --out h100.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import report as reports
import torch
from measure_step import INFERENCE, OURS, PLAIN, TRAIN, Case, make_step, timed
from networks import NAMES
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

WARM_UP_STEPS = 2
OTHER = "other"
KINDS = {
    "convolution backward": "convolution_backward conv_depthwise3d_backward dgrad wgrad",
    "optimizer": "_foreach _fused sgd multi_tensor clip_grad",
    "loss": "softmax nll_loss scatter one_hot gather",
    "convolution": "convolution slow_conv aten::mm aten::addmm aten::bmm fprop gemm cudnn conv3d",
    "norm and activation": "group_norm batch_norm leaky_relu var_mean addcmul rsqrt bn_fw bn_bw",
    "concatenation and upsampling": "aten::cat CatArray upsample repeat",
    "copies": "copy_ clone contiguous Memcpy nchwToNhwc nhwcToNchw fill_ zero_ Memset",
    "sums and products": (
        "aten::add aten::mul aten::sum aten::sub aten::mean aten::div elementwise reduce"
    ),
}
"""Kinds by parts of the names of operations and kernels; the first that fits."""


def kind_of(name: str) -> str:
    """Return the kind of an operation."""
    fitting = (
        kind
        for kind, parts in KINDS.items()
        if any(part.lower() in name.lower() for part in parts.split())
    )
    return next(fitting, OTHER)


def shares(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return the share of the time that each kind of operation has in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        timed(step, device)
    time: Counter[str] = Counter()
    for event in profile.key_averages():
        if device == "cuda" and event.device_type == DeviceType.CUDA:
            time[kind_of(event.key)] += event.self_device_time_total
        elif device == "cpu":
            time[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: spent / time.total() for kind, spent in time.most_common()}


def profile_case(case: Case, peak_tflops: float | None) -> dict[str, Any]:
    """Measure one network in one mode."""
    step = make_step(case)
    for _ in range(WARM_UP_STEPS):
        step()
    seconds = min(timed(step, case.device) for _ in range(case.steps))
    row: dict[str, Any] = {"size": case.size, "mode": case.mode, "network": case.network}
    row |= {"seconds": seconds, "shares": shares(step, case.device)}
    if peak_tflops is not None:
        # Of the formula: what a compiler or another way to convolve saves does not count as work.
        with FlopCounterMode(display=False) as counter:
            make_step(replace(case, network=PLAIN, compiled=False, device="meta"))()
        row["share_of_peak"] = counter.get_total_flops() / seconds / (peak_tflops * 1e12)
    return row


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the shares in percent as Markdown."""
    values = {kind: [row["shares"].get(kind, 0) for row in rows] for kind in (*KINDS, OTHER)}
    if all("share_of_peak" in row for row in rows):
        values["**of the peak FLOP/s**"] = [row["share_of_peak"] for row in rows]
    header = [f"{row['size']}, {row['mode']}, {row['network']}" for row in rows]
    lines = [[name, *(f"{100 * value:.0f}" for value in found)] for name, found in values.items()]
    return reports.markdown(["share of time, %", *header], lines)


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NAMES, default=["small", "base"], metavar="NAME")
    add("--patch", type=int, nargs=3, default=[64] * 3, metavar="N")
    add("--batch", type=int, default=2, help="samples of a training step (2)")
    add("--classes", type=int, default=15)
    add("--steps", type=int, default=1, help="timed steps, the fastest of which counts (1)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--compile", action="store_true")
    add(
        "--peak-tflops", type=float, metavar="N", help="of the GPU; gives the share that is reached"
    )
    add("--out", type=Path, required=True, help="JSON file; the table goes to .md")
    options = parser.parse_args()
    sizes = tuple(options.patch), options.batch, options.classes, options.steps
    rows = []
    for size, mode, network in itertools.product(
        options.networks, (TRAIN, INFERENCE), (OURS, PLAIN)
    ):
        case = Case(network, size, mode, options.compile, options.device, *sizes)
        rows.append(profile_case(case, options.peak_tflops))
        gc.collect()
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    about = reports.about(threads=torch.get_num_threads(), gpu=gpu)
    reports.write(options.out, {**about, "settings": settings, "rows": rows}, markdown_table(rows))
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
