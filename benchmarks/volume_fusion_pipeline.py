"""Time per sample of Volume Fusion: ours beside a transcription of the published pipeline.

Both make samples of the same scans: the plain one from memory, ours as in a training, from a folder
that nnU-Net's dataset reads (blosc2), a batch of pairs at a time, fused on the training device. The
two alternate for several rounds, on one thread, as a background worker. Writes a JSON file and a
Markdown table beside it.

Exit codes: 0 done, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Before numpy and torch start their threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import report as reports
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from plain_volume_fusion import fused_sample
from report import seconds_text
from scipy.ndimage import gaussian_filter

from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining.subvolumes import SubVolumeLoader
from stunet_plugin.pretraining.volume_fusion import SCHEMES, VolumeFusion

SCANS, BATCH = 3, 2


def make_scans(shape: Sequence[int], folder: Path) -> list[np.ndarray]:
    """Make smooth scans with noise and air around, and write them as nnU-Net does."""
    generator = np.random.default_rng(0)
    grid = np.meshgrid(*(np.linspace(-1, 1, axis) for axis in shape), indexing="ij")
    scans = []
    for index in range(SCANS):
        tissue = gaussian_filter(generator.normal(size=shape), 4) * 30
        tissue += generator.normal(size=shape) * 0.1
        tissue[sum(axis**2 for axis in grid[1:]) > 0.8] = -2
        scan = tissue[None].astype(np.float32)
        blocks, chunks = comp_blosc2_params(scan.shape, shape)
        file, labels = str(folder / f"scan{index}"), np.zeros(scan.shape, np.int8)
        nnUNetDatasetBlosc2.save_case(scan, labels, {}, file, chunks=chunks, blocks=blocks)
        scans.append(scan)
    return scans


def seconds_per_sample(make_batch: Callable[[], object], samples: int) -> float:
    batches = -(-samples // BATCH)
    start = time.perf_counter()
    for _ in range(batches):
        make_batch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / batches / BATCH


def fuse_alone(patch: Sequence[int], device: str, samples: int) -> dict[str, float]:
    """Return seconds per sample of the fusion alone, per scheme, on a device."""
    foreground, background = torch.rand(2, BATCH, 1, *patch, device=device)
    seconds = {}
    for year, scheme in SCHEMES.items():
        fusion, generator = VolumeFusion(scheme=scheme), np.random.default_rng(0)
        fuse = partial(fusion, foreground, background, generator)
        seconds_per_sample(fuse, BATCH)  # warms up
        seconds[str(year)] = seconds_per_sample(fuse, samples)
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the report."""
    torch.set_num_threads(1)
    patch, count = options.patch, options.samples
    rounds: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        scans = make_scans(options.volume, Path(folder))
        loader = SubVolumeLoader(nnUNetDatasetBlosc2(folder), BATCH, patch)
        fusion, generator = VolumeFusion(), np.random.default_rng()
        make = {
            "ours": lambda: fusion(*next(loader)["data"].chunk(2), generator),
            "plain": lambda: [fused_sample(random.choice(scans), patch) for _ in range(BATCH)],
        }
        for number in range(options.repeats + 1):
            for name, found in rounds.items():
                seconds = seconds_per_sample(make[name], count)
                if number:  # the first round warms up
                    found.append(seconds)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    settings = {key: getattr(options, key) for key in ("patch", "volume", "samples", "repeats")}
    return {
        **reports.about(),
        "settings": settings,
        "seconds_per_sample": {name: reports.spread(found) for name, found in rounds.items()},
        "ours_over_plain": reports.ratios(rounds["ours"], rounds["plain"]),
        "fusion_alone_seconds_per_sample": {
            device: fuse_alone(patch, device, count) for device in devices
        },
    }


def markdown_table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table with a line on how it came about."""
    times = [seconds_text(one["median"]) for one in report["seconds_per_sample"].values()]
    rows = [[*times, reports.ratio_text(report["ours_over_plain"])]]
    settings, machine = report["settings"], report["machine"]
    fusion = "; ".join(
        f"{device} {', '.join(f'{year}: {seconds_text(one)}' for year, one in years.items())}"
        for device, years in report["fusion_alone_seconds_per_sample"].items()
    )
    note = (
        f"{machine['cpu']}, {machine['cores']} cores; {report['date'][:10]}. Seconds per sample of"
        f" {settings['patch']} from scans of {settings['volume']}, medians of {settings['repeats']}"
        f" rounds of {settings['samples']} samples; in brackets the lowest and highest ratio of a"
        f" round. The fusion alone, which ours does on the training device: {fusion}."
    )
    table = reports.markdown(["ours", "plain", "ours / plain"], rows, texts=0)
    return f"{table}\n\n{note}"


def run(options: argparse.Namespace) -> None:
    if min(*options.patch, *options.volume, options.samples, options.repeats) < 1:
        raise PluginError("All numbers must be at least 1.")
    reports.check_output(options.out)
    report = measure(options)
    reports.write(options.out, report, markdown_table(report))
    print(markdown_table(report))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Time per sample of Volume Fusion, ours beside the published pipeline.",
        epilog="Example: python benchmarks/volume_fusion_pipeline.py --out pipeline.json",
    )
    add, axes = parser.add_argument, {"type": int, "nargs": 3, "metavar": "N"}
    add("--patch", default=[64, 128, 128], help="voxels per axis of a sample", **axes)
    add("--volume", default=[128, 200, 200], help="voxels per axis of a scan", **axes)
    add("--samples", type=int, default=20, help="per round")
    add("--repeats", type=int, default=5, help="rounds in which the two alternate")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON file; the table goes to .md")
    options = parser.parse_args(arguments)
    return reports.run_script(lambda: run(options), __file__)


if __name__ == "__main__":
    sys.exit(main())
