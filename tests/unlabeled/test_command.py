"""`stunet unlabeled` from folder to dataset: a messy folder, further runs, wrong input, runs that
are interrupted at any moment and go on."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.cli import main
from stunet_plugin.unlabeled import run as command
from stunet_plugin.unlabeled.dataset import Dataset, Prepared
from stunet_plugin.unlabeled.discovery import Source
from stunet_plugin.unlabeled.prepare_case import prepare

from conftest import Workspace
from unlabeled_helpers import (
    SPACING,
    ct_array,
    mr_array,
    rows,
    snapshot,
    truncate,
    write,
    write_dicom,
)

pytestmark = pytest.mark.xdist_group("unlabeled")

GOOD = {
    "a.nii.gz": "link",
    "b/deep/er/B.NII.GZ": "link",
    "b/with space.nii.gz": "link",
    "c.nii": "converted",
    "d.nrrd": "converted",
    "e.mha": "converted",
    "f.mhd": "converted",
    "one_more_axis.nrrd": "converted",
}
"""Scans of the messy folder, in the order of their seeds, and how they get into a dataset of
.nii.gz."""
BAD = {
    "2d.nii": "one slice",
    "4d.nii.gz": "more than three axes",
    "b/copy.nii.gz": "duplicate",
    "b/ct.nii.gz": "another modality",
    "b/dangling.nii.gz": "cannot be opened",
    "b/mask.nii.gz": "label map",
    "cut.nii.gz": "cut off or damaged",
    "nan.nii.gz": "not finite",
    "rgb.mha": "several values per voxel",
    "text.nii.gz": "not gzip",
    "thin.nii.gz": "absurd spacing",
    "z copy.nrrd": "duplicate",
}


def make_mess(folder: Path) -> None:
    for seed, name in enumerate(GOOD):
        path = folder / name
        array = mr_array(seed)
        if name == "one_more_axis.nrrd":
            write(path, array[None], spacing=(*SPACING, 1.0))
        else:
            write(path.with_name(path.name.lower()), array).rename(path)
    write_dicom(folder / "dicom", mr_array(100), 1)
    write_dicom(folder / "dicom", mr_array(101), 2)
    write_dicom(folder / "dicom", mr_array(102)[:3], 3)
    write(folder / "2d.nii", mr_array(1)[0])
    write(folder / "4d.nii.gz", np.stack([mr_array(1), mr_array(2)]), spacing=(2.0,) * 4)
    write(folder / "z copy.nrrd", mr_array(0))
    shutil.copy(folder / "a.nii.gz", folder / "b/copy.nii.gz")
    write(folder / "b/ct.nii.gz", ct_array(1))
    (folder / "b/dangling.nii.gz").symlink_to("nowhere.nii.gz")
    write(folder / "b/mask.nii.gz", (mr_array(1) > 200).astype(np.uint8))
    truncate(write(folder / "cut.nii.gz", mr_array(9)), 0.7)
    array = mr_array(1).astype(np.float32)
    array[0, 0, 0] = np.nan
    write(folder / "nan.nii.gz", array)
    write(folder / "rgb.mha", np.stack([mr_array(1).astype(np.uint8)] * 3, -1), vector=True)
    (folder / "text.nii.gz").write_text("this is no scan")
    write(folder / "thin.nii.gz", mr_array(1), spacing=(1e-3, 1e-3, 1e-3))
    for name in ("labelsTr/x.nii.gz", "notes.txt", "p.png", "q.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


Mess = tuple[Workspace, Path, dict[str, tuple[object, ...]]]
Run = Callable[..., int]


def arguments(*folders: Path, **options: Any) -> list[str]:
    given = ["unlabeled", "-d", "900", "-n", "Scans"]
    for folder in folders:
        given += ["-i", str(folder)]
    for name, value in options.items():
        dashes = "-" if name in ("np", "d", "n") else "--"
        given += [dashes + name.replace("_", "-"), str(value)]
    return given


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process, with a nnUNet_raw of its own; options by name."""
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    (tmp_path / "raw").mkdir()
    return lambda *folders, **options: main(arguments(*folders, **options))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tmp_path / "raw" / "Dataset900_Scans"


@pytest.fixture(scope="module")
def mess(new_workspace: Callable[[str], Workspace]) -> Mess:
    """A messy folder, the dataset made of it, and what the folder was like before."""
    workspace = new_workspace("unlabeled")
    folder = workspace.root / "scans"
    folder.mkdir()
    make_mess(folder)
    before = snapshot(folder)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in workspace.environment.items():
            patch.setenv(key, value)
        assert main(arguments(folder, np=2, modality="MR")) == 0
    return workspace, folder, before


def test_a_messy_folder(mess: Mess) -> None:
    workspace, folder, before = mess
    assert snapshot(folder) == before, "nothing of the user's is touched"
    dataset = workspace.raw / "Dataset900_Scans"
    cases = {os.path.relpath(row["source"], folder): row for row in rows(dataset, "cases.csv")}
    assert {name: row["image"] for name, row in cases.items() if name != "dicom"} == GOOD
    series = [row for row in rows(dataset, "cases.csv") if row["series"]]
    assert [row["image"] for row in series] == ["converted"] * 2
    skipped = {os.path.relpath(row["source"], folder): row for row in rows(dataset, "skipped.csv")}
    assert {name: row["reason"] for name, row in skipped.items() if name != "dicom"} == BAD
    assert skipped["dicom"]["reason"] == "too few slices"
    assert [name for name, row in skipped.items() if row["tried_again"] == "yes"] == [
        "b/dangling.nii.gz"
    ]

    names = sorted(row["case"] for row in rows(dataset, "cases.csv"))
    assert sorted(path.name for path in (dataset / "imagesTr").iterdir()) == [
        f"{name}_0000.nii.gz" for name in names
    ]
    assert sorted(path.name for path in (dataset / "labelsTr").iterdir()) == [
        f"{name}.nii.gz" for name in names
    ]
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["numTraining"] == len(names) == len(GOOD) + 2
    assert (description["channel_names"], description["file_ending"]) == ({"0": "MR"}, ".nii.gz")
    assert description["labels"] == {"background": 0, "body": 1}

    for seed, name in enumerate(GOOD):
        case = cases[name]["case"]
        image = dataset / "imagesTr" / f"{case}_0000.nii.gz"
        assert image.is_symlink() == (GOOD[name] == "link")
        read, label = (
            sitk.ReadImage(str(image)),
            sitk.ReadImage(str(dataset / "labelsTr" / f"{case}.nii.gz")),
        )
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read), mr_array(seed))
        np.testing.assert_allclose(read.GetSpacing(), SPACING, rtol=1e-6)
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(label, get)(), getattr(read, get)(), atol=1e-6)
        mask = sitk.GetArrayFromImage(label)
        assert mask.dtype == np.uint8
        expected = mr_array(seed) > 200
        assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) > 0.97

    summary = json.loads((dataset / "unlabeled" / "summary.json").read_text())
    assert summary["cases"] == len(names)
    assert summary["left_out"]["duplicate"] == 2
    assert summary["other_files"] == {".png": 2, ".raw": 1, ".txt": 1}
    assert (dataset / "unlabeled" / "contact_sheet.png").stat().st_size > 10_000
    assert not (dataset / "unlabeled" / "unfinished").exists()


def test_the_same_run_again_changes_nothing(
    mess: Mess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, folder, _ = mess
    monkeypatch.setenv("nnUNet_raw", str(workspace.raw))
    before = snapshot(workspace.raw)
    assert main(arguments(folder)) == 0
    assert snapshot(workspace.raw) == before
    assert f"{len(GOOD) + 2} cases, 0 new" in capsys.readouterr().out


@pytest.mark.slow
def test_stock_commands_take_it(mess: Mess, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = mess[0]
    options = ("-d", 900, "-c", "3d_fullres", "-npfp", 1, "-np", 1)
    output = workspace.run(
        "nnUNetv2_plan_and_preprocess", *options, "--verify_dataset_integrity"
    ).stdout
    assert "Warning" not in output, output
    plans = workspace.plans(dataset_id="900")
    assert plans["image_reader_writer"] == "SimpleITKIO"
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]
    # Intensities of the body, not of the air (about 10).
    assert plans["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"] > 200
    preprocessed = workspace.dataset_folder(workspace.preprocessed, "900")
    assert len(list((preprocessed / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == len(GOOD) + 2
    for key, value in workspace.environment.items():
        monkeypatch.setenv(key, value)
    assert main(["plan", "-d", "900", "-pl", "STUNetPlanner_tiny", "-np", "1"]) == 0
    assert "3d_fullres" in workspace.plans("STUNetPlans_tiny", "900")["configurations"]


@pytest.mark.slow
def test_further_folders_join_and_changes_are_followed(
    run: Run, tmp_path: Path, dataset: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for seed in range(3):
        write(first / f"{seed}.nrrd", mr_array(seed))
    assert run(first, np=1) == 0
    assert len(rows(dataset, "cases.csv")) == 3
    before = snapshot(dataset / "labelsTr")

    write(second / "new.nii.gz", mr_array(3))
    write(second / "known.nii.gz", mr_array(0))
    write(first / "1.nrrd", mr_array(4))
    os.utime(first / "2.nrrd")
    (first / "0.nrrd").rename(first / "moved.nrrd")
    assert run(first, second, np=2) == 0
    cases = {Path(row["source"]).name: row for row in rows(dataset, "cases.csv")}
    # 0 was moved: its case leads to the new place now. 1 is another scan now, 2 was only touched.
    assert set(cases) == {"moved.nrrd", "1.nrrd", "2.nrrd", "new.nii.gz"}
    assert cases["new.nii.gz"]["image"] == "converted"
    assert [Path(row["source"]).name for row in rows(dataset, "skipped.csv")] == ["known.nii.gz"]
    assert json.loads((dataset / "unlabeled" / "summary.json").read_text())["sources_missing"] == 0
    assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == 4
    assert all(image.exists() for image in (dataset / "imagesTr").iterdir())
    after = snapshot(dataset / "labelsTr")
    touched, moved = (f"{cases[name]['case']}.nrrd" for name in ("2.nrrd", "moved.nrrd"))
    assert after[touched] == before[touched]
    assert after[moved][1] == before[moved][1]
    assert len(after) == 4


@pytest.mark.slow
def test_a_folder_that_was_moved_is_followed(
    run: Run, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write(old / "header.mhd", mr_array(0))
    write(old / "link.mha", mr_array(1))
    write(old / "converted.nrrd", mr_array(2))
    assert run(old, np=1, file_ending=".mha") == 0
    labels = {name: entry[1] for name, entry in snapshot(dataset / "labelsTr").items()}

    shutil.copytree(old, new)
    write(new / "further.mha", mr_array(3))
    assert run(new, np=1) == 0
    assert len(rows(dataset, "skipped.csv")) == 3, "the copies"
    shutil.rmtree(old)
    write(old / "0.mha", mr_array(3))
    assert run(old, np=1) == 0
    assert "2 of the cases lead to scans that are not there" in capsys.readouterr().out
    assert run(new, np=1) == 0
    assert "not there" not in capsys.readouterr().out
    cases = {Path(row["source"]).name: row for row in rows(dataset, "cases.csv")}
    assert set(cases) == {"header.mhd", "link.mha", "converted.nrrd", "further.mha"}
    for seed, name in enumerate(("header.mhd", "link.mha", "converted.nrrd")):
        image = sitk.ReadImage(str(dataset / "imagesTr" / f"{cases[name]['case']}_0000.mha"))
        assert np.array_equal(sitk.GetArrayFromImage(image), mr_array(seed)), name
    after = {name: entry[1] for name, entry in snapshot(dataset / "labelsTr").items()}
    assert {name: after[name] for name in labels} == labels
    assert {Path(row["source"]).name for row in rows(dataset, "skipped.csv")} == {
        "converted.nrrd",
        "0.mha",
    }, "not needed"


# --- input


def test_one_case_works_and_says_what_that_means(
    run: Run, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "scans" / "only.mhd", ct_array(1))
    assert run(tmp_path / "scans", np=1) == 0
    output = capsys.readouterr().out
    assert "taken for CT" in output
    assert "1 case, 1 new" in output
    assert "both of its sub-volumes" in output
    assert "fold 'all'" in output
    assert json.loads((dataset / "dataset.json").read_text())["channel_names"] == {"0": "CT"}
    (row,) = rows(dataset, "cases.csv")
    assert row["image"] == "header that points to the data"
    image = sitk.ReadImage(str(dataset / "imagesTr" / f"{row['case']}_0000.mha"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), ct_array(1))


def test_no_case_at_all_does_not_bind_the_next_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "scans" / "mr.nii.gz", mr_array(1))
    assert run(tmp_path / "scans", np=1, modality="CT") == 1
    assert "No scan could be used" in capsys.readouterr().err
    assert not (tmp_path / "raw" / "Dataset900_Scans" / "dataset.json").exists()
    assert run(tmp_path / "scans", np=1, modality="MR") == 0
    assert run(tmp_path / "scans", np=1, modality="CT") == 2
    assert "was begun with MR" in capsys.readouterr().err


def test_mixed_modalities_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "one" / "mr.nii.gz", mr_array(1))
    write(tmp_path / "other" / "ct.nii.gz", ct_array(1))
    assert run(tmp_path / "one", tmp_path / "other") == 2
    error = capsys.readouterr().err
    for part in ("Mixed modalities", "1 like MR", "1 like CT", "ct.nii.gz", "--modality"):
        assert part in error
    assert not any((tmp_path / "raw").iterdir())


def taken(folder: str, base: str) -> Callable[[Path], None]:
    return lambda root: (root / base / folder / "imagesTr").mkdir(parents=True)


WRONG: dict[str, Any] = {
    "no nnUNet_raw": ({}, lambda _: os.environ.pop("nnUNet_raw"), "nnUNet_raw is not set"),
    "empty folder": ({}, None, "no files at all"),
    "pictures": (
        {},
        lambda root: [(root / "scans" / f"{n}.png").touch() for n in range(3)],
        "3 .png.*Pictures in 2D are no scans",
    ),
    "id of another": (
        {},
        taken("Dataset900_Other", "raw"),
        "-d 900 is taken: nnUNet_raw has Dataset900_Other",
    ),
    "id preprocessed": (
        {},
        taken("Dataset900_Other", "preprocessed"),
        "nnUNet_preprocessed has Dataset900_Other",
    ),
    "same name, not ours": ({}, taken("Dataset900_Scans", "raw"), "did not make it"),
    "id out of range": ({"d": 1000}, None, "from 1 to 999"),
    "name": ({"n": "a/b"}, None, "-n must be letters"),
    "no processes": ({"np": 0}, None, "at least 1"),
    "folder not there": ({"i": "gone"}, None, "is not there"),
    "folder is a file": ({"i": "file"}, lambda root: (root / "file").touch(), "is a file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    options, make, message = WRONG[name]
    (tmp_path / "scans").mkdir()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    if make is not None:
        make(tmp_path)
    options = dict(options)
    folder = tmp_path / str(options.pop("i", "scans"))
    before = snapshot(tmp_path)
    assert run(folder, **options) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, error), error
    assert snapshot(tmp_path) == before, "nothing was written"


def test_the_dataset_is_no_input_of_itself(
    run: Run, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "raw" / "mine"
    write(folder / "a.nii", mr_array(1))
    assert run(tmp_path / "raw", np=1) == 0
    assert run(tmp_path / "raw", np=1) == 0
    assert len(rows(dataset, "cases.csv")) == 1
    assert not rows(dataset, "skipped.csv")
    capsys.readouterr()
    assert run(dataset / "imagesTr") == 2
    assert "lies in the dataset" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_measures(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    benchmark = importlib.import_module("unlabeled_scans")
    found = benchmark.measure(tmp_path / "scans", 2, (8, 30, 30), 1)
    assert found["scans"] == 2
    assert 0 < found["cpu_seconds_per_scan"] <= found["seconds"]
    assert found["parent_megabytes"] > 10
    assert found["largest_worker_megabytes"] > 10


# --- interrupted


def start(folder: Path, raw: Path, processes: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "nnUNet_raw": str(raw), "OMP_NUM_THREADS": "1"}
    given = arguments(folder, modality="MR", np=processes)
    return subprocess.Popen(
        [sys.executable, "-m", "stunet_plugin", *given],
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


def prepare_or_die(dataset: Dataset, copy: bool, source: Source) -> Prepared:
    """Stands for a library that crashes on a file."""
    if source.path.endswith("deadly.nii"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return prepare(dataset, copy, source)


@pytest.mark.slow
def test_a_scan_that_kills_its_worker(
    run: Run, tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "deadly", "z"):
        write(tmp_path / "scans" / f"{name}.nii", mr_array(len(name)) + ord(name[0]))
    monkeypatch.setattr(command, "prepare", prepare_or_die)
    assert run(tmp_path / "scans", np=1, modality="MR") == 0
    assert [Path(row["source"]).name for row in rows(dataset, "cases.csv")] == ["a.nii", "z.nii"]
    (row,) = rows(dataset, "skipped.csv")
    assert (row["reason"], row["tried_again"]) == ("could not be processed", "yes")
    assert "SIGSEGV" in row["detail"]
    monkeypatch.undo()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    assert run(tmp_path / "scans", np=1) == 0
    assert len(rows(dataset, "cases.csv")) == 3
    assert not rows(dataset, "skipped.csv")


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_finished_part_stays(
    run: Run, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    small = write(tmp_path / "scans" / "a.nii", mr_array(1))
    write(tmp_path / "scans" / "b.nii.gz", mr_array(2, (60, 80, 80)))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # A limit on the size of files, which the workers inherit, stands for the disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
        assert run(tmp_path / "scans", np=1, modality="MR", file_ending=".nii") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "Once mended, the same command continues" in capsys.readouterr().err
    (row,) = rows(dataset, "cases.csv")
    assert row["source"] == str(small)
    assert not rows(dataset, "skipped.csv"), "a full disk is not the fault of a scan"
    assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == 1
    assert run(tmp_path / "scans", np=1) == 0
    assert len(rows(dataset, "cases.csv")) == 2
