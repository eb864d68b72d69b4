"""`stunet unlabeled` interrupted: kills at any moment, a scan that kills its worker, a full disk;
the same command goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stunet_plugin.unlabeled import run as command
from stunet_plugin.unlabeled.discovery import Source
from stunet_plugin.unlabeled.prepare_case import Prepared, Settings, prepare

from unlabeled_helpers import Run, command_in, mr_array, rows, snapshot, write

pytestmark = pytest.mark.xdist_group("unlabeled")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return command_in(tmp_path, monkeypatch)


def start(folder: Path, raw: Path, processes: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "nnUNet_raw": str(raw), "OMP_NUM_THREADS": "1"}
    arguments = [
        "unlabeled",
        "-i",
        str(folder),
        "-d",
        "900",
        "-n",
        "Scans",
        "--modality",
        "MR",
        "-np",
        str(processes),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "stunet_plugin", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def contents(dataset: Path) -> dict[str, object]:
    """A dataset without times, the order of records aside."""
    found: dict[str, object] = {}
    for name, entry in snapshot(dataset).items():
        content = entry[1] if len(entry) > 1 else None
        if not name.endswith(".sqlite"):
            is_table = name.endswith(".csv") and isinstance(content, bytes)
            found[name] = sorted(content.splitlines()) if is_table else content  # type: ignore[union-attr]
    return found


def images(dataset: Path) -> int:
    return len(list((dataset / "imagesTr").glob("*.nii.gz")))


@pytest.mark.slow
def test_killed_at_random_moments_and_continued(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    for seed in range(120):
        write(folder / f"{seed % 7}" / f"{seed}.nii.gz", mr_array(seed % 110))
    before = snapshot(folder)
    raws = [tmp_path / name for name in ("whole", "killed")]
    for raw in raws:
        raw.mkdir()
    whole, killed = (raw / "Dataset900_Scans" for raw in raws)
    assert start(folder, raws[0], 1).wait() == 0

    generator = random.Random(0)
    kills = (signal.SIGKILL, signal.SIGINT, signal.SIGKILL)
    for number, sign in enumerate(kills):
        process = start(folder, raws[1], 2)
        wanted = images(killed) + 1 + 5 * number
        while process.poll() is None and images(killed) < wanted:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(sign)
        output, errors = process.communicate()
        assert process.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL), (
            output,
            errors,
        )
        if sign == signal.SIGINT:
            assert b"The same command resumes where it stopped." in errors
            description = json.loads((killed / "dataset.json").read_text())
            assert description["numTraining"] == len(list((killed / "imagesTr").iterdir()))
        for image in (killed / "imagesTr").iterdir():
            assert (killed / "labelsTr" / image.name.replace("_0000", "")).is_file()
    assert 0 < len(list((killed / "imagesTr").iterdir())) < 110
    assert start(folder, raws[1], 2).wait() == 0
    assert contents(killed) == contents(whole)
    assert len(rows(killed, "cases.csv")) == 110
    assert snapshot(folder) == before


def prepare_or_die(settings: Settings, source: Source) -> Prepared:
    """Stands for a library that crashes on a file."""
    if source.path.endswith("deadly.nii"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return prepare(settings, source)


def test_a_scan_that_kills_its_worker(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "deadly", "z"):
        write(tmp_path / "scans" / f"{name}.nii", mr_array(len(name)) + ord(name[0]))
    monkeypatch.setattr(command, "prepare", prepare_or_die)
    assert run(tmp_path / "scans", np=1, modality="MR") == 0
    dataset = tmp_path / "raw" / "Dataset900_Scans"
    assert [Path(row["source"]).name for row in rows(dataset, "cases.csv")] == ["a.nii", "z.nii"]
    (row,) = rows(dataset, "skipped.csv")
    assert (row["reason"], row["tried_again"]) == ("could not be processed", "yes")
    assert "SIGSEGV" in row["detail"]
    monkeypatch.undo()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    assert run(tmp_path / "scans", np=1) == 0
    assert len(rows(dataset, "cases.csv")) == 3
    assert not rows(dataset, "skipped.csv")


def test_a_full_disk_stops_the_run_and_the_finished_part_stays(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    small = write(tmp_path / "scans" / "a.nii", mr_array(1))
    write(tmp_path / "scans" / "b.nii.gz", mr_array(2, (60, 80, 80)))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # A limit on the size of files, which the workers inherit, stands for the disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
        assert run(tmp_path / "scans", np=1, modality="MR", **{"file-ending": ".nii"}) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "Once mended, the same command continues" in capsys.readouterr().err
    dataset = tmp_path / "raw" / "Dataset900_Scans"
    (row,) = rows(dataset, "cases.csv")
    assert row["source"] == str(small)
    assert not rows(dataset, "skipped.csv"), "a full disk is not the fault of a scan"
    assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == 1
    assert run(tmp_path / "scans", np=1) == 0
    assert len(rows(dataset, "cases.csv")) == 2
