"""Time of one window on the CPU: the published formula in torch against the CPU engine.

In float32 and, where the processor computes in it, bfloat16; alternating. A matrix product in the
same run tells what share of the processor's peak is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report as reports
import torch
from networks import INPUT_CHANNELS, NAMES, find_subject
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stunet_plugin.networks import cpu_engine
from stunet_plugin.options import CPU_PRECISION
from stunet_plugin.utils.files import HOME, write_atomically

MATRIX = 3072
"""Rows and columns of the product."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time of one window on the CPU: the published formula against the CPU engine.",
        epilog="Example: python benchmarks/cpu_engine.py small PCTNet-mode0 --json cpu_engine.json",
    )
    add = parser.add_argument
    add("networks", nargs="+", choices=NAMES, metavar="NETWORK", help=", ".join(NAMES))
    add("--edge", type=int, default=96, help="voxels of the window per axis")
    add("--outputs", type=int, default=105, help="background included")
    add("--rounds", type=int, default=5)
    add("--json", type=Path, required=True, help="file for the numbers; a file there is added to")
    return parser


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def engine_in(precision: str, network: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """Return a function that runs the compiled network."""

    def run() -> None:
        os.environ[CPU_PRECISION.variable] = precision
        if cpu_engine.predict(network, x, shared=True) is None:
            sys.exit(f"OpenVINO does not take {type(network).__name__} in {precision}.")

    return run


def matrix_product(precision: str) -> Callable[[], Any]:
    """Return a function that multiplies two matrices in OpenVINO; torch is slower on some."""
    import openvino
    from openvino import opset13 as ops

    one = np.random.default_rng(0).standard_normal((MATRIX, MATRIX), np.float32)
    place = ops.parameter([MATRIX, MATRIX])
    model = openvino.Model([ops.matmul(place, ops.constant(one), False, False)], [place])
    compiled = cpu_engine._Compiled(model, precision, one.nbytes)
    return partial(compiled.run, torch.from_numpy(one))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    subject = find_subject(name)
    shape = (options.edge,) * 3
    torch.manual_seed(0)
    plain = subject.plain(options.outputs, False, shape).eval()
    ours = subject.ours(options.outputs, False).eval()
    ours.load_state_dict(subject.translate(plain.state_dict()))
    x = torch.randn(1, INPUT_CHANNELS, *shape)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        meta = subject.ours(options.outputs, False).eval()
        meta(torch.empty(x.shape))
    operations = counter.get_total_flops()
    more = [cpu_engine.BFLOAT16] if cpu_engine.has_bfloat16() else []
    precisions = [cpu_engine.FLOAT32, *more]
    # Labels of random weights say nothing, so any agreement will do here.
    cpu_engine.LEAST_AGREEMENT = 0
    ways = {"published": lambda: plain(x)}
    ways |= {precision: engine_in(precision, ours, x) for precision in precisions}
    products = {precision: matrix_product(precision) for precision in precisions}
    with torch.inference_mode():
        first = {way: seconds_of(call) for way, call in ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peaks: dict[str, list[float]] = {precision: [] for precision in precisions}
        for _ in range(options.rounds):
            for way, call in ways.items():
                seconds[way].append(seconds_of(call))
            for precision, product in products.items():
                peaks[precision].append(2 * MATRIX**3 / seconds_of(product))
    return {
        "network": name,
        "window": list(shape),
        "outputs": options.outputs,
        "teraflop": operations / 1e12,
        "seconds": {way: reports.spread(values) for way, values in seconds.items()},
        "first_seconds": first,
        "of_published": {p: reports.ratios(seconds[p], seconds["published"]) for p in precisions},
        "share_of_peak": {
            p: operations / reports.spread(seconds[p])["median"] / max(peaks[p]) for p in precisions
        },
        "peak_gflops": {p: max(values) / 1e9 for p, values in peaks.items()},
    }


def main() -> int:
    options = build_parser().parse_args()
    report: dict[str, Any] = {**reports.about(), "networks": []}
    if options.json.exists():
        report["networks"] = json.loads(options.json.read_text("utf-8"))["networks"]
    for name in options.networks:
        with tempfile.TemporaryDirectory() as home:
            os.environ[HOME] = home
            found = measure(name, options)
        cpu_engine._compiled.clear()
        report["networks"].append(found)
        write_atomically(options.json, json.dumps(report, indent=1) + "\n")
        ratios = {p: reports.ratio_text(ratio) for p, ratio in found["of_published"].items()}
        print(name, found["seconds"]["published"]["median"], ratios, found["share_of_peak"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
