"""What survives a kill: workers that die, records that are torn, files that are half in place."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.unlabeled.checks import MR
from stunet_plugin.unlabeled.dataset import Dataset, Prepared
from stunet_plugin.unlabeled.manifest import CASE, FAILED, SKIPPED, Manifest, Record
from stunet_plugin.utils import workers
from stunet_plugin.utils.workers import run_ordered

from unlabeled_helpers import snapshot

# --- workers


def work(task: int) -> str:
    """Tasks that end well or badly; those that are multiples of 10 bring two more."""
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 4:
        raise ValueError("no good")
    if task == 6:
        time.sleep(60)
    time.sleep(0.02 * (task % 3))
    return f"done {task}"


@pytest.mark.posix
def test_workers_that_die_cost_their_task_alone_and_results_keep_their_order() -> None:
    def further(value: str) -> list[int]:
        number = int(value.split()[1])
        return [number + 101, number + 102] if number % 10 == 0 else []

    results = list(run_ordered(iter(range(12)), work, processes=2, further=further, time_limit=2))
    assert [result.task for result in results] == [101, 102, 0, *range(1, 10), 111, 112, 10, 11]
    failures = {result.task: result.failure for result in results if result.failure}
    assert all(result.value == f"done {result.task}" for result in results if not result.failure)
    expected = {3: "SIGKILL (out of memory?)", 4: "ValueError: no good", 6: "longer than 2 s"}
    assert all(expected[task] in failure for task, failure in failures.items())
    assert failures.keys() == expected.keys()


class Unloadable:
    """Work that ends a worker before it is ready."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


@pytest.mark.parametrize("early", [False, True])
def test_workers_that_never_start_are_not_the_fault_of_scans(
    monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """They die as they take their task, or before."""
    spawn = workers._Worker._spawn

    def spawn_and_wait(worker: workers._Worker) -> None:
        spawn(worker)
        worker.process.join()

    if early:
        monkeypatch.setattr(workers._Worker, "_spawn", spawn_and_wait)
    with pytest.raises(PluginError, match="could not be started: it ended with exit code 3"):
        list(run_ordered(iter([1]), Unloadable(), processes=1))  # type: ignore[arg-type]


# --- records


def case(name: str, signature: str = "1") -> Record:
    return Record(f"/data/{name}.nii", signature, CASE, case=f"scan_{name}", facts={"body": 0.5})


def manifest_of(folder: Path, *records: Record) -> Manifest:
    manifest = Manifest(folder, lambda _: True)
    for record in records:
        manifest.append(record)
    return manifest


def test_records_come_back_and_the_last_of_a_source_and_of_a_case_counts(tmp_path: Path) -> None:
    skipped = Record("/data/x.nii", "1", SKIPPED, reason="constant", detail="every voxel is 7")
    odd = Record("/data/\udcff\n.nii", "", FAILED, reason="cannot be opened")
    moved = replace(case("a"), source="/elsewhere/a.nii")
    changed = replace(case("c", "2"), case="scan_d")
    records = (case("a"), case("b", "1"), skipped, odd, case("b", "2"), moved, case("c"), changed)
    manifest_of(tmp_path, *records).close()
    before = snapshot(tmp_path)
    manifest = manifest_of(tmp_path, odd)
    assert list(manifest.records()) == [skipped, odd, case("b", "2"), moved, changed]
    assert (manifest.cases, manifest.last("/data/x.nii")) == (3, skipped)
    assert manifest.of_case("scan_a") == moved
    assert manifest.of_case("scan_c") is None, "its source has other content now"
    assert manifest.last(case("a").key) is None, "should it come back, it is looked at again"
    assert snapshot(tmp_path) == before, "the same failure is not written twice"
    # Another scan takes the name that was given up: the source that had it keeps its new case.
    manifest.append(replace(case("c"), source="/data/e.nii"))
    assert manifest.cases == 4


def test_a_damaged_file_of_records_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "records.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(PluginError, match="damaged.*Remove it"):
        manifest_of(tmp_path)


# --- files of a case


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    made = Dataset(900, "Scans")
    made.begin(MR, ".nii")
    return made


def prepared(dataset: Dataset, record: Record) -> Prepared:
    image, label = (dataset.temporary / f"{record.case}_{kind}" for kind in ("image", "label"))
    label.write_text(record.case)
    image.write_text(record.case)
    return Prepared(record, (image, label))


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_record_and_files_is_taken_back(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    first, second = case("a"), case("b")
    rename, done = os.replace, []

    def killed(*arguments: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(rename(*arguments))

    with dataset.opened():
        dataset.commit(prepared(dataset, first))
        found = prepared(dataset, second)
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            dataset.commit(found)
        monkeypatch.setattr(os, "replace", rename)
    with dataset.opened():
        assert list(dataset.manifest.records()) == [first]
        names = [path.name for path in dataset.images.iterdir()]
        assert names == ["scan_a_0000.nii"], "never an image without a label"
        dataset.commit(prepared(dataset, second))
        assert list(dataset.manifest.records()) == [first, second]
        assert dataset.files_of(second.case)[0].exists()
        assert dataset.manifest.cases == dataset.count_cases() == 2


def test_one_writer_at_a_time(dataset: Dataset) -> None:
    dataset.temporary.mkdir()
    (dataset.temporary / "leftover").touch()
    with dataset.opened():
        assert not list(dataset.temporary.iterdir())
        with pytest.raises(PluginError, match="Another `stunet unlabeled`"), dataset.opened():
            pass
    with dataset.opened():
        pass
