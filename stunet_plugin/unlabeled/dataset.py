"""The dataset in nnUNet_raw: its folder, who may write to it, and giving the files of a case their
places."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stunet_plugin.datasets.raw_dataset import new_raw_folder
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import PREPROCESSED, RAW, RESULTS
from stunet_plugin.unlabeled.checks import MODALITIES
from stunet_plugin.unlabeled.image_files import is_in_place, points_to
from stunet_plugin.unlabeled.manifest import CASE, DUPLICATE, FAILED, SKIPPED, Manifest, Record
from stunet_plugin.utils.discovery import DATASET_ENDINGS, Source
from stunet_plugin.utils.files import LINK, lock, read_json, write_atomically, write_if_new

LABELS = {"background": 0, "body": 1}
READER = "SimpleITKIO"
"""The reader that the scans were checked with; it takes files of all kinds, and the choice by
ending would not take .nii."""
_FORMAT = 1


@dataclass(frozen=True)
class Prepared:
    """What became of a source.

    Attributes:
        files: temporary files of a new case, image and label.
        further: the series of a DICOM folder.
        disk_error: the dataset cannot be written, so the run must stop.
    """

    record: Record
    files: tuple[Path, ...] = ()
    further: Sequence[Source] = ()
    disk_error: str = ""


class Dataset:
    """``DatasetXXX_NAME``, made by this command or to be made.

    Attributes:
        modality, file_ending: what it was begun with and keeps; empty without a case, because a
            run that found nothing, perhaps with the wrong modality, does not bind the next one.
        manifest: its records, while it is open.
    """

    modality = file_ending = ""
    manifest: Manifest

    def __init__(self, dataset_id: int, name: str) -> None:
        """Look at what is there; nothing is written.

        Raises:
            PluginError: bad ID or name, nnUNet_raw not set, another dataset has the ID, or the
                settings of this one are damaged.
        """
        self.dataset_id = dataset_id
        self.folder = new_raw_folder(dataset_id, name)
        self.images, self.labels = self.folder / "imagesTr", self.folder / "labelsTr"
        self.records = self.folder / "unlabeled"
        self.temporary = self.records / "unfinished"
        self._settings_file = self.records / "settings.json"
        self._check_id()
        if self._settings_file.is_file():
            self._read_settings()

    def _check_id(self) -> None:
        for variable in filter(os.environ.get, (RAW, PREPROCESSED, RESULTS)):
            # nnU-Net's own look-up goes by this prefix.
            for path in sorted(Path(os.environ[variable]).glob(f"Dataset{self.dataset_id:03d}*")):
                is_ours = path != self.folder or self._settings_file.is_file()
                if path.is_dir() and not (is_ours and path.name == self.folder.name):
                    raise PluginError(
                        f"-d {self.dataset_id} is taken: {variable} has {path.name}, and `stunet"
                        " unlabeled` did not make it with this -n. Choose another -d, or the -n"
                        " that it was made with. Nothing was written."
                    )

    def _read_settings(self) -> None:
        content = read_json(self._settings_file)
        modality, ending = content.get("modality"), content.get("file_ending")
        known = modality in MODALITIES and ending in DATASET_ENDINGS
        if not known or content.get("format") != _FORMAT:
            raise PluginError(
                f"{self._settings_file} is damaged ({content}). Move {self.folder} away, or choose"
                " another -d."
            )
        if any(self.images.glob(f"*_0000{ending}")):
            self.modality, self.file_ending = str(modality), str(ending)

    def __getstate__(self) -> dict[str, Any]:
        """For workers: the records stay in this process."""
        return {name: value for name, value in vars(self).items() if name != "manifest"}

    def begin(self, modality: str, file_ending: str) -> None:
        """Make the folder, which appears with its settings in it, so that it is known for ours; or
        begin anew in an empty one."""
        settings = {"format": _FORMAT, "modality": modality, "file_ending": file_ending}
        text = json.dumps(settings, indent=2) + "\n"
        if not self.folder.exists():
            unfinished = self.folder.parent / f".unfinished_{self.folder.name}"
            for folder in (self.images, self.labels, self.records):
                (unfinished / folder.name).mkdir(parents=True, exist_ok=True)
            write_atomically(unfinished / self._settings_file.relative_to(self.folder), text)
            os.rename(unfinished, self.folder)
        elif read_json(self._settings_file) != settings:
            (self.records / Manifest.FILE).unlink(missing_ok=True)
            write_atomically(self._settings_file, text)
        self.modality, self.file_ending = modality, file_ending

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the records, and let no second run write to the dataset.

        Raises:
            PluginError: one does, or the records are damaged.
        """
        who = f"`stunet unlabeled` is writing to {self.folder}"
        with lock(self.records / ".lock", who):
            for folder in (self.images, self.labels):
                folder.mkdir(exist_ok=True)
            self.clear_unfinished()
            try:
                with contextlib.closing(Manifest(self.records, self._is_complete)) as self.manifest:
                    yield
            finally:
                shutil.rmtree(self.temporary, ignore_errors=True)

    def clear_unfinished(self) -> None:
        """Remove the temporary files of this run or of one that was killed."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(exist_ok=True)

    def files_of(self, case: str) -> tuple[Path, Path]:
        """Image and label of a case."""
        return (
            self.images / f"{case}_0000{self.file_ending}",
            self.labels / f"{case}{self.file_ending}",
        )

    def has(self, case: str) -> bool:
        """Whether the files of a case are in place."""
        return all(map(os.path.lexists, self.files_of(case)))

    def count_cases(self) -> int:
        """Images that are in place."""
        return sum(1 for _ in self.images.glob(f"*_0000{self.file_ending}"))

    def _is_complete(self, record: Record) -> bool:
        """Whether the files of a case are those of its record: its image may still lead to where
        the scan was before."""
        if not self.has(record.case):
            return False
        leads_to = points_to(self.files_of(record.case)[0])
        is_link = record.facts.get("image") == LINK
        expected = record.source if is_link else os.path.dirname(record.source)
        return leads_to is None or leads_to.startswith(expected)

    def is_done(self, source: Source) -> bool:
        """Whether there is nothing left to do for a source; a duplicate is needed when the case
        that it equals leads nowhere."""
        record = self.manifest.last(source.key)
        if record is None or record.status == FAILED or record.signature != source.signature:
            return False
        if record.reason != DUPLICATE:
            return True
        image = self.files_of(record.case)[0]
        return is_in_place(image) or not os.path.lexists(image)

    def commit(self, prepared: Prepared) -> Record:
        """Record what became of a source and give its files their places; return the record.

        The record comes first and the image last: a kill in between leaves a last record without
        files, which the next run takes back, and never an image without a label.
        """
        record = prepared.record
        before = self.manifest.last(record.key)
        is_new = bool(prepared.files)
        # A case whose image leads nowhere is made again where its scan was found now.
        if record.status == CASE and is_in_place(self.files_of(record.case)[0]):
            # Its worker may not have seen that: two copies can be under way at the same time.
            is_new = False
            record = self._known_case(record, before)
        elif record.status == CASE and not is_new:
            # The case with the same voxels, which the worker saw, was removed since: its source has
            # changed.
            record = replace(
                record, status=FAILED, case="", reason="changed during the run", detail="run again"
            )
        if before is not None and before.status == CASE:
            if record.status == FAILED:
                # Out of reach for now; what was made of it stays.
                return record
            if before.case != record.case:
                # The file has other content now. Its old case would show the new voxels under the
                # old label.
                for path in self.files_of(before.case):
                    path.unlink(missing_ok=True)
        self.manifest.append(record)
        places = zip(prepared.files, self.files_of(record.case), strict=False)
        for unfinished, place in reversed(list(places)):
            if is_new:
                os.replace(unfinished, place)
            else:
                unfinished.unlink(missing_ok=True)
        return record

    def _known_case(self, record: Record, before: Record | None) -> Record:
        """The record of a source whose voxels are those of a case that is in place."""
        if before is not None and before.case == record.case:
            # The source of that case itself: its times have changed, its voxels have not.
            return replace(before, signature=record.signature)
        owner = self.manifest.of_case(record.case)
        if owner is None or not os.path.exists(owner.source):
            # It was moved, or the records were lost.
            return replace(record, facts=owner.facts if owner else {})
        detail = f"same voxels as {record.case}"
        return replace(record, status=SKIPPED, reason=DUPLICATE, detail=detail, facts={})

    def write_description(self, cases: int) -> None:
        """Write ``dataset.json``."""
        content = {
            "channel_names": {"0": self.modality},
            "labels": LABELS,
            "numTraining": cases,
            "file_ending": self.file_ending,
            "overwrite_image_reader_writer": READER,
            "name": self.folder.name,
            "description": (
                "Scans without labels, collected by `stunet unlabeled`. The label is a mask of the"
                " body."
            ),
        }
        write_if_new(self.folder / "dataset.json", json.dumps(content, indent=2) + "\n")
