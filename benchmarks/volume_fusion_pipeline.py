"""How long one sample of Volume Fusion takes to make: ours beside a plain transcription of the
published pipeline.

Both make samples of the same scans: the plain one from memory, ours as in a training, from a folder
    that nnU-Net's dataset
reads (blosc2), a batch of pairs at a time, fused on the training device. The two alternate for
several rounds, so that a drift of the machine's speed meets both. Measured with one process on one
thread (what a background worker does), and with two processes at once (two cores). Writes a JSON
file and prints a Markdown table.

Exit codes: 0 done, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Before numpy and torch start their threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from plain_volume_fusion import fused_sample
from scipy.ndimage import gaussian_filter
from side_by_side import cpu_model
from step_report import ratio_text, seconds_text, spread

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining.subvolumes import SubVolumeLoader
from stunet_plugin.pretraining.volume_fusion import SCHEMES, VolumeFusion
from stunet_plugin.utils.files import write_atomically

SCANS = 3
BATCH = 2


def make_scans(shape: Sequence[int], folder: Path) -> list[np.ndarray]:
    """Make smooth scans with noise and air around, and write them as nnU-Net's preprocessing
    does."""
    generator = np.random.default_rng(0)
    scans = []
    for index in range(SCANS):
        tissue = (
            gaussian_filter(generator.normal(size=shape), 4) * 30
            + generator.normal(size=shape) * 0.1
        )
        grid = np.meshgrid(*(np.linspace(-1, 1, axis) for axis in shape), indexing="ij")
        tissue[sum(axis**2 for axis in grid[1:]) > 0.8] = -2
        scan = tissue[None].astype(np.float32)
        blocks, chunks = comp_blosc2_params(scan.shape, shape)
        labels = np.zeros(scan.shape, np.int8)
        nnUNetDatasetBlosc2.save_case(
            scan, labels, {}, str(folder / f"scan{index}"), chunks=chunks, blocks=blocks
        )
        scans.append(scan)
    return scans


def plain_samples(scans: list[np.ndarray], patch: Sequence[int]) -> Iterator[None]:
    while True:
        fused_sample(random.choice(scans), patch)
        yield


def our_samples(folder: Path, patch: Sequence[int]) -> Iterator[None]:
    loader = SubVolumeLoader(nnUNetDatasetBlosc2(str(folder)), BATCH, patch)
    fusion, generator = VolumeFusion(), torch.Generator()
    while True:
        foreground, background = next(loader)["data"].chunk(2)
        fusion(foreground, background, generator)
        yield from [None] * BATCH


def seconds_per_sample(samples: Iterator[None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(samples)
    return (time.perf_counter() - start) / count


Pipeline = Callable[..., Iterator[None]]


def measure_in_process(
    make: Pipeline, arguments: tuple[Any, ...], count: int, barrier: Any, queue: Any
) -> None:
    """Make samples in a process of its own: a batch to warm up, then ``count`` once all processes
    are ready."""
    torch.set_num_threads(1)
    samples = make(*arguments)
    seconds_per_sample(samples, BATCH)
    barrier.wait()
    queue.put(seconds_per_sample(samples, count))


def measure(make: Pipeline, arguments: tuple[Any, ...], count: int, processes: int) -> float:
    """Return seconds per sample: the slowest process's time, shared by all that ran at once."""
    context = get_context("fork")
    barrier, queue = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(
            target=measure_in_process, args=(make, arguments, count, barrier, queue), daemon=True
        )
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    slowest = max(queue.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    return slowest / processes


def measure_fusion(patch: Sequence[int], device: torch.device, count: int) -> dict[str, float]:
    """Return seconds per sample of the fusion alone, per scheme, on a device."""
    foreground, background = torch.rand(2, BATCH, 1, *patch, device=device)
    seconds = {}
    for year, scheme in SCHEMES.items():
        fusion, generator = VolumeFusion(scheme=scheme), torch.Generator().manual_seed(0)
        for warm_up in (True, False):
            start = time.perf_counter()
            for _ in range(2 if warm_up else count):
                fusion(foreground, background, generator)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[str(year)] = (time.perf_counter() - start) / count / BATCH
    return seconds


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the report."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scans = make_scans(options.volume, folder)
        pipelines: dict[str, tuple[Pipeline, tuple[Any, ...]]] = {
            "plain": (plain_samples, (scans, options.patch)),
            "ours": (our_samples, (folder, options.patch)),
        }
        results = []
        for processes in options.processes:
            rounds: dict[str, list[float]] = {name: [] for name in pipelines}
            for _ in range(options.repeats):
                for name, (make, arguments) in pipelines.items():
                    rounds[name].append(measure(make, arguments, options.samples, processes))
            ratios = [
                ours / plain for ours, plain in zip(rounds["ours"], rounds["plain"], strict=True)
            ]
            results.append(
                {
                    "processes": processes,
                    "seconds_per_sample": {name: spread(values) for name, values in rounds.items()},
                    "ours_over_plain": spread(ratios),
                }
            )
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": (
            {
                name: importlib.metadata.version(name)
                for name in ("torch", "numpy", "scipy", "nnunetv2")
            }
            | {"stunet-plugin": __version__}
        ),
        "settings": {
            "patch": options.patch,
            "volume": options.volume,
            "samples": options.samples,
            "repeats": options.repeats,
        },
        "results": results,
        "fusion_alone_seconds_per_sample": {
            device.type: measure_fusion(options.patch, device, options.samples)
            for device in devices
        },
    }


def markdown_table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table with a line on how it came about."""
    lines = ["| processes | ours | plain | ours / plain |", "|---:|---:|---:|---:|"]
    for result in report["results"]:
        times = [
            seconds_text(result["seconds_per_sample"][name]["median"]) for name in ("ours", "plain")
        ]
        lines.append(
            f"| {result['processes']} | {times[0]} | {times[1]} |"
            f" {ratio_text(result['ours_over_plain'])} |"
        )
    settings, machine = report["settings"], report["machine"]
    fusion = {
        device: ", ".join(f"{year}: {seconds_text(seconds)}" for year, seconds in years.items())
        for device, years in report["fusion_alone_seconds_per_sample"].items()
    }
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores; {report['date'][:10]}. Seconds per sample of"
        f" {settings['patch']} from scans of {settings['volume']}, medians of {settings['repeats']}"
        f" rounds of {settings['samples']} samples; in brackets the lowest and highest ratio of a"
        " round. The fusion alone, which ours does on the training device: "
        + "; ".join(f"{device} {years}" for device, years in fusion.items())
        + ".",
    ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(
            "Time per sample of Volume Fusion, ours beside a plain transcription of the published"
            " pipeline."
        ),
        epilog=(
            "Example: python benchmarks/volume_fusion_pipeline.py --out"
            " benchmarks/results/volume_fusion_pipeline.json"
        ),
    )
    parser.add_argument(
        "--patch",
        type=int,
        nargs=3,
        default=[64, 128, 128],
        metavar="N",
        help="voxels per axis of a sample",
    )
    parser.add_argument(
        "--volume",
        type=int,
        nargs=3,
        default=[128, 200, 200],
        metavar="N",
        help="voxels per axis of a scan",
    )
    parser.add_argument("--samples", type=int, default=20, help="per round and process")
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which the two alternate")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="at once, each on one thread"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON file; the table goes to .md beside it",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        if (
            min(
                *options.patch,
                *options.volume,
                *options.processes,
                options.samples,
                options.repeats,
            )
            < 1
        ):
            raise PluginError("All numbers must be at least 1.")
        if not options.out.parent.is_dir():
            raise PluginError(
                f"--out {options.out}: there is no folder {options.out.parent}. Make it first."
            )
        report = run(options)
    except PluginError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    table = markdown_table(report)
    write_atomically(options.out, json.dumps(report, indent=2))
    write_atomically(options.out.with_suffix(".md"), table + "\n")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
