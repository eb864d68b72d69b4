"""Scans to segment: image files or DICOM series, checked for what a model takes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from stunet_plugin.errors import PluginError, few, few_lines
from stunet_plugin.utils.dicom import damaged_images, series_of
from stunet_plugin.utils.discovery import DICOM_FOLDER, Source, walk
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.utils.image_files import (
    CANNOT_OPEN,
    META,
    NIFTI,
    NRRD,
    PICTURES,
    TIFF,
    ImageError,
    ending_of,
    hash_of_image,
)
from stunet_plugin.utils.images import FEW_SLICES, ONE_SLICE

ENDINGS = (*NIFTI, *META, *NRRD, *TIFF, *PICTURES)
CT, MR = "CT", "MR"
LABEL_MAP_VALUES = 16
"""An image with fewer different values is a label map, not a scan."""
SAMPLED_VOXELS = 200_000
LEAST_AIR = -200
"""Hounsfield units: every CT has voxels below, in air or fat; images of other kinds have none."""
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Scan:
    """A scan: its name and its images, one per channel; a DICOM series is one image."""

    name: str
    images: tuple[Path | Source, ...]

    def sha256(self) -> list[str]:
        """Return a hash of each image with all files that belong to it."""
        hashes = []
        for image in self.images:
            if isinstance(image, Source):
                slices = [sha256_of(Path(image.path, name)) for name in image.files]
                hashes.append(sha256("".join(slices).encode()).hexdigest())
            else:
                hashes.append(hash_of_image(image))
        return hashes


def find_scans(given: str, channels: int, modality: str = "") -> list[Scan]:
    """Return the scan of a file, or all of a folder: of its image files, in the order of their
    names, or, where it has none, of the DICOM series in it and below.

    Files are named ``SCAN_0000.nii.gz``, ``SCAN_0001.nii.gz``, ... as nnU-Net has it; where a model
    takes one channel, any name will do. A DICOM series is named after its folder.

    Args:
        modality: DICOM series that say another one are left out; an empty text takes all.

    Raises:
        PluginError: there is none, a channel lacks, two have one name, or a series is no volume.
    """
    path = Path(os.path.abspath(Path(given).expanduser()))
    if not path.exists():
        raise PluginError(f"{path} does not exist.")
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        files = [file for file in files if ending_of(file) in ENDINGS and not file.is_dir()]
        folders = [x for x in walk([str(path)], ()) if x.kind == DICOM_FOLDER]
        if not files:
            return _dicom_scans(path, folders, channels, modality)
        if any(folder.path == str(path) for folder in folders):
            raise PluginError(
                f"{path} holds both images ({files[0].name}) and DICOM files. Move one kind into a"
                " folder of its own."
            )
    else:
        if ending_of(path) not in ENDINGS:
            expected = f"one of {', '.join(ENDINGS)}, or the folder of a DICOM series"
            raise PluginError(f"{path} is no image that is known here: expected {expected}.")
        files, case = [path], _case_and_channel(path)[0]
        if channels > 1:
            beside = [file for file in sorted(path.parent.iterdir()) if file.is_file()]
            beside = [file for file in beside if ending_of(file) == ending_of(path)]
            files = [file for file in beside if _case_and_channel(file)[0] == case]
    return _group(files, channels)


def _group(files: Sequence[Path], channels: int) -> list[Scan]:
    found: dict[str, dict[int, Path]] = {}
    stems = {_stem(file) for file in files}
    for file in files:
        if not file.is_file():
            raise ImageError(file, CANNOT_OPEN, "no file, or a link to nowhere")
        name, channel = _case_and_channel(file)
        if channel is None and channels > 1 and ending_of(file) not in (*PICTURES, *TIFF):
            raise PluginError(
                f"{file}: the model takes {channels} channels, in files named SCAN_0000.nii.gz,"
                " SCAN_0001.nii.gz, ... as nnU-Net has it."
            )
        if channels == 1 and channel and f"{name}_0000" not in stems:
            channel = None  # a date, say
        if channel is None:
            name, channel = _stem(file), 0
        images = found.setdefault(name, {})
        if channel in images:
            raise PluginError(f"{images[channel]} and {file} are both scan {name}. Move one away.")
        images[channel] = file
    scans = []
    for name, images in found.items():
        ending = ending_of(next(iter(images.values())))
        # Colours of a picture are several channels in one file.
        fewest = 1 if ending in (*PICTURES, *TIFF) else channels
        if sorted(images) != list(range(len(images))) or not fewest <= len(images) <= channels:
            wanted = few([f"{name}_{channel:04d}{ending}" for channel in range(channels)])
            raise PluginError(
                f"Scan {name} has {len(images)} image(s), and the model takes {channels}."
                f" Expected {wanted}."
            )
        scans.append(Scan(name, tuple(images[channel] for channel in sorted(images))))
    return scans


def _dicom_scans(path: Path, folders: Sequence[Source], channels: int, modality: str) -> list[Scan]:
    """Return the series of DICOM folders that are volumes of a modality."""
    if not folders:
        raise PluginError(
            f"{path} holds no scans. Expected files with one of {', '.join(ENDINGS)}, or DICOM"
            " series."
        )
    if channels > 1:
        raise PluginError(
            f"{path} holds DICOM series, and the model takes {channels} channels: which series is"
            " which is not known. Convert them (dcm2niix) and name them SCAN_0000.nii.gz,"
            " SCAN_0001.nii.gz, ..."
        )
    series: list[Source] = []
    for folder in folders:
        if folder.problem:
            raise ImageError(folder.path, *folder.problem)
        found = series_of(folder)
        if damaged := damaged_images(folder, found):
            raise PluginError(
                f"{folder.path}: {len(damaged)} DICOM image(s) cannot be read: {few(damaged)}. Copy"
                " the folder again, or convert it (dcm2niix)."
            )
        series += found
    volumes, left_out, problems = [], [], []
    for one in series:
        reason, detail = one.problem or ("", "")
        if reason in (ONE_SLICE, FEW_SLICES):
            left_out.append(f"{one.shown}: {reason} ({detail})")
        elif modality and one.modality not in ("", modality):
            left_out.append(f"{one.shown}: DICOM says {one.modality}, the model takes {modality}")
        elif reason:
            problems.append(f"{one.shown}: {reason} ({detail})")
        else:
            volumes.append(one)
    if problems:
        listed = few_lines([f"  {problem}" for problem in problems])
        raise PluginError(f"These DICOM series are no volumes; move them away:\n{listed}")
    listed = few_lines([f"  {one}" for one in left_out])
    if not volumes:
        force = "\nOf another modality: go on with --force." if "DICOM says" in listed else ""
        raise PluginError(f"{path} holds no DICOM series that can be segmented:\n{listed}{force}")
    if left_out:
        print(f"Left out:\n{listed}")
    return [
        Scan(name, (one,)) for name, one in zip(_series_names(path, volumes), volumes, strict=True)
    ]


def _series_names(path: Path, series: Sequence[Source]) -> list[str]:
    """Return a name for each series: that of its folder (with those above it, below ``path``), and
    the number of the series where the folder holds several."""
    folders = [os.path.relpath(one.path, path).replace(os.sep, "_") for one in series]
    folders = [path.name or "scan" if name == "." else name for name in folders]
    numbered = [f"{name}_{one.number}" for name, one in zip(folders, series, strict=True)]
    names = []
    for one, folder, number in zip(series, folders, numbered, strict=True):
        if folders.count(folder) == 1:
            names.append(folder)
        elif one.number and numbered.count(number) == 1:
            names.append(number)
        else:
            names.append(f"{folder}_{one.series.replace('#', '_')}")
    if len(set(names)) < len(names):
        raise PluginError(f"{path}: two DICOM series would have one name: {few(sorted(names))}.")
    return names


def _case_and_channel(file: Path) -> tuple[str, int | None]:
    """Return the case and the channel of nnU-Net's names; of others the name, and None."""
    match = _CHANNEL.fullmatch(_stem(file))
    return (match["case"], int(match["channel"])) if match else (_stem(file), None)


def check_modality(path: Path | str, image: np.ndarray, modality: str) -> None:
    """Raise a PluginError if an image (any shape) cannot be of a model's modality."""
    if not modality:
        return
    least = float(image.min())
    step = max(1, image.size // SAMPLED_VOXELS)
    if 1 < len(np.unique(image.ravel()[::step])) < LABEL_MAP_VALUES:
        raise PluginError(
            f"{path} looks like a label map: it has few different values. Give the scan. If you are"
            " sure, go on with --force."
        )
    if modality == CT and least > LEAST_AIR:
        raise PluginError(
            f"{path} is no CT in Hounsfield units: its least value is {least:g}. The model was"
            " trained on CT. If you are sure, go on with --force."
        )
    if modality == MR and least < LEAST_AIR:
        raise PluginError(
            f"{path} looks like a CT: its least value is {least:g}. The model was trained on MR. If"
            " you are sure, go on with --force."
        )


def _stem(path: Path) -> str:
    return path.name.removesuffix(ending_of(path))
