"""The dataset in nnUNet_raw: its folder, who may write to it, and giving the files of a case their
places."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stunet_plugin.datasets.raw_dataset import new_raw_folder
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import PREPROCESSED, RAW, RESULTS
from stunet_plugin.unlabeled import manifest as manifests
from stunet_plugin.unlabeled.checks import MODALITIES
from stunet_plugin.unlabeled.discovery import DATASET_ENDINGS, Source
from stunet_plugin.unlabeled.image_files import is_in_place, points_to
from stunet_plugin.unlabeled.manifest import CASE, DUPLICATE, FAILED, SKIPPED, Manifest, Record
from stunet_plugin.unlabeled.prepare_case import Prepared, Settings
from stunet_plugin.utils.files import LINK, lock, read_json, write_atomically, write_if_new

LABELS = {"background": 0, "body": 1}
READER = "SimpleITKIO"
"""The reader that the scans were checked with; it takes files of all kinds, and the choice by
ending would not take .nii."""
_FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """What a dataset was begun with and keeps."""

    modality: str
    file_ending: str


class Dataset:
    """``DatasetXXX_NAME``, made by this command or to be made."""

    def __init__(self, dataset_id: int, name: str) -> None:
        """Look at what is there; nothing is written.

        Raises:
            PluginError: bad ID or name, nnUNet_raw not set, or another dataset has the ID.
        """
        self.dataset_id = dataset_id
        self.folder = new_raw_folder(dataset_id, name)
        self.images, self.labels = self.folder / "imagesTr", self.folder / "labelsTr"
        self.records = self.folder / "unlabeled"
        self.temporary = self.records / "unfinished"
        self._check_id()

    def _check_id(self) -> None:
        number = self.dataset_id
        for variable in filter(os.environ.get, (RAW, PREPROCESSED, RESULTS)):
            # nnU-Net's own look-up goes by this prefix.
            for path in sorted(Path(os.environ[variable]).glob(f"Dataset{number:03d}*")):
                if path.is_dir() and path.name != self.folder.name:
                    raise PluginError(
                        f"-d {number} is taken: {variable} has {path.name}. Choose another -d, or"
                        " its name with -n if `stunet unlabeled` made it. Nothing was written."
                    )
        if self.folder.exists() and not self._settings_file.is_file():
            raise PluginError(
                f"-d {number} is taken: {self.folder} is there, and `stunet unlabeled` did not make"
                " it. Choose another -d. Nothing was written."
            )

    @property
    def _settings_file(self) -> Path:
        return self.records / "settings.json"

    def choice(self) -> Choice | None:
        """What the dataset was begun with, None if it is new.

        Raises:
            PluginError: the record of it is damaged.
        """
        if not self._settings_file.is_file():
            return None
        content = read_json(self._settings_file)
        choice = Choice(str(content.get("modality")), str(content.get("file_ending")))
        known = choice.modality in MODALITIES and choice.file_ending in DATASET_ENDINGS
        if not known or content.get("format") != _FORMAT:
            raise PluginError(
                f"{self._settings_file} is damaged ({content}). Move {self.folder} away, or choose"
                " another -d."
            )
        return choice

    def begin(self, choice: Choice) -> None:
        """Make the folder, which appears with its settings in it, so that it is known for ours; or
        begin anew in an empty one."""
        text = json.dumps({"format": _FORMAT, **asdict(choice)}, indent=2) + "\n"
        if self.folder.exists():
            if self.choice() != choice:
                for name in (manifests.FILE, manifests.FILE_BEFORE):
                    (self.records / name).unlink(missing_ok=True)
                write_atomically(self._settings_file, text)
            return
        unfinished = self.folder.parent / f".unfinished_{self.folder.name}"
        for folder in (self.images, self.labels, self.records):
            (unfinished / folder.name).mkdir(parents=True, exist_ok=True)
        write_atomically(unfinished / self.records.name / self._settings_file.name, text)
        os.rename(unfinished, self.folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let no second run write to the dataset.

        Raises:
            PluginError: one does.
        """
        who = f"`stunet unlabeled` is writing to {self.folder}"
        with lock(self.records / ".lock", who):
            for folder in (self.images, self.labels):
                folder.mkdir(exist_ok=True)
            self.clear_unfinished()
            try:
                yield
            finally:
                shutil.rmtree(self.temporary, ignore_errors=True)

    def clear_unfinished(self) -> None:
        """Remove the temporary files of this run or of one that was killed."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(exist_ok=True)

    def settings(self, choice: Choice, copy: bool) -> Settings:
        return Settings(choice.modality, choice.file_ending, self.images, self.temporary, copy)

    def files_of(self, case: str, choice: Choice) -> tuple[Path, Path]:
        """Image and label of a case."""
        return (
            self.images / f"{case}_0000{choice.file_ending}",
            self.labels / f"{case}{choice.file_ending}",
        )

    def has(self, case: str, choice: Choice) -> bool:
        """Whether the files of a case are in place."""
        return all(os.path.lexists(path) for path in self.files_of(case, choice))

    def open_manifest(self, choice: Choice) -> Manifest:
        return Manifest(self.records, lambda record: self._is_complete(record, choice))

    def _is_complete(self, record: Record, choice: Choice) -> bool:
        """Whether the files of a case are those of its record: its image may still lead to where
        the scan was before."""
        if not self.has(record.case, choice):
            return False
        leads_to = points_to(self.files_of(record.case, choice)[0])
        expected = (
            record.source if record.facts.get("image") == LINK else os.path.dirname(record.source)
        )
        return leads_to is None or leads_to.startswith(expected)

    def is_done(self, source: Source, manifest: Manifest, choice: Choice) -> bool:
        """Whether there is nothing left to do for a source; a duplicate is needed when the case
        that it equals leads nowhere."""
        record = manifest.last(source.key)
        if record is None or record.status == FAILED or record.signature != source.signature:
            return False
        if record.reason != DUPLICATE:
            # A series that a version before took may be seen to be wrong now.
            return source.problem is None or record.status != CASE
        image = self.files_of(record.case, choice)[0]
        return is_in_place(image) or not os.path.lexists(image)

    def commit(self, prepared: Prepared, manifest: Manifest, choice: Choice) -> Record:
        """Record what became of a source and give its files their places; return the record.

        The record comes first and the image last: a kill in between leaves a last record without
        files, which the next run takes back, and never an image without a label.
        """
        record = prepared.record
        before = manifest.last(record.key)
        is_new = prepared.image is not None
        # A case whose image leads nowhere is made again where its scan was found now.
        if record.status == CASE and is_in_place(self.files_of(record.case, choice)[0]):
            # Its worker may not have seen that: two copies can be under way at the same time.
            is_new = False
            record = self._known_case(record, before, manifest.of_case(record.case))
        elif record.status == CASE and not is_new:
            # The case with the same voxels, which the worker saw, was removed since: its source has
            # changed.
            record = replace(
                record, status=FAILED, case="", reason="changed during the run", detail="run again"
            )
        if record.status == FAILED and before is not None and before.status == CASE:
            # Out of reach for now; what was made of it stays.
            return record
        if before is not None and before.status == CASE and before.case != record.case:
            # The file has other content now. Its old case would show the new voxels under the old
            # label.
            for path in self.files_of(before.case, choice):
                path.unlink(missing_ok=True)
        manifest.append(record)
        image, label = self.files_of(record.case, choice)
        for unfinished, place in ((prepared.label, label), (prepared.image, image)):
            if unfinished is not None and is_new:
                os.replace(unfinished, place)
            elif unfinished is not None:
                unfinished.unlink(missing_ok=True)
        return record

    def _known_case(self, record: Record, before: Record | None, owner: Record | None) -> Record:
        """The record of a source whose voxels are those of a case that is in place, and whose
        record so far is ``owner``."""
        if before is not None and before.case == record.case:
            # The source of that case itself: its times have changed, its voxels have not.
            return replace(before, signature=record.signature)
        if owner is None or not os.path.exists(owner.source):
            # It was moved, or the records were lost.
            return replace(record, facts=owner.facts if owner else {})
        return replace(
            record,
            status=SKIPPED,
            reason=DUPLICATE,
            detail=f"same voxels as {record.case}",
            facts={},
        )

    def write_description(self, choice: Choice, cases: int) -> None:
        """Write ``dataset.json``."""
        content = {
            "channel_names": {"0": choice.modality},
            "labels": LABELS,
            "numTraining": cases,
            "file_ending": choice.file_ending,
            "overwrite_image_reader_writer": READER,
            "name": self.folder.name,
            "description": (
                "Scans without labels, collected by `stunet unlabeled`. The label is a mask of the"
                " body."
            ),
        }
        write_if_new(self.folder / "dataset.json", json.dumps(content, indent=2) + "\n")

    def count_cases(self, choice: Choice) -> int:
        """Images that are in place."""
        ending = f"_0000{choice.file_ending}"
        if not self.images.is_dir():
            return 0
        with os.scandir(self.images) as listing:
            return sum(entry.name.endswith(ending) for entry in listing)
