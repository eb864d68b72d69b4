"""Profile of a training step or a prediction: the share of time of each kind of operation.

One step after warm-up under torch's profiler. Each operation's own time goes to a kind, by its
name; on CUDA it is the time of the kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import report as reports
import torch
from measure_step import PLAIN, Case, Step, make_step
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

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
    for kind, parts in KINDS.items():
        if any(part.lower() in name.lower() for part in parts.split()):
            return kind
    return OTHER


def shares(step: Step) -> dict[str, float]:
    """Return the share of the time that each kind of operation has in one step."""
    on_gpu = step.device == "cuda"
    cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cpu, cuda] if on_gpu else [cpu]) as profile:
        step.timed()
    time: Counter[str] = Counter()
    for event in profile.key_averages():
        if not on_gpu:
            time[kind_of(event.key)] += event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA:
            time[kind_of(event.key)] += event.self_device_time_total
    return {kind: spent / time.total() for kind, spent in time.most_common()}


def profile_step(case: Case, peak_tflops: float | None) -> dict[str, Any]:
    """Return the fastest step's seconds, its shares, and the share of the peak FLOP/s if given."""
    step = make_step(case)
    step.warm_up()
    seconds = min(step.timed() for _ in range(case.steps))
    row: dict[str, Any] = {"size": case.size, "mode": case.mode, "network": case.network}
    row |= {"seconds": seconds, "shares": shares(step)}
    if peak_tflops is not None:
        # Of the formula: what a compiler or another way to convolve saves does not count as work.
        with FlopCounterMode(display=False) as counter:
            make_step(replace(case, network=PLAIN, compiled=False, device="meta"))()
        row["share_of_peak"] = counter.get_total_flops() / seconds / (peak_tflops * 1e12)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the shares in percent as Markdown."""
    values = {kind: [row["shares"].get(kind, 0) for row in rows] for kind in (*KINDS, OTHER)}
    if all("share_of_peak" in row for row in rows):
        values["**of the peak FLOP/s**"] = [row["share_of_peak"] for row in rows]
    header = [f"{row['size']}, {row['mode']}, {row['network']}" for row in rows]
    lines = [[name, *(f"{100 * value:.0f}" for value in found)] for name, found in values.items()]
    return reports.markdown(["share of time, %", *header], lines)
