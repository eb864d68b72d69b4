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
from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.nnunet.names import PREPROCESSED, RAW, RESULTS
from stunet_plugin.utils.files import OutputError, lock, read_json, write_atomically
from stunet_plugin.utils.image_files import COPY, LINK, MOVE, place_image, side_files

IMAGES, LABELS, RECORDS = "imagesTr", "labelsTr", "records"
SETTINGS, SETTINGS_HASH = "settings.json", "settings_sha256"


class NewDataset:
    """``DatasetXXX_NAME`` that is to be made in the folder ``unfinished``; raises PluginError if
    that is no name, or the ID is another dataset's.

    ``provenance`` names the JSON file that says what it was made of.
    """

    def __init__(self, dataset_id: int, name: str, provenance: str, copy: bool) -> None:
        self.dataset_id, self.provenance, self.how = dataset_id, provenance, COPY if copy else LINK
        self.folder = new_raw_folder(dataset_id, name)
        self.unfinished = self.folder.with_name(f".unfinished_{self.folder.name}")
        for other in find_candidate_datasets(dataset_id):
            if other != self.folder.name or not (self.folder / provenance).is_file():
                self._refuse(other)

    def _refuse(self, name: str) -> None:
        roots = [x for x in (RAW, PREPROCESSED, RESULTS) if os.environ.get(x)]
        there = " and ".join(x for x in roots if Path(os.environ[x], name).is_dir())
        raise PluginError(f"-d {self.dataset_id} is taken: {there} has {name}. Choose another.")

    def is_there(self, settings: Mapping[str, Any]) -> bool:
        """Whether a run with the same settings has made it already, which is said; raise
        PluginError if one with others has."""
        if not self.folder.exists():
            return False
        if read_json(self.folder / self.provenance).get(SETTINGS_HASH) != _hash(_text(settings)):
            self._refuse(self.folder.name)
        print(f"Already there: {self.folder} was made with these settings. Nothing was written.")
        return True

    @contextlib.contextmanager
    def begun(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Make the unfinished folder, or resume one that was left with the same settings; raise
        PluginError if it was left with others, another run has it, or it cannot be written to."""
        for part in (IMAGES, LABELS, RECORDS):
            (self.unfinished / part).mkdir(parents=True, exist_ok=True)
        with lock(self.unfinished / ".lock", f"run is making {self.folder.name}"):
            file, text = self.unfinished / SETTINGS, _text(settings)
            if file.is_file() and file.read_text(encoding="utf-8") != text:
                was, now = read_json(file), json.loads(text)
                changed = ", ".join(x for x in {**was, **now} if was.get(x) != now.get(x))
                raise PluginError(
                    f"{self.unfinished} was left by a run with other input or options ({changed})."
                    " Run that command again to complete it, or delete the folder to start again."
                )
            write_atomically(file, text)
            try:
                yield
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(f"What is finished is in {self.unfinished}.") from error
            except (OSError, OutputError) as error:
                raise PluginError(
                    f"Cannot write to {self.unfinished}: {last_line(error)}. What is finished"
                    " stays; once this is fixed, the same command resumes."
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

    def finish(self, description: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Write ``dataset.json`` and the provenance, and give the dataset its place."""
        settings = self.unfinished / SETTINGS
        made_of = {**provenance, SETTINGS_HASH: _hash(settings.read_text(encoding="utf-8"))}
        for name, content in ((self.provenance, made_of), ("dataset.json", description)):
            write_atomically(self.unfinished / name, json.dumps(content, indent=1) + "\n")
        shutil.rmtree(self.unfinished / RECORDS)
        settings.unlink()
        (self.unfinished / ".lock").unlink(missing_ok=True)
        os.rename(self.unfinished, self.folder)

    def say_written(self, configuration: str, more: str) -> None:
        """Print what a command says last: where the dataset is and what comes next."""
        print(
            f"Written: {self.folder}\n"
            f"Next: nnUNetv2_plan_and_preprocess -d {self.dataset_id} -c {configuration}{more}"
        )


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=1, sort_keys=True) + "\n"


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def write_labels(reader: Any, labels: np.ndarray, properties: dict[str, Any], target: Path) -> None:
    """Write a label map (z, y, x) with one of nnU-Net's readers and writers and the properties that
    it gave, complete or not at all; raise OSError if the file does not hold what was written."""
    partial = target.with_name(f".partial_{target.name}")
    try:
        reader.write_seg(labels, str(partial), properties)
        # ITK's writers say nothing when the disk is full, so the file is read back.
        try:
            written, why = np.array_equal(reader.read_seg(str(partial))[0][0], labels), ""
        except Exception as error:  # whatever a reader makes of half a file
            written, why = False, f" ({last_line(error)})"
        if not written:
            raise OSError(f"{target.name} could not be written whole{why}; is the disk full")
        place_image(partial, target, MOVE)
    finally:
        for left in (*side_files(partial), partial) if partial.exists() else ():
            left.unlink()
