"""How long ``stunet unlabeled`` takes for many scans, and how much memory: generated scans, on this
machine.

Three measurements: many small scans (what the command itself costs), a few of the size of a
    clinical CT (what a scan costs),
and the records of very many scans (what the command keeps in memory). Writes a JSON file. Linux.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from side_by_side import cpu_model

from stunet_plugin import __version__
from stunet_plugin.utils.files import write_atomically

SMALL_SHAPE, CLINICAL_SHAPE = (48, 128, 128), (250, 512, 512)
SPACING = (0.8, 0.8, 1.5)
"""Millimetres, x first."""
LOOK_EVERY = 0.1
MEGABYTE = 1024**2

RECORDS_SCRIPT = """
import sys, time
from pathlib import Path
from stunet_plugin.unlabeled.manifest import Manifest, Record
path, count = Path(sys.argv[1]), int(sys.argv[2])
facts = {"image": "link", "size": [512, 512, 250], "spacing": [0.8, 0.8, 1.5], "lowest": -1024.0, "highest": 3071.0, "body": 0.42}
if not path.exists():
    manifest = Manifest(path, lambda _: True)
    for number in range(count):
        source = f"/data/archive/{number % 977:04d}/patient_{number:07d}/scan_of_the_thorax.nii.gz"
        manifest.append(Record(source, f"{number}-1700000000000000000", "case", case=f"scan_{number:016x}", facts=facts))
else:
    def resident():
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    before = resident()
    started = time.monotonic()
    manifest = Manifest(path, lambda _: True)
    assert manifest.cases == count
    print(time.monotonic() - started, resident() - before)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=1000, help="small scans")
    parser.add_argument("--clinical", type=int, default=20, help="scans of the size of a CT")
    parser.add_argument("--records", type=int, default=100_000, help="records to load")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--note", default="", help="about the circumstances, for the JSON file")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "unlabeled_scans.json"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
            "versions": {
                "python": platform.python_version(),
                "stunet-plugin": __version__,
                "SimpleITK": importlib.metadata.version("SimpleITK"),
                "scipy": importlib.metadata.version("scipy"),
            },
            "processes": options.processes,
            "note": options.note,
            "small": measure(folder / "small", options.scans, SMALL_SHAPE, options.processes),
            "clinical": measure(
                folder / "clinical", options.clinical, CLINICAL_SHAPE, options.processes
            ),
            "records": measure_records(folder, options.records),
        }
    write_atomically(options.out, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0


def make_scans(folder: Path, count: int, shape: tuple[int, int, int]) -> int:
    """Write CT-like scans as .nii.gz; return their size in bytes."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    z, y, x = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
    inside = (x / 0.85) ** 2 + (y / 0.7) ** 2 + 0 * z < 1
    lung = ((abs(x) - 0.4) / 0.25) ** 2 + (y / 0.4) ** 2 + z**2 < 1
    scan = np.where(lung, -850, np.where(inside, 40, -1000)) + generator.normal(0, 20, shape)
    scan = scan.astype(np.int16)
    for number in range(count):
        # Different in a voxel is different; drawing and packing new noise would take longer than
        # what is measured.
        scan[0, 0, 0], scan[0, 0, 1] = divmod(number, 1000)
        image = sitk.GetImageFromArray(scan)
        image.SetSpacing(SPACING)
        sitk.WriteImage(
            image,
            str(folder / f"scan_{number:06d}.nii.gz"),
            useCompression=True,
            compressionLevel=1,
        )
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(
    folder: Path, count: int, shape: tuple[int, int, int], processes: int
) -> dict[str, Any]:
    """Run the command twice on new scans."""
    size = make_scans(folder / "scans", count, shape)
    raw = folder / "raw"
    raw.mkdir()
    first, second = (run(folder / "scans", raw, processes) for _ in range(2))
    with open(next(raw.glob("*/dataset.json"))) as file:
        assert json.load(file)["numTraining"] == count
    labels = sum(path.stat().st_size for path in next(raw.glob("*/labelsTr")).iterdir())
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
    arguments = [
        "unlabeled",
        "-i",
        str(scans),
        "-d",
        "900",
        "-n",
        "Benchmark",
        "--modality",
        "CT",
        "-np",
        str(processes),
    ]
    environment = {**os.environ, "nnUNet_raw": str(raw), "OMP_NUM_THREADS": "1"}
    started, before = time.monotonic(), cpu_seconds()
    process = subprocess.Popen(
        [sys.executable, "-m", "stunet_plugin", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    parent = worker = 0.0
    while process.poll() is None:
        parent = max(parent, peak(process.pid))
        worker = max([worker, *(peak(child) for child in children(process.pid))])
        time.sleep(LOOK_EVERY)
    seconds = time.monotonic() - started
    if process.returncode != 0:
        raise SystemExit(f"stunet unlabeled ended with {process.returncode}")
    used = cpu_seconds() - before
    return {
        "seconds": round(seconds, 2),
        "cpu": used,
        "parent": round(parent, 1),
        "worker": round(worker, 1),
    }


def cpu_seconds() -> float:
    """What the processes that have ended took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak(process: int) -> float:
    """Peak of the resident memory of a process in MB."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return next(
        (int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")),
        0.0,
    )


def children(process: int) -> list[int]:
    try:
        return [
            int(child)
            for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


def measure_records(folder: Path, count: int) -> dict[str, Any]:
    """Load the records of very many scans, in a process of their own."""
    path = folder / "manifest.jsonl"
    for _ in range(2):
        output = subprocess.run(
            [sys.executable, "-c", RECORDS_SCRIPT, str(path), str(count)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    seconds, kilobytes = output.split()
    return {
        "records": count,
        "file_megabytes": round(path.stat().st_size / MEGABYTE, 1),
        "seconds_to_load": round(float(seconds), 2),
        "megabytes_in_memory": round(int(kilobytes) / 1024, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
