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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before numpy and torch start their threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import report as reports
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from plain_volume_fusion import fused_sample
from report import seconds_text, spread
from scipy.ndimage import gaussian_filter

from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining.subvolumes import SubVolumeLoader
from stunet_plugin.pretraining.volume_fusion import SCHEMES, VolumeFusion

SCANS = 3
BATCH = 2


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


def measure_fusion(patch: Sequence[int], device: str, count: int) -> dict[str, float]:
    """Return seconds per sample of the fusion alone, per scheme, on a device."""
    foreground, background = torch.rand(2, BATCH, 1, *patch, device=device)
    seconds = {}
    for year, scheme in SCHEMES.items():
        fusion, generator = VolumeFusion(scheme=scheme), torch.Generator().manual_seed(0)
        for repeats in (2, count):  # the first to warm up
            start = time.perf_counter()
            for _ in range(repeats):
                fusion(foreground, background, generator)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[str(year)] = (time.perf_counter() - start) / repeats / BATCH
    return seconds


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the report."""
    torch.set_num_threads(1)
    rounds: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as temporary:
        scans = make_scans(options.volume, Path(temporary))
        pipelines = {
            "ours": our_samples(Path(temporary), options.patch),
            "plain": plain_samples(scans, options.patch),
        }
        for number in range(options.repeats + 1):
            for name, samples in pipelines.items():
                seconds = seconds_per_sample(samples, options.samples)
                if number:  # the first round warms up
                    rounds[name].append(seconds)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    fusion = {device: measure_fusion(options.patch, device, options.samples) for device in devices}
    settings = {key: getattr(options, key) for key in ("patch", "volume", "samples", "repeats")}
    return {
        **reports.about(),
        "settings": settings,
        "seconds_per_sample": {name: spread(values) for name, values in rounds.items()},
        "ours_over_plain": reports.ratios(rounds["ours"], rounds["plain"]),
        "fusion_alone_seconds_per_sample": fusion,
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


def build_parser() -> argparse.ArgumentParser:
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
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        if min(*options.patch, *options.volume, options.samples, options.repeats) < 1:
            raise PluginError("All numbers must be at least 1.")
        reports.check_output(options.out)
        report = run(options)
    except PluginError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    reports.write(options.out, report, markdown_table(report))
    print(markdown_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
