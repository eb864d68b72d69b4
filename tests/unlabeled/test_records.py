"""What survives a kill: workers that die, records that are torn, files that are half in place."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.unlabeled.checks import MR
from stunet_plugin.unlabeled.dataset import Choice, Dataset
from stunet_plugin.unlabeled.discovery import Source
from stunet_plugin.unlabeled.manifest import CASE, FAILED, SKIPPED, Manifest, Record
from stunet_plugin.unlabeled.prepare_case import Prepared
from stunet_plugin.utils.workers import run_ordered

from unlabeled_helpers import snapshot

# --- workers


def work(task: int) -> str:
    """Tasks that end well or badly; those that are multiples of 10 bring two more."""
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 4:
        raise ValueError("no good")
    if task == 5:
        os._exit(7)
    if task == 6:
        time.sleep(60)
    time.sleep(0.02 * (task % 3))
    return f"done {task}"


def test_workers_that_die_cost_their_task_alone_and_results_keep_their_order() -> None:
    def further(value: str) -> list[int]:
        number = int(value.split()[1])
        return [number + 101, number + 102] if number % 10 == 0 else []

    results = list(run_ordered(iter(range(12)), work, processes=2, further=further, time_limit=2))
    assert [result.task for result in results] == [101, 102, 0, *range(1, 10), 111, 112, 10, 11]
    failures = {result.task: result.failure for result in results if result.failure}
    assert all(result.value == f"done {result.task}" for result in results if not result.failure)
    assert set(failures) == {3, 4, 5, 6}
    assert "SIGKILL (out of memory?)" in failures[3]
    assert "ValueError: no good" in failures[4]
    assert "exit code 7" in failures[5]
    assert "longer than 2 s" in failures[6]


class Unloadable:
    """Work that ends a worker before it is ready."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


def test_workers_that_never_start_are_not_the_fault_of_scans() -> None:
    with pytest.raises(PluginError, match="could not be started: it ended with exit code 3"):
        list(run_ordered(iter([1]), Unloadable(), processes=1))  # type: ignore[arg-type]


# --- records


def case(name: str, signature: str = "1") -> Record:
    return Record(f"/data/{name}.nii", signature, CASE, case=f"scan_{name}", facts={"body": 0.5})


def always(_: Record) -> bool:
    return True


def manifest_of(folder: Path, *records: Record) -> Manifest:
    manifest = Manifest(folder, always)
    for record in records:
        manifest.append(record)
    return manifest


def test_records_come_back_and_the_last_of_a_source_counts(tmp_path: Path) -> None:
    skipped = Record("/data/b.nii", "1", SKIPPED, reason="constant", detail="every voxel is 7")
    odd = Record("/data/\udcff\n.nii", "", FAILED, reason="cannot be opened")
    manifest_of(tmp_path, case("a"), skipped, odd, case("a", "2")).close()
    before = snapshot(tmp_path)
    manifest = Manifest(tmp_path, always)
    assert list(manifest.records()) == [skipped, odd, case("a", "2")]
    assert (manifest.cases, manifest.last("/data/b.nii")) == (1, skipped)
    manifest.append(odd)
    manifest.close()
    assert snapshot(tmp_path) == before, "the same failure is not written twice"


def test_the_last_record_of_a_case_counts(tmp_path: Path) -> None:
    moved = replace(case("a"), source="/elsewhere/a.nii")
    changed = replace(case("c", "2"), case="scan_d")
    manifest_of(tmp_path, case("a"), case("b"), moved, case("c", "1"), changed).close()
    manifest = Manifest(tmp_path, always)
    assert [record.case for record in manifest.records()] == ["scan_b", "scan_a", "scan_d"]
    assert (manifest.cases, manifest.of_case("scan_a")) == (3, moved)
    assert manifest.of_case("scan_c") is None, "its source has other content now"
    assert manifest.last(case("a").key) is None, "should it come back, it is looked at again"
    # Another scan takes the name that was given up: the source that had it keeps its new case.
    manifest.append(replace(case("c"), source="/data/e.nii"))
    assert manifest.cases == 4


def test_records_of_the_version_before_are_carried_over_once(tmp_path: Path) -> None:
    """Lines of JSON, the last one torn, one damaged; the last case has no files."""
    lines = [
        '{"source": "/data/a.nii", "signature": "1", "status": "case", "case": "scan_a"}',
        "\0\0 garbage",
        '{"source": "/d", "signature": "", "status": "failed", "reason": "cannot be opened"}',
        '{"source": "/data/a.nii", "signature": "2", "status": "case", "case": "scan_a"}',
        '{"source": "/data", "signature": "1", "status": "folder"}',
        '{"source": "/data/b.nii", "signature": "1", "status": "case", "case": "scan_b"}',
        '{"source": "/data/c.ni',
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    for _ in range(2):
        manifest = Manifest(tmp_path, lambda record: record.case != "scan_b")
        found = [(record.source, record.signature) for record in manifest.records()]
        assert found == [("/d", ""), ("/data/a.nii", "2")]
        manifest.close()
        assert [path.name for path in tmp_path.iterdir()] == ["records.sqlite"]


def test_a_damaged_file_of_records_is_a_sentence(tmp_path: Path) -> None:
    manifest_of(tmp_path, case("a")).close()
    (tmp_path / "records.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(PluginError, match="damaged.*Remove it"):
        Manifest(tmp_path, always)


def test_a_full_disk_leaves_the_records_as_they_were(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    manifest = manifest_of(tmp_path, case("a"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match="records.sqlite"):
            manifest.append(case("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    manifest.append(case("c"))
    assert [record.case for record in manifest.records()] == ["scan_a", "scan_c"]


# --- files of a case

CHOICE = Choice(MR, ".nii")


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    made = Dataset(900, "Scans")
    made.begin(CHOICE)
    made.temporary.mkdir()
    return made


def prepared(dataset: Dataset, record: Record) -> Prepared:
    files = [dataset.temporary / f"{record.case}_{kind}" for kind in ("image", "label")]
    for file in files:
        file.write_text(f"{record.source} {record.case}")
    return Prepared(record, *files)


def killed_in_commit(
    dataset: Dataset,
    second: Prepared,
    manifest: Manifest,
    rename: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Manifest:
    """Commit with a renaming that kills, and open the records as the next run does."""
    with monkeypatch.context() as context:
        context.setattr(os, "replace", rename)
        with pytest.raises(KeyboardInterrupt):
            dataset.commit(second, manifest, CHOICE)
    manifest.close()
    return dataset.open_manifest(CHOICE)


def test_a_kill_before_a_moved_scan_is_linked_is_taken_back(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (dataset.folder.parent / name for name in ("old.nii", "new.nii"))
    old.touch()

    def killed(*_: Path) -> None:
        raise KeyboardInterrupt

    def linked(scan: Path) -> Prepared:
        made = prepared(dataset, replace(case("a"), source=str(scan), facts={"image": "link"}))
        assert made.image is not None
        made.image.unlink()
        made.image.symlink_to(scan)
        return made

    manifest = dataset.open_manifest(CHOICE)
    dataset.commit(linked(old), manifest, CHOICE)
    old.rename(new)
    second = linked(new)
    again = killed_in_commit(dataset, second, manifest, killed, monkeypatch)
    assert [record.source for record in again.records()] == [str(old)]
    dataset.commit(linked(new), again, CHOICE)
    assert [record.source for record in again.records()] == [str(new)]
    assert (again.cases, dataset.files_of("scan_a", CHOICE)[0].exists()) == (1, True)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_record_and_files_is_taken_back(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    manifest = dataset.open_manifest(CHOICE)
    dataset.commit(prepared(dataset, case("a")), manifest, CHOICE)
    second = prepared(dataset, case("b"))
    rename = os.replace
    done = []

    def killed(*arguments: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(rename(*arguments))

    again = killed_in_commit(dataset, second, manifest, killed, monkeypatch)
    assert [record.case for record in again.records()] == ["scan_a"]
    assert [path.name for path in dataset.images.iterdir()] == ["scan_a_0000.nii"], (
        "never an image without a label"
    )
    dataset.commit(prepared(dataset, case("b")), again, CHOICE)
    assert again.cases == dataset.count_cases(CHOICE) == 2


def test_copies_changes_and_absences(dataset: Dataset) -> None:
    manifest = dataset.open_manifest(CHOICE)
    scan = dataset.folder.parent / "a.nii"
    scan.touch()
    first = replace(case("a"), source=str(scan))
    dataset.commit(prepared(dataset, first), manifest, CHOICE)
    image, label = dataset.files_of("scan_a", CHOICE)
    before = image.stat().st_mtime_ns, label.stat().st_mtime_ns

    other = Record("/data/copy.nii", "1", CASE, case="scan_a", facts={"body": 0.5})
    for copy in (
        prepared(dataset, other),
        Prepared(Record("/data/copy2.nii", "1", CASE, case="scan_a")),
    ):
        found = dataset.commit(copy, manifest, CHOICE)
        assert (found.status, found.reason, found.detail) == (
            SKIPPED,
            "duplicate",
            "same voxels as scan_a",
        )
    assert not list(dataset.temporary.iterdir())

    touched = dataset.commit(
        Prepared(Record(str(scan), "2", CASE, case="scan_a")), manifest, CHOICE
    )
    assert touched.facts == first.facts
    assert dataset.is_done(Source(str(scan), signature="2"), manifest, CHOICE)

    tilted = Source(str(scan), signature="2", problem=("skewed axes", "20 degrees"))
    assert not dataset.is_done(tilted, manifest, CHOICE)

    gone = Record(str(scan), "", FAILED, reason="cannot be opened")
    dataset.commit(Prepared(gone), manifest, CHOICE)
    assert dataset.is_done(Source(str(scan), signature="2"), manifest, CHOICE), (
        "what is out of reach for now stays"
    )
    assert (image.stat().st_mtime_ns, label.stat().st_mtime_ns) == before

    changed = Record(str(scan), "3", CASE, case="scan_c")
    dataset.commit(prepared(dataset, changed), manifest, CHOICE)
    assert [path.name for path in dataset.images.iterdir()] == ["scan_c_0000.nii"]
    assert [path.name for path in dataset.labels.iterdir()] == ["scan_c.nii"]
    assert manifest.cases == 1

    scan.unlink()
    moved = dataset.commit(
        Prepared(Record("/data/moved.nii", "1", CASE, case="scan_c")), manifest, CHOICE
    )
    assert (moved.status, moved.facts, manifest.cases) == (CASE, changed.facts, 1), (
        "the table leads to the new place"
    )


def test_one_writer_at_a_time(dataset: Dataset) -> None:
    leftover = dataset.temporary / "leftover"
    leftover.touch()
    with dataset.locked():
        assert not leftover.exists()
        with pytest.raises(PluginError, match="Another `stunet unlabeled`"), dataset.locked():
            pass
    with dataset.locked():
        pass
