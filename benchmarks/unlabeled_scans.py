"""Time and memory of ``stunet unlabeled`` for many scans, with generated ones.

Two measurements: many small scans (what the command itself costs), and a few of the size of a
clinical CT (what a scan costs). Writes a JSON file. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import report as reports
import SimpleITK as sitk

from stunet_plugin.utils.files import write_atomically

SMALL_SHAPE, CLINICAL_SHAPE = (48, 128, 128), (250, 512, 512)
SPACING = (0.8, 0.8, 1.5)
"""Millimetres, x first."""
POLL_SECONDS = 0.1


def make_scans(folder: Path, count: int, shape: tuple[int, int, int]) -> int:
    """Write CT-like scans as .nii.gz; return their size in bytes."""
    folder.mkdir(parents=True)
    z, y, x = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
    inside = (x / 0.85) ** 2 + (y / 0.7) ** 2 + 0 * z < 1
    lung = ((abs(x) - 0.4) / 0.25) ** 2 + (y / 0.4) ** 2 + z**2 < 1
    noise = np.random.default_rng(0).normal(0, 20, shape)
    scan = (np.where(lung, -850, np.where(inside, 40, -1000)) + noise).astype(np.int16)
    for number in range(count):
        # Different in a voxel is different.
        scan[0, 0, 0], scan[0, 0, 1] = divmod(number, 1000)
        image = sitk.GetImageFromArray(scan)
        image.SetSpacing(SPACING)
        sitk.WriteImage(image, str(folder / f"scan_{number:06d}.nii.gz"), True, 1)
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(
    folder: Path, count: int, shape: tuple[int, int, int], processes: int
) -> dict[str, Any]:
    """Run the command twice on new scans."""
    size = make_scans(folder / "scans", count, shape)
    raw = folder / "raw"
    raw.mkdir()
    first, second = (run(folder / "scans", raw, processes) for _ in range(2))
    dataset = next(raw.glob("Dataset*"))
    assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == count
    labels = sum(path.stat().st_size for path in (dataset / "labelsTr").iterdir())
    return {
        "scans": count,
        "shape": shape,
        "bytes_per_scan": round(size / count),
        "bytes_per_label": round(labels / count),
        "seconds": first["seconds"],
        "cpu_seconds_per_scan": round(first["cpu"] / count, 4),
        "seconds_again": second["seconds"],
        "parent_megabytes": first["parent"],
        "largest_worker_megabytes": first["worker"],
    }


def run(scans: Path, raw: Path, processes: int) -> dict[str, float]:
    """Run the command; return seconds (of the clock, and of all cores together) and the peaks of
    memory of the parent and of its largest worker in MB."""
    words = f"-m stunet_plugin unlabeled -d 900 -n Benchmark --modality CT -np {processes} -i"
    environment = {**os.environ, "nnUNet_raw": str(raw), "OMP_NUM_THREADS": "1"}
    started, before = time.monotonic(), cpu_seconds()
    process = subprocess.Popen(
        [sys.executable, *words.split(), str(scans)], env=environment, stdout=subprocess.DEVNULL
    )
    parent = worker = 0.0
    while process.poll() is None:
        parent = max(parent, peak(process.pid))
        worker = max([worker, *(peak(child) for child in children(process.pid))])
        time.sleep(POLL_SECONDS)
    seconds = round(time.monotonic() - started, 2)
    if process.returncode != 0:
        raise SystemExit(f"stunet unlabeled ended with {process.returncode}")
    memory = {"parent": round(parent, 1), "worker": round(worker, 1)}
    return {"seconds": seconds, "cpu": cpu_seconds() - before, **memory}


def cpu_seconds() -> float:
    """Return what the processes that have ended took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak(process: int) -> float:
    """Return the peak of the resident memory of a process in MB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    found = (int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return next(found, 0.0)


def children(process: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]
    except OSError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--scans", type=int, default=1000, help="small scans")
    add("--clinical", type=int, default=20, help="scans of the size of a CT")
    add("--processes", type=int, default=os.cpu_count() or 1)
    add("--note", default="", help="about the circumstances, for the JSON file")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON file")
    options = parser.parse_args()
    report = {**reports.about(), "processes": options.processes, "note": options.note}
    kinds = {"small": (options.scans, SMALL_SHAPE), "clinical": (options.clinical, CLINICAL_SHAPE)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (count, shape) in kinds.items():
            report[name] = measure(Path(folder, name), count, shape, options.processes)
    write_atomically(options.out, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
