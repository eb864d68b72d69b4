"""`stunet unlabeled` from folder to dataset: a messy folder, further runs, wrong input, parts."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.cli import main
from stunet_plugin.unlabeled.parts import Part

from conftest import Workspace
from unlabeled_helpers import (
    SPACING,
    Run,
    arguments,
    contents,
    ct_array,
    description,
    mr_array,
    rows,
    snapshot,
    table,
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
    "copy.nii.gz": "duplicate",
    "ct.nii.gz": "another modality",
    "cut.nii.gz": "cut off or damaged",
    "dangling.nii.gz": "cannot be opened",
    "dicom": "too few slices",
    "mask.nii.gz": "label map",
    "text.nii.gz": "not gzip",
    "z copy.nrrd": "duplicate",
}


def make_mess(folder: Path) -> None:
    for seed, path in enumerate(folder / name for name in GOOD):
        array = mr_array(seed)[None] if path.stem == "one_more_axis" else mr_array(seed)
        write(path.with_name(path.name.lower()), array).rename(path)
    write_dicom(folder / "dicom", mr_array(100), 1)
    write_dicom(folder / "dicom", mr_array(101), 2)
    write_dicom(folder / "dicom", mr_array(102)[:3], 3)
    write(folder / "2d.nii", mr_array(1)[0])
    write(folder / "z copy.nrrd", mr_array(0))
    shutil.copy(folder / "a.nii.gz", folder / "b/copy.nii.gz")
    write(folder / "b/ct.nii.gz", ct_array(1))
    (folder / "b/dangling.nii.gz").symlink_to("nowhere.nii.gz")
    write(folder / "b/mask.nii.gz", (mr_array(1) > 200).astype(np.uint8))
    truncate(write(folder / "cut.nii.gz", mr_array(9)), 0.7)
    (folder / "text.nii.gz").write_text("this is no scan")
    for name in ("labelsTr/x.nii.gz", "notes.txt", "p.png", "q.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


Mess = tuple[Workspace, Path]


def image_of(dataset: Path, case: str) -> tuple[Path, Any]:
    (path,) = (dataset / "imagesTr").glob(f"{case}_0000.*")
    return path, sitk.ReadImage(str(path))


@pytest.fixture(scope="module")
def mess(new_workspace: Callable[[str], Workspace]) -> Mess:
    """A messy folder, and a workspace with the dataset made of it."""
    workspace = new_workspace("unlabeled")
    folder = workspace.root / "scans"
    make_mess(folder)
    before = snapshot(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_raw", str(workspace.raw))
        assert main(arguments(folder, np=2, modality="MR")) == 0
    assert snapshot(folder) == before, "nothing of the user's is touched"
    return workspace, folder


def test_a_messy_folder(mess: Mess) -> None:
    dataset = mess[0].raw / "Dataset900_Scans"
    cases, skipped = table(dataset), table(dataset, "skipped.csv")
    good = {Path(name).name: how for name, how in GOOD.items()}
    assert {name: row["image"] for name, row in cases.items()} == good | {"dicom": "converted"}
    assert {name: row["reason"] for name, row in skipped.items()} == BAD
    again = [name for name, row in skipped.items() if row["tried_again"] == "yes"]
    assert again == ["dangling.nii.gz"]
    names = sorted(row["case"] for row in rows(dataset, "cases.csv"))
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        files = sorted(path.name for path in (dataset / folder).iterdir())
        assert files == [f"{name}{ending}" for name in names]
    found = description(dataset)
    assert found["numTraining"] == len(names) == len(GOOD) + 2
    assert (found["channel_names"], found["file_ending"]) == ({"0": "MR"}, ".nii.gz")
    assert found["labels"] == {"background": 0, "body": 1}

    for seed, (name, how) in enumerate(good.items()):
        case = cases[name]["case"]
        path, image = image_of(dataset, case)
        assert path.is_symlink() == (how == "link")
        label = sitk.ReadImage(str(dataset / "labelsTr" / f"{case}.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), mr_array(seed))
        np.testing.assert_allclose(image.GetSpacing(), SPACING, rtol=1e-6)
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(label, get)(), getattr(image, get)(), atol=1e-6)
        mask, body = sitk.GetArrayFromImage(label), mr_array(seed) > 200
        assert mask.dtype == np.uint8
        assert 2 * (mask & body).sum() / (mask.sum() + body.sum()) > 0.97

    summary = json.loads((dataset / "unlabeled" / "summary.json").read_text())
    assert (summary["cases"], summary["left_out"]["duplicate"]) == (len(names), 2)
    assert summary["other_files"] == {".png": 2, ".raw": 1, ".txt": 1}
    assert (dataset / "unlabeled" / "contact_sheet.png").stat().st_size > 10_000
    assert not (dataset / "unlabeled" / "unfinished").exists()


def test_the_same_run_again_changes_nothing(
    mess: Mess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, folder = mess
    monkeypatch.setenv("nnUNet_raw", str(workspace.raw))
    before = snapshot(workspace.raw)
    assert main(arguments(folder)) == 0
    assert snapshot(workspace.raw) == before
    assert f"{len(GOOD) + 2} cases, 0 new" in capsys.readouterr().out


@pytest.mark.slow
def test_stock_commands_take_it(mess: Mess, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = mess[0]
    options = ("-d", 900, "-c", "3d_fullres", "-npfp", 1, "-np", 1, "--verify_dataset_integrity")
    output = workspace.run("nnUNetv2_plan_and_preprocess", *options).stdout
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
    for seed, name in enumerate(("old", "changed", "closed")):
        write(first / f"{name}.nrrd", mr_array(seed))
    assert run(first, np=1) == 0
    before, cases = snapshot(dataset / "labelsTr"), table(dataset)

    write(second / "new.nii.gz", mr_array(5))
    write(second / "known.nii.gz", mr_array(0))
    write(first / "changed.nrrd", mr_array(4))
    (first / "old.nrrd").rename(first / "moved.nrrd")
    (first / "closed.nrrd").unlink()
    (first / "closed.nrrd").symlink_to("nowhere")
    assert run(first, second, np=2) == 0
    after, found = snapshot(dataset / "labelsTr"), table(dataset)
    names = ("moved.nrrd", "changed.nrrd", "closed.nrrd", "new.nii.gz")
    assert found.keys() == set(names)
    assert found["closed.nrrd"] == cases["closed.nrrd"], "what is out of reach for now stays"
    assert found["moved.nrrd"] == cases["old.nrrd"] | {"source": str(first / "moved.nrrd")}
    assert after.keys() == {f"{found[name]['case']}.nrrd" for name in names}
    label = f"{found['closed.nrrd']['case']}.nrrd"
    assert after[label] == before[label]
    (row,) = table(dataset, "skipped.csv").values()
    assert (row["source"], row["reason"]) == (str(second / "known.nii.gz"), "duplicate")
    assert json.loads((dataset / "unlabeled" / "summary.json").read_text())["sources_missing"] == 1
    assert description(dataset)["numTraining"] == 4


@pytest.mark.slow
def test_a_folder_that_was_moved_is_followed(run: Run, tmp_path: Path, dataset: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    scans = ("header.mhd", "link.mha", "converted.nrrd")
    for seed, name in enumerate(scans):
        write(old / name, mr_array(seed))
    assert run(old, np=1, file_ending=".mha") == 0
    before = contents(dataset / "labelsTr")
    old.rename(new)
    assert run(new, np=1) == 0
    cases = table(dataset)
    for seed, name in enumerate(scans):
        _, image = image_of(dataset, cases[name]["case"])
        assert np.array_equal(sitk.GetArrayFromImage(image), mr_array(seed)), name
    assert contents(dataset / "labelsTr") == before


# --- input


def test_one_case_works_and_says_what_that_means(
    run: Run, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run before, with the wrong modality, found nothing and does not bind this one."""
    scan = write(tmp_path / "scans" / "only.mhd", ct_array(1))
    assert run(scan.parent, np=1, modality="MR") == 1
    assert "No scan could be used" in capsys.readouterr().err
    assert run(scan.parent, np=1) == 0
    output = capsys.readouterr().out
    for part in ("taken for CT", "1 case, 1 new", "both of its sub-volumes", "fold 'all'"):
        assert part in output
    assert description(dataset)["channel_names"] == {"0": "CT"}
    assert table(dataset)["only.mhd"]["image"] == "header that points to the data"
    assert run(scan.parent, modality="MR") == 2
    assert "was begun with CT" in capsys.readouterr().err
    assert run(dataset / "imagesTr") == 2
    assert "lies in the dataset" in capsys.readouterr().err


def other(folder: str) -> Callable[[Path], None]:
    return lambda root: (root / folder / "imagesTr").mkdir(parents=True)


def two_kinds(root: Path) -> None:
    write(root / "scans" / "mr.nii.gz", mr_array(1))
    write(root / "scans" / "ct.nii.gz", ct_array(1))


OTHER = "Dataset900_Other"
WRONG: dict[str, Any] = {
    "no nnUNet_raw": ({}, lambda _: os.environ.pop("nnUNet_raw"), "nnUNet_raw is not set"),
    "empty folder": ({}, None, "no files at all"),
    "pictures": (
        {},
        lambda root: [(root / "scans" / f"{n}.png").touch() for n in range(3)],
        "3 .png.*Pictures in 2D are no scans",
    ),
    "two modalities": ({}, two_kinds, "Mixed modalities.*1 like CT.*ct.nii.gz; 1.*--modality"),
    "id of another": ({}, other(f"prep/{OTHER}"), f"taken: nnUNet_preprocessed has {OTHER}"),
    "same name, not ours": ({}, other("raw/Dataset900_Scans"), "did not make it"),
    "folder not there": ({"i": "gone"}, None, "is not there"),
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
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "prep"))
    if make is not None:
        make(tmp_path)
    before = snapshot(tmp_path)
    folder = tmp_path / options.get("i", "scans")
    assert run(folder, **{key: value for key, value in options.items() if key != "i"}) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, error), error
    assert snapshot(tmp_path) == before, "nothing was written"


# --- parts


def test_parts_make_the_dataset_of_one_run(
    mess: Mess, run: Run, dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Three jobs of an array, one of which is killed and started again."""
    folder = mess[1]
    kept = Part.keep

    def part(number: int) -> int:
        words = [
            *arguments(folder, np=1, modality="MR"),
            "-num_parts",
            "3",
            "-part_id",
            str(number),
        ]
        return main(words)

    def killed(self: Part, index: int, prepared: Any) -> None:
        kept(self, index, prepared)
        if len(list(self._entries(self.number))) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Part, "keep", killed)
        assert part(1) == 130
    for number in (2, 0):
        assert part(number) == 0
        assert not (dataset / "dataset.json").exists()
    assert "Part 0 of 3 is done (6 sources); 1 are not." in capsys.readouterr().out
    assert part(1) == 0
    whole = mess[0].raw / "Dataset900_Scans"
    for name in ("imagesTr", "labelsTr"):
        assert sorted(os.listdir(dataset / name)) == sorted(os.listdir(whole / name))
    for name in ("dataset.json", "unlabeled/cases.csv", "unlabeled/skipped.csv"):
        assert (dataset / name).read_text() == (whole / name).read_text()
    assert not (dataset / "unlabeled" / "parts").exists()
    # Nothing is left to do; a whole run finds all of it, too.
    before = snapshot(dataset)
    assert [part(number) for number in range(3)] == [0, 0, 0]
    assert run(folder, np=1, modality="MR") == 0
    assert {x: y for x, y in snapshot(dataset).items() if "parts" not in str(x)} == before
    assert part(3) == 2
