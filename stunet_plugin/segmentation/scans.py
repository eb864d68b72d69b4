"""Scans to segment: files of nnU-Net's names or of any name, checked for what a model takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stunet_plugin.errors import PluginError, few
from stunet_plugin.utils.image_files import META, NIFTI, NRRD, PICTURES, TIFF, ending_of

ENDINGS = (*NIFTI, *META, *NRRD, *TIFF, *PICTURES)
CT, MR = "CT", "MR"
LEAST_AIR = -200
"""Hounsfield units: every CT has voxels below, in air or fat; images of other kinds have none."""
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Scan:
    """A scan: its name and its images, one per channel."""

    name: str
    images: tuple[Path, ...]

    @property
    def ending(self) -> str:
        return ending_of(self.images[0])


def find_scans(given: str, channels: int) -> list[Scan]:
    """Return the scan of a file, or all of a folder, in the order of their names.

    Files are named ``SCAN_0000.nii.gz``, ``SCAN_0001.nii.gz``, ... as nnU-Net has it; where a model
    takes one channel, any name will do.

    Raises:
        PluginError: there is none, a channel lacks, or two have one name.
    """
    path = Path(given).expanduser().absolute()
    if not path.exists():
        raise PluginError(f"{path} does not exist.")
    if path.is_dir():
        paths = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        files = [file for file in paths if ending_of(file) in ENDINGS and file.is_file()]
        if not files:
            dicom = any(not file.suffix or file.suffix.lower() == ".dcm" for file in paths)
            advice = (
                "DICOM is read by `stunet unlabeled`, or convert it to NIfTI (dcm2niix)."
                if dicom
                else f"Expected files with one of {', '.join(ENDINGS)}."
            )
            raise PluginError(f"{path} holds no scans. {advice}")
    else:
        if ending_of(path) not in ENDINGS:
            expected = f"one of {', '.join(ENDINGS)}"
            raise PluginError(f"{path} is no image that is known here: expected {expected}.")
        match = _CHANNEL.fullmatch(_stem(path))
        begins = f"{match['case']}_" if match and channels > 1 else path.name
        files = [file for file in sorted(path.parent.iterdir()) if file.name.startswith(begins)]
        files = [file for file in files if ending_of(file) == ending_of(path)]
    found: dict[str, dict[int, Path]] = {}
    for file in files:
        match = _CHANNEL.fullmatch(_stem(file))
        name, channel = (match["case"], int(match["channel"])) if match else (_stem(file), 0)
        if not match and channels > 1:
            continue
        images = found.setdefault(name, {})
        if channel in images:
            raise PluginError(f"{images[channel]} and {file} are both scan {name}. Move one away.")
        images[channel] = file
    scans = []
    for name, images in found.items():
        if sorted(images) != list(range(channels)):
            ending = ending_of(next(iter(images.values())))
            wanted = few([f"{name}_{channel:04d}{ending}" for channel in range(channels)])
            raise PluginError(
                f"Scan {name} has {len(images)} image(s), and the model takes {channels}."
                f" Expected {wanted}."
            )
        scans.append(Scan(name, tuple(images[channel] for channel in range(channels))))
    if not scans:
        raise PluginError(
            f"{path}: the model takes {channels} channels, in files named SCAN_0000.nii.gz,"
            " SCAN_0001.nii.gz, ... as nnU-Net has it. There are none."
        )
    return scans


def check_modality(path: Path, image: np.ndarray, modality: str) -> None:
    """Raise a PluginError if an image (any shape) cannot be of a model's modality."""
    least = float(image.min())
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


def parts_of(scans: Sequence[Scan], count: int, number: int) -> list[Scan]:
    """Return every ``count``-th scan, from the ``number``-th (0 first) on."""
    if count < 1 or not 0 <= number < count:
        raise PluginError(
            f"-num_parts {count} -part_id {number}: the part must be from 0 to {max(count, 1) - 1},"
            " of at least one."
        )
    return list(scans[number::count])
