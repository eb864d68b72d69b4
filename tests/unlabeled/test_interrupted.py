"""`stunet unlabeled` killed, interrupted or out of space, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unlabeled_helpers import (
    Run,
    arguments,
    contents,
    description,
    largest_file,
    mr_array,
    rows,
    snapshot,
    table,
    write,
)


def start(folder: Path, raw: Path, processes: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "nnUNet_raw": str(raw), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "stunet_plugin"]
    words += arguments(folder, modality="MR", np=processes)
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE)


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

    def images() -> list[str]:
        return [path.name for path in (killed / "imagesTr").glob("*.nii.gz")]

    kills = ((signal.SIGKILL, 0.04), (signal.SIGINT, 0.01), (signal.SIGKILL, 0.02))
    for number, (sign, seconds) in enumerate(kills):
        process = start(folder, raws[1], 2)
        wanted = len(images()) + 1 + 5 * number
        while process.poll() is None and len(images()) < wanted:
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(sign)
        errors = process.communicate()[1]
        interrupted = sign == signal.SIGINT
        assert process.returncode == (130 if interrupted else -signal.SIGKILL), errors
        if interrupted:
            assert b"The same command resumes where it stopped." in errors
            assert description(killed)["numTraining"] == len(images())
        for image in images():
            assert (killed / "labelsTr" / image.replace("_0000", "")).is_file()
    assert 0 < len(images()) < 110
    assert start(folder, raws[1], 2).wait() == 0
    assert contents(killed) == contents(whole)
    assert len(rows(killed, "cases.csv")) == 110
    assert snapshot(folder) == before


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_finished_part_stays(
    run: Run, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "scans" / "a.nii", mr_array(1))
    write(tmp_path / "scans" / "b.nii.gz", mr_array(2, (60, 80, 80)))
    with largest_file(60_000):
        assert run(tmp_path / "scans", np=1, modality="MR", file_ending=".nii") == 2
    assert "Once mended, the same command continues" in capsys.readouterr().err
    assert list(table(dataset)) == ["a.nii"]
    assert not rows(dataset, "skipped.csv"), "a full disk is not the fault of a scan"
    assert description(dataset)["numTraining"] == 1
    assert run(tmp_path / "scans", np=1) == 0
    assert len(rows(dataset, "cases.csv")) == 2
