"""A dataset in nnUNet_raw: its description, its cases, and where their files are. Imports nothing
heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import RAW
from stunet_plugin.utils.files import read_json

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Case:
    """A case: its images, one per channel, and its labels; None where it has none."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class RawDataset:
    """A dataset and its training cases.

    Attributes:
        folder: in nnUNet_raw or elsewhere.
        description: content of its ``dataset.json``.
        cases: in the order of their names, each with labels.
    """

    folder: Path
    description: dict[str, Any] = field(repr=False)
    cases: tuple[Case, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def channels(self) -> tuple[str, ...]:
        names: dict[str, Any] = _channel_names(self.description) or {}
        return tuple(str(names[key]) for key in sorted(names, key=int))

    @property
    def file_ending(self) -> str:
        return str(self.description["file_ending"])


def find_raw(given: str) -> Path:
    """Return the folder of a dataset that a user names: an ID, a name, or a path.

    Raises:
        PluginError: there is none, or there are several.
    """
    if Path(given).is_dir() and not given.isdigit():
        return Path(given).absolute()
    if os.sep in given:
        raise PluginError(f"{given} is not a folder.")
    root = os.environ.get(RAW)
    if not root:
        raise PluginError(
            f"{RAW} is not set, so {given} cannot be found. Set it (export {RAW}=/path/to/{RAW}),"
            " or give a path."
        )
    prefix = f"Dataset{int(given):03d}_" if given.isdigit() else given
    folders = (
        sorted(path for path in Path(root).absolute().iterdir() if path.is_dir())
        if Path(root).is_dir()
        else []
    )
    found = [
        path
        for path in folders
        if path.name == given or (given.isdigit() and path.name.startswith(prefix))
    ]
    if len(found) != 1:
        wanted = f"{prefix}*" if given.isdigit() else given
        raise PluginError(
            f"Expected one {wanted} in {RAW} ({root}), found {len(found)}. Give its ID, its full"
            " name or a path."
        )
    return found[0]


def read_raw(folder: Path) -> RawDataset:
    """Read a dataset's description and list its cases.

    Raises:
        PluginError: no dataset, or a case lacks an image or its labels.
    """
    file = folder / "dataset.json"
    if not file.is_file():
        raise PluginError(
            f"{folder} is no dataset in nnU-Net's raw format: it has no dataset.json."
        )
    description = read_json(file)
    names = _channel_names(description)
    ending = description.get("file_ending")
    if (
        not isinstance(names, dict)
        or not names
        or not isinstance(ending, str)
        or not isinstance(description.get("labels"), dict)
    ):
        raise PluginError(
            f"{file} lacks channel_names, labels or file_ending, which nnU-Net v2 needs."
        )
    if "dataset" in description:
        cases = _listed_cases(folder, description["dataset"], file)
    else:
        images = list_images(folder / "imagesTr", ending, len(names))
        cases = tuple(
            Case(name, files, folder / "labelsTr" / f"{name}{ending}")
            for name, files in images.items()
        )
    lacking = [case.label for case in cases if case.label is None or not case.label.is_file()]
    if lacking:
        raise PluginError(
            f"{folder.name}: {len(lacking)} of {len(cases)} cases have no labels (for example"
            f" {lacking[0]})."
        )
    if not cases:
        raise PluginError(f"{folder} has no cases: no images *_0000{ending} in imagesTr.")
    return RawDataset(folder, description, cases)


def _channel_names(description: dict[str, Any]) -> Any:
    """The channels; older datasets call them modality."""
    return description.get("channel_names", description.get("modality"))


def _listed_cases(folder: Path, listed: Any, file: Path) -> tuple[Case, ...]:
    """The cases where ``dataset.json`` lists their files itself, as nnU-Net allows."""
    try:
        entries = [
            (name, files["images"], files["label"]) for name, files in sorted(listed.items())
        ]
        # An absolute path stays as it is.
        return tuple(
            Case(
                name,
                tuple(folder / os.path.expandvars(image) for image in images),
                folder / os.path.expandvars(label),
            )
            for name, images, label in entries
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise PluginError(
            f"{file}: 'dataset' is not as nnU-Net has it, {{case: {{images: [...], label: ...}}}}."
        ) from error


def list_images(folder: Path, ending: str, channels: int) -> dict[str, tuple[Path, ...]]:
    """Return the images of a folder by case, one file per channel, in the order of their names.

    Raises:
        PluginError: the folder is not there, or a case has not one file for each channel.
    """
    if not folder.is_dir():
        raise PluginError(f"{folder} is not a folder.")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = (
            _CHANNEL.fullmatch(path.name.removesuffix(ending))
            if path.name.endswith(ending)
            else None
        )
        if match and not path.name.startswith("."):
            found.setdefault(match["case"], {})[int(match["channel"])] = path
    wanted: Sequence[int] = range(channels)
    for case, files in found.items():
        if sorted(files) != list(wanted):
            names = ", ".join(f"{case}_{channel:04d}{ending}" for channel in wanted)
            raise PluginError(f"{folder}: case {case} has {len(files)} image(s), expected {names}.")
    return {case: tuple(files[channel] for channel in wanted) for case, files in found.items()}


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def new_raw_folder(dataset_id: int, name: str) -> Path:
    """Return the folder in nnUNet_raw of a dataset that is to be made.

    Raises:
        PluginError: bad ID or name, or nnUNet_raw is not set.
    """
    raw = os.environ.get(RAW)
    if not raw:
        raise PluginError(f"{RAW} is not set. Set it to a folder: export {RAW}=/path/to/{RAW}")
    if not 1 <= dataset_id <= 999:
        raise PluginError(f"-d must be from 1 to 999, not {dataset_id}.")
    if not _NAME.fullmatch(name):
        raise PluginError(
            "-n may hold letters, digits, '_', '-' and '.', and starts with a letter or digit, not"
            f" {name!r}."
        )
    return Path(raw).absolute() / f"Dataset{dataset_id:03d}_{name}"
