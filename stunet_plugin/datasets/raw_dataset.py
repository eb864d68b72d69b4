"""Datasets in nnUNet_raw: their description, their cases, and where their files are."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from stunet_plugin.errors import PluginError, setting
from stunet_plugin.nnunet.names import RAW
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.image_files import PICTURES, TIFF, side_files
from stunet_plugin.utils.validation import channel_names

PSEUDO_LABELS = "pseudo_labels.json"
"""In a dataset that `stunet pseudo-label` made: which model made the labels, and how."""
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Case:
    """A case: its images, one per channel (or a picture in colours), and its label map."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class RawDataset:
    """A dataset: its ``dataset.json``, checked, and its training cases in the order of their
    names."""

    folder: Path
    description: dict[str, Any] = field(repr=False)
    cases: tuple[Case, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def channels(self) -> tuple[str, ...]:
        names = channel_names(self.description, self.name)
        return tuple(str(names[key]) for key in sorted(names, key=int))

    @property
    def file_ending(self) -> str:
        return str(self.description["file_ending"])


def raw_root() -> Path:
    """Return nnUNet_raw; raise PluginError if it is not set."""
    root = os.environ.get(RAW)
    if not root:
        raise PluginError(
            f"{RAW} is not set. Set it to a folder: {setting(RAW, f'/path/to/{RAW}')}"
        )
    return Path(root).absolute()


def find_raw(given: str) -> Path:
    """Return the folder of a dataset that a user names (an ID, a name, or a path); raise
    PluginError if there is not one."""
    if Path(given).is_dir() and not given.isdigit():
        return Path(given).absolute()
    if os.path.dirname(given):
        raise PluginError(f"{given} is not a folder.")
    root, wanted, names = raw_root(), given, [given]
    if given.isdigit():
        wanted = f"Dataset{int(given):03d}_"
        names = [x for x in find_candidate_datasets(int(given)) if x.startswith(wanted)]
        wanted += "*"
    found = [root / name for name in names if (root / name).is_dir()]
    if len(found) != 1:
        told = f"Expected one {wanted} in {RAW} ({root}), found {len(found)}"
        raise PluginError(f"{told}. Give its ID, its full name or a path.")
    return found[0]


def read_raw(folder: Path) -> RawDataset:
    """Read a dataset's description and list its cases; raise PluginError if it is none, or a case
    lacks an image or its labels."""
    file = folder / "dataset.json"
    if not file.is_file():
        raise PluginError(f"{folder} is no dataset of nnU-Net: it has no dataset.json.")
    description = read_json(file)
    channels = len(channel_names(description, str(file)))
    ending, labels = description.get("file_ending"), description.get("labels")
    if not isinstance(ending, str) or not re.fullmatch(r"(\.\w+)+", ending):
        raise PluginError(f"{file}: file_ending must be such as '.nii.gz', not {ending!r}.")
    if not isinstance(labels, dict) or not labels:
        raise PluginError(f"{file}: labels must be a table of names and values, not {labels!r}.")
    if "dataset" in description:
        cases = _listed_cases(folder, description, file)
    else:
        images = list_images(folder / "imagesTr", ending, channels)
        cases = [Case(x, images[x], folder / "labelsTr" / f"{x}{ending}") for x in images]
        labelled = {x.name.removesuffix(ending) for x in folder.glob(f"labelsTr/[!.]*{ending}")}
        if without := sorted(labelled - images.keys()):
            count = f"{len(without)} label maps have no image in imagesTr"
            raise PluginError(f"{folder.name}: {count} (for example {without[0]}).")
    if lacking := [case.label for case in cases if not case.label.is_file()]:
        count = f"{len(lacking)} of {len(cases)} cases have no labels"
        raise PluginError(f"{folder.name}: {count} (for example {lacking[0]}).")
    if ending in TIFF and len({bool(side_files(case.images[0])) for case in cases}) > 1:
        alone = next(x.images[0] for x in cases if not side_files(x.images[0]))
        raise PluginError(f"{alone} has no .json with its spacing, as other cases have.")
    if not cases:
        raise PluginError(f"{folder} has no cases: no images *_0000{ending} in imagesTr.")
    return RawDataset(folder, description, tuple(cases))


def _listed_cases(folder: Path, description: dict[str, Any], file: Path) -> list[Case]:
    """Return the cases where ``dataset.json`` lists their files itself, as nnU-Net allows."""
    try:
        listed = get_filenames_of_train_images_and_targets(str(folder), copy.deepcopy(description))
        cases = [
            Case(str(name), tuple(map(Path, files["images"])), Path(files["label"]))
            for name, files in sorted(listed.items())
            if files["images"] and isinstance(files["images"], list)
        ]
        if len(cases) == len(listed):
            return cases
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    form = "{case: {images: [...], label: ...}}"
    raise PluginError(f"{file}: 'dataset' is not as nnU-Net has it, {form}.")


def list_images(folder: Path, ending: str, channels: int) -> dict[str, tuple[Path, ...]]:
    """Return the images of a folder by case, in the order of their names: one file per channel, or
    fewer where a picture may have several (colours); raise PluginError if a case lacks one."""
    if not folder.is_dir():
        raise PluginError(f"{folder} is not a folder.")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _CHANNEL.fullmatch(path.name.removesuffix(ending))
        if match and path.name.endswith(ending) and not path.name.startswith("."):
            found.setdefault(match["case"], {})[int(match["channel"])] = path
    fewest = 1 if ending in (*PICTURES, *TIFF) else channels
    for case, files in found.items():
        if sorted(files) != list(range(len(files))) or not fewest <= len(files) <= channels:
            names = ", ".join(f"{case}_{channel:04d}{ending}" for channel in range(channels))
            raise PluginError(f"{folder}: case {case} has {len(files)} image(s), expected {names}.")
    return {case: tuple(files[x] for x in sorted(files)) for case, files in found.items()}


def new_raw_folder(dataset_id: int, name: str) -> Path:
    """Return the folder in nnUNet_raw of a dataset that is to be made; raise PluginError for a bad
    ID or name."""
    root = raw_root()
    if not 1 <= dataset_id <= 999:
        raise PluginError(f"-d must be from 1 to 999, not {dataset_id}.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise PluginError(f"-n must be letters, digits, then also '_', '-', '.', not {name!r}.")
    return root / f"Dataset{dataset_id:03d}_{name}"
