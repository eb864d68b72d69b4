"""``stunet segment``: label maps, statistics and a picture of every scan; what is done stays."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError, few, few_lines
from stunet_plugin.networks import cpu_engine
from stunet_plugin.segmentation.preview import save_preview
from stunet_plugin.segmentation.scans import Scan, find_scans
from stunet_plugin.segmentation.segmenter import Segmentation, Segmenter, shown
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.discovery import Source
from stunet_plugin.utils.files import lock, read_json, sha256_of, write_atomically
from stunet_plugin.utils.image_files import MOVE, ImageError, hash_of_image, place_image, side_files
from stunet_plugin.utils.images import check_image
from stunet_plugin.utils.parts import parts_of

if TYPE_CHECKING:
    from stunet_plugin.commands.segment import Segment

RECORDS, STATISTICS, RUN = "records", "statistics.csv", "run.json"
COLUMNS = ("scan", "structure", "labels", "voxels", "volume_ml", "mean_intensity", "touches_border")
FAST_STEP, STEP = 0.8, 0.5


def run_segment(options: Segment) -> int:
    """Segment; return 0, or 1 if nothing was found in a scan."""
    out = Path(os.path.abspath(Path(options.out).expanduser()))
    if out.exists() and not out.is_dir():
        raise PluginError(f"-o {out} is a file. Give a folder.")
    device = choose_device(options.device)
    if options.precision != cpu_engine.AUTO:
        os.environ[cpu_engine.CPU_PRECISION.variable] = options.precision
    segmenter = Segmenter(
        options.model,
        options.structures,
        options.folds,
        options.checkpoint,
        FAST_STEP if options.fast else STEP,
        options.mirror,
        device,
        not options.all_windows,
        options.force,
        progress=not options.quiet,
        crop=options.crop,
    )
    modality = "" if options.force else segmenter.modality
    scans = find_scans(options.scan, segmenter.model.channels, modality)
    chosen = parts_of(scans, options.num_parts, options.part_id)
    run = _Run(options, segmenter, out, device, several=len(scans) > 1)
    return run.segment(chosen)


class _Run:
    """An output folder, and the settings that a scan must have been segmented with to stay."""

    def __init__(
        self, options: Segment, segmenter: Segmenter, out: Path, device: str, several: bool
    ) -> None:
        self.options, self.segmenter, self.out, self.several = options, segmenter, out, several
        model = segmenter.model
        self.model = {
            "folder": str(model.folder),
            "trainer": model.trainer,
            "configuration": model.configuration,
            "folds": list(model.folds),
            "sha256": {str(x.relative_to(model.folder)): sha256_of(x) for x in model.files},
            "plans_sha256": sha256_of(model.folder / "plans.json"),
        }
        self.settings = {
            "structures": list(segmenter.structures),
            "step_size": model.predictor.tile_step_size,
            "mirroring": options.mirror,
            "separate": options.separate,
            "leave_out_air": segmenter.leave_out_air,
            "crop": segmenter.crop,
            "precision": options.precision,
            "device": device,
        }

    def segment(self, scans: Sequence[Scan]) -> int:
        hashes = {scan: scan.sha256() for scan in scans}
        missing = [scan for scan in scans if not self._is_done(scan, hashes[scan])]
        self._check_targets(missing, hashes)
        self._check(missing)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / RECORDS).mkdir(exist_ok=True)
        started = time.monotonic()
        empty = []
        bar = tqdm(missing, unit="scan", disable=self.options.quiet or len(missing) < 2)
        for scan in bar:
            if not self._write(scan, hashes[scan]):
                empty.append(scan.name)
        self._summarise(len(missing), time.monotonic() - started)
        done = len(scans) - len(missing)
        print(f"Scans:        {len(missing)} segmented, {done} were there already")
        print(f"Labels:       {self.out}\nStatistics:   {self.out / STATISTICS}")
        if empty:
            print(
                f"WARNING: nothing was found in {few(empty)}. Is it the right model for these"
                " scans (body part, modality, orientation)?"
            )
        return 1 if empty else 0

    def _check_targets(self, scans: Sequence[Scan], hashes: Mapping[Scan, list[str]]) -> None:
        """Raise a PluginError if a file would be lost that is not an earlier result of a scan."""
        other = f"Choose another folder with -o, or move it away from {self.out}."
        for scan in scans:
            folders = [Path(x.path) if isinstance(x, Source) else x.parent for x in scan.images]
            if self.out.exists() and any(self.out.samefile(folder) for folder in folders):
                raise PluginError(f"-o {self.out} is the folder of the scans. Choose another.")
            if self._record(scan).is_file():
                record = read_json(self._record(scan))
                images = [shown(image) for image in scan.images]
                if images != record.get("images") and hashes[scan] != record.get("images_sha256"):
                    raise PluginError(
                        f"{self.out} holds the result of another scan {scan.name},"
                        f" {few(record.get('images', []))}. {other}"
                    )
                continue
            for name in self._files(scan):
                if (self.out / name).exists():
                    raise PluginError(
                        f"{self.out / name} is there, and is no result of this command. {other}"
                    )
            if self._preview(scan) in self._files(scan):
                raise PluginError(
                    f"The labels of {scan.name} and their picture would both be"
                    f" {self._preview(scan)}. Rename the scan."
                )

    def _check(self, scans: Sequence[Scan]) -> None:
        """Read all scans, so that nothing stops the run later."""
        problems = []
        for scan in tqdm(scans, "check", disable=self.options.quiet or len(scans) < 2, leave=False):
            try:
                self.segmenter.check(scan.images)
            except PluginError as error:
                problems.append(str(error))
        if problems:
            raise PluginError(few_lines(problems, 10))

    def _record(self, scan: Scan) -> Path:
        return self.out / RECORDS / f"{scan.name}.json"

    def _is_done(self, scan: Scan, hashes: Sequence[str]) -> bool:
        try:
            record = read_json(self._record(scan))
            same = all(
                record[key] == value
                for key, value in (
                    ("images_sha256", list(hashes)),
                    ("model", self.model),
                    ("settings", self.settings),
                )
            )
            files = record["files"].items()
            return same and all(hash_of_image(self.out / name) == sha for name, sha in files)
        except (PluginError, OSError, KeyError, AttributeError, TypeError):
            return False

    def _write(self, scan: Scan, hashes: Sequence[str]) -> bool:
        """Segment a scan and write what belongs to it; return whether something was found."""
        started = time.monotonic()
        try:
            found = self.segmenter.segment(scan.images)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "alloc" not in str(error):
                raise
            raise PluginError(
                f"Not enough memory for {scan.name}. Smaller: --structures NAME ..., a smaller"
                " model, or a cropped scan."
            ) from error
        written: dict[str, Path] = {}
        with tempfile.TemporaryDirectory(prefix=".partial", dir=self.out) as folder:
            for name, labels in self._maps(scan, found):
                written[name] = Path(folder) / Path(name).name
                self._write_labels(labels, written[name], found.properties)
            save_preview(found, self.out / self._preview(scan))
            statistics = found.statistics()
            record = {
                "scan": scan.name,
                "images": [shown(image) for image in scan.images],
                "images_sha256": list(hashes),
                "model": self.model,
                "settings": self.settings,
                "files": {name: hash_of_image(file) for name, file in written.items()},
                "windows": asdict(found.windows),
                "engine": cpu_engine.precision_in_use() or "torch",
                "seconds": round(time.monotonic() - started, 2),
                "structures": [asdict(structure) for structure in statistics],
            }
            # Before the files: what has no record is not ours.
            write_atomically(self._record(scan), json.dumps(record, indent=2))
            for name, file in written.items():
                target = self.out / name
                target.parent.mkdir(exist_ok=True)
                for old in (*side_files(target), target) if target.exists() else ():
                    old.unlink()
                place_image(file, target, MOVE)
        present = [structure for structure in statistics if structure.voxels]
        tqdm.write(f"{scan.name}: {len(present)} of {len(statistics)} structures found")
        return bool(present)

    def _maps(self, scan: Scan, found: Segmentation) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each label map (z, y, x) to write, with its file below the output folder."""
        if not self.options.separate:
            yield self._files(scan)[0], found.labels
            return
        for name, labels in zip(self._files(scan), found.structures.values(), strict=True):
            yield name, np.isin(found.labels, labels).astype(np.uint8)

    def _files(self, scan: Scan) -> list[str]:
        ending = self.segmenter.ending_of(scan.images)
        if not self.options.separate:
            return [f"{scan.name}{ending}"]
        return [f"{scan.name}/{x}{ending}" for x in _file_names(self.segmenter.structures)]

    def _preview(self, scan: Scan) -> str:
        return f"preview_{scan.name}.png" if self.several else "preview.png"

    def _write_labels(self, labels: np.ndarray, path: Path, properties: Any) -> None:
        with contextlib.redirect_stdout(None):
            self.segmenter.model.reader.write_seg(labels, str(path), properties)
        try:
            check_image(path)
        except ImageError as error:  # ITK says nothing when the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error

    def _summarise(self, scans: int, seconds: float) -> None:
        """Write the statistics of all scans in the folder, and what this run was."""
        with lock(self.out / RECORDS / ".lock", "process writes the statistics", wait=True):
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            for path in sorted((self.out / RECORDS).glob("*.json")):
                record = read_json(path)
                for row in record["structures"]:
                    writer.writerow([record["scan"], *_cells(row)])
            write_atomically(self.out / STATISTICS, text.getvalue())
            packages = ("nnunetv2", "torch", "openvino", "numpy", "SimpleITK")
            versions = {name: _version(name) for name in packages}
            run = {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "scans": scans,
                "seconds": round(seconds, 2),
                "model": self.model,
                "settings": self.settings,
                "engine": cpu_engine.precision_in_use() or "torch",
                "versions": {
                    "stunet-plugin": __version__,
                    "python": platform.python_version(),
                    **versions,
                },
            }
            write_atomically(self.out / RUN, json.dumps(run, indent=2))


def _file_names(structures: Iterable[str]) -> list[str]:
    """Return a file name for each structure: a name in a model's description may hold anything."""
    names: list[str] = []
    for structure in structures:
        name = re.sub(r"[^\w+-]+", "_", structure)
        names.append(f"{name}_{len(names)}" if name in names else name)
    return names


def _cells(row: Mapping[str, Any]) -> list[Any]:
    mean, volume = row["mean_intensity"], row["volume_ml"]
    return [
        row["name"],
        " ".join(map(str, row["labels"])),
        row["voxels"],
        "" if volume is None else f"{volume:.3f}",
        "" if mean is None else f"{mean:.2f}",
        row["touches_border"],
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
