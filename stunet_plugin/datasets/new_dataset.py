"""Making a dataset in nnUNet_raw: in a folder beside its place, which it takes when it is complete.

A run that is interrupted leaves that folder with what is finished; the same command goes on from
there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.datasets.raw_dataset import new_raw_folder
from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.nnunet.names import PREPROCESSED, RAW, RESULTS
from stunet_plugin.utils.files import OutputError, check_whole, link_or_copy, lock, write_atomically

IMAGES, LABELS, RECORDS = "imagesTr", "labelsTr", "records"
SETTINGS = "settings.json"
_UNFINISHED = ".unfinished_"


class NewDataset:
    """``DatasetXXX_NAME`` that is to be made.

    Attributes:
        folder: its place in nnUNet_raw.
        unfinished: where it is made.
    """

    def __init__(self, dataset_id: int, name: str) -> None:
        """Look whether the place is free; nothing is written.

        Raises:
            PluginError: bad ID or name, nnUNet_raw is not set, or the ID is taken.
        """
        self.dataset_id = dataset_id
        self.folder = new_raw_folder(dataset_id, name)
        self.unfinished = self.folder.with_name(f"{_UNFINISHED}{self.folder.name}")
        for variable in (RAW, PREPROCESSED, RESULTS):
            base = os.environ.get(variable)
            # nnU-Net's own look-up goes by this prefix.
            taken = (
                [
                    path
                    for path in sorted(Path(base).glob(f"Dataset{dataset_id:03d}*"))
                    if path.is_dir()
                ]
                if base
                else []
            )
            if taken:
                raise PluginError(
                    f"-d {dataset_id} is taken: {variable} has {taken[0].name}. Choose another."
                    " Nothing was written."
                )

    @contextlib.contextmanager
    def begun(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Make the unfinished folder, or go on with one that was left with the same settings; no
        second run may write to it.

        Raises:
            PluginError: it was left by a run with other settings, another run is writing to it, or
                it cannot be written to.
        """
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        for part in (IMAGES, LABELS, RECORDS):
            (self.unfinished / part).mkdir(parents=True, exist_ok=True)
        with lock(self.unfinished / ".lock", f"run is making {self.folder.name}"):
            file = self.unfinished / SETTINGS
            if file.is_file() and file.read_text() != text:
                raise PluginError(
                    f"{self.unfinished} was left by a run with other input or options"
                    f" ({_changed(file, settings)}). Run that command again to complete it, or"
                    " delete the folder to begin anew."
                )
            write_atomically(file, text)
            try:
                yield
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(f"What is finished is in {self.unfinished}.") from error
            except (OSError, OutputError) as error:
                reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                raise PluginError(
                    f"Cannot go on with {self.unfinished}: {reason}. What is finished stays. Once"
                    " mended, the same command continues."
                ) from error

    @property
    def is_begun(self) -> bool:
        return (self.unfinished / SETTINGS).is_file()

    def add_images(self, case: str, images: Sequence[Path], ending: str, copy: bool) -> None:
        """Link or copy the images of a case, one per channel, but for those that are there."""
        for channel, image in enumerate(images):
            place_file(image, self.unfinished / IMAGES / f"{case}_{channel:04d}{ending}", copy)

    def label_of(self, case: str, ending: str) -> Path:
        return self.unfinished / LABELS / f"{case}{ending}"

    def record_of(self, case: str) -> Path:
        return self.unfinished / RECORDS / f"{case}.json"

    def finish(self, description: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        """Write ``dataset.json`` and other JSON files (name to content), and give the dataset its
        place."""
        for name, content in {**others, "dataset.json": description}.items():
            write_atomically(self.unfinished / name, json.dumps(content, indent=1) + "\n")
        shutil.rmtree(self.unfinished / RECORDS)
        (self.unfinished / SETTINGS).unlink()
        (self.unfinished / ".lock").unlink(missing_ok=True)
        os.rename(self.unfinished, self.folder)

    def closing_lines(self, more: str) -> str:
        """Return what a command says last: where the dataset is and what comes next, with more of
        the latter."""
        return (
            f"Written: {self.folder}\nNext: nnUNetv2_plan_and_preprocess -d {self.dataset_id} -c"
            f" 3d_fullres{more}"
        )


def _changed(file: Path, settings: Mapping[str, Any]) -> str:
    try:
        was = json.loads(file.read_text())
        now = json.loads(json.dumps(settings))
        return ", ".join(key for key in {**was, **now} if was.get(key) != now.get(key))
    except (ValueError, AttributeError):
        return "its record is damaged"


def place_file(source: Path, target: Path, copy: bool) -> None:
    """Link to a file, or copy it, under a name that appears when it is complete; nothing is done
    where that is there."""
    if os.path.lexists(target):
        return
    partial = target.with_name(f".partial_{target.name}")
    partial.unlink(missing_ok=True)
    if copy:
        shutil.copyfile(source, partial)
    else:
        link_or_copy(str(source.absolute()), partial)
    os.replace(partial, target)


def read_labels(reader: Any, file: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a label map with one of nnU-Net's readers; return whole numbers (z, y, x) and the
    geometry.

    Raises:
        PluginError: it cannot be read, or is incomplete.
    """
    check_whole(file)
    try:
        labels, properties = reader.read_seg(str(file))
    except Exception as error:  # each reader has its own
        raise PluginError(
            f"{file} cannot be read: {last_line(error)}. Mend or remove the case."
        ) from error
    return np.rint(labels[0]).astype(np.int64), properties


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
                f"{target.name} could not be written as a whole ({error}). Is the disk full?"
            ) from error
        if not complete:
            raise OSError(f"{target.name} could not be written as a whole. Is the disk full?")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
