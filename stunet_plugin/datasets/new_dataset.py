"""Datasets made in nnUNet_raw: in a folder beside their place, which they take when complete.

A run that is interrupted leaves that folder with what is finished; the same command resumes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from stunet_plugin.datasets.raw_dataset import new_raw_folder
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import PREPROCESSED, RAW, RESULTS
from stunet_plugin.utils.files import OutputError, lock, read_json, write_atomically
from stunet_plugin.utils.image_files import COPY, LINK, MOVE, place_image, side_files

IMAGES, LABELS, RECORDS = "imagesTr", "labelsTr", "records"
SETTINGS, SETTINGS_HASH = "settings.json", "settings_sha256"
_UNFINISHED = ".unfinished_"


class NewDataset:
    """``DatasetXXX_NAME`` that is to be made.

    Args:
        dataset_id, name: of the dataset.
        provenance: name of the JSON file that says what it was made of.
        copy: copy files instead of linking them.

    Attributes:
        folder: its place in nnUNet_raw.
        unfinished: where it is made.

    Raises:
        PluginError: bad ID or name, nnUNet_raw is not set, or the ID is taken by another dataset.
    """

    def __init__(self, dataset_id: int, name: str, provenance: str, copy: bool) -> None:
        self.dataset_id, self.provenance, self.how = dataset_id, provenance, COPY if copy else LINK
        self.folder = new_raw_folder(dataset_id, name)
        self.unfinished = self.folder.with_name(f"{_UNFINISHED}{self.folder.name}")
        others = [x for x in find_candidate_datasets(dataset_id) if not self._is_ours(x)]
        if others:
            self._refuse(others[0])

    def _is_ours(self, name: str) -> bool:
        return name == self.folder.name and (self.folder / self.provenance).is_file()

    def _refuse(self, name: str) -> None:
        there = [x for x in (RAW, PREPROCESSED, RESULTS) if _has_folder(x, name)]
        raise PluginError(
            f"-d {self.dataset_id} is taken: {' and '.join(there)} has {name}. Choose another."
            " Nothing was written."
        )

    def is_there(self, settings: Mapping[str, Any]) -> bool:
        """Whether a run with the same settings has made it already; says so.

        Raises:
            PluginError: one with other settings has.
        """
        if not self.folder.exists():
            return False
        if read_json(self.folder / self.provenance).get(SETTINGS_HASH) != _hash(_text(settings)):
            self._refuse(self.folder.name)
        print(f"Already there: {self.folder} was made with these settings. Nothing was written.")
        return True

    @contextlib.contextmanager
    def begun(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Make the unfinished folder, or resume one that was left with the same settings; no second
        run may write to it.

        Raises:
            PluginError: it was left by a run with other settings, another run is writing to it, or
                it cannot be written to.
        """
        text = _text(settings)
        for part in (IMAGES, LABELS, RECORDS):
            (self.unfinished / part).mkdir(parents=True, exist_ok=True)
        with lock(self.unfinished / ".lock", f"run is making {self.folder.name}"):
            file = self.unfinished / SETTINGS
            if file.is_file() and file.read_text() != text:
                raise PluginError(
                    f"{self.unfinished} was left by a run with other input or options"
                    f" ({_changed(file, settings)}). Run that command again to complete it, or"
                    " delete the folder to start again."
                )
            write_atomically(file, text)
            try:
                yield
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(f"What is finished is in {self.unfinished}.") from error
            except (OSError, OutputError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise PluginError(
                    f"Cannot write to {self.unfinished}: {reason}. What is finished stays; once"
                    " this is fixed, the same command resumes."
                ) from error

    def add_images(self, case: str, images: Sequence[Path], ending: str) -> None:
        """Link or copy the images of a case, one per channel, but for those that are there."""
        for channel, image in enumerate(images):
            name = f"{case}_{channel:04d}{ending}"
            place_image(image, self.unfinished / IMAGES / name, self.how)

    def label_of(self, case: str, ending: str) -> Path:
        return self.unfinished / LABELS / f"{case}{ending}"

    def record_of(self, case: str) -> Path:
        return self.unfinished / RECORDS / f"{case}.json"

    def finish(
        self, description: Mapping[str, Any], provenance: Mapping[str, Any], **others: Any
    ) -> None:
        """Write ``dataset.json``, the provenance and other JSON files (name without ending to
        content), and give the dataset its place."""
        settings = self.unfinished / SETTINGS
        made_of = {**provenance, SETTINGS_HASH: _hash(settings.read_text())}
        files = {f"{name}.json": content for name, content in others.items()}
        for name, content in {
            **files,
            self.provenance: made_of,
            "dataset.json": description,
        }.items():
            write_atomically(self.unfinished / name, json.dumps(content, indent=1) + "\n")
        shutil.rmtree(self.unfinished / RECORDS)
        settings.unlink()
        (self.unfinished / ".lock").unlink(missing_ok=True)
        os.rename(self.unfinished, self.folder)

    def say_written(self, configuration: str, more: str = "") -> None:
        """Print what a command says last: where the dataset is and what comes next."""
        print(
            f"Written: {self.folder}\n"
            f"Next: nnUNetv2_plan_and_preprocess -d {self.dataset_id} -c {configuration}{more}"
        )


def _has_folder(variable: str, name: str) -> bool:
    return bool(os.environ.get(variable)) and Path(os.environ[variable], name).is_dir()


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=1, sort_keys=True) + "\n"


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _changed(file: Path, settings: Mapping[str, Any]) -> str:
    try:
        was, now = json.loads(file.read_text()), json.loads(json.dumps(settings))
        return ", ".join(key for key in {**was, **now} if was.get(key) != now.get(key))
    except (ValueError, AttributeError):
        return "its record is damaged"


def write_labels(reader: Any, labels: np.ndarray, properties: dict[str, Any], target: Path) -> None:
    """Write a label map with one of nnU-Net's readers and writers, complete or not at all.

    ITK's writers say nothing when the disk is full, so the file is read back.

    Args:
        reader: of nnU-Net.
        labels: (z, y, x), as the reader gives them.
        properties: geometry, as the reader gave it.
        target: the file.

    Raises:
        OSError: the file does not hold what was written.
    """
    partial = target.with_name(f".partial_{target.name}")
    try:
        reader.write_seg(labels, str(partial), properties)
        try:
            complete = np.array_equal(reader.read_seg(str(partial))[0][0], labels)
        except Exception as error:  # whatever a reader makes of half a file
            raise OSError(
                f"{target.name} could not be written whole ({error}); is the disk full"
            ) from error
        if not complete:
            raise OSError(f"{target.name} could not be written whole; is the disk full")
        place_image(partial, target, MOVE)
    finally:
        for left in (*side_files(partial), partial) if partial.exists() else ():
            left.unlink()
