"""`stunet merge-datasets`: names, links, folds, interrupted runs, inputs that are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage import io

from stunet_plugin.cli import main
from stunet_plugin.datasets import merge

from dataset_helpers import read_array, write_array, write_dataset
from unlabeled_helpers import snapshot

Refused = Callable[..., str]
TWO = ["merge-datasets", "1", "2", "-d", "20", "--classes", "liver", "spleen"]
SAME = ["merge-datasets", "1", "3", "-d", "20"]
LIVER_SPLEEN = {"background": 0, "liver": 1, "spleen": 2}


def change_description(folder: Path, **entries: Any) -> None:
    file = folder / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_two_datasets_become_one_that_nnunet_plans(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(raw)
    assert main([*TWO[:2], "Dataset002_B", *TWO[3:]]) == 0
    told = capsys.readouterr().out
    assert "Dataset002_B (Dataset002_B): 3 cases\n  does not annotate: spleen" in told
    assert "Note: nnU-Net counts ignored voxels as foreground" in told
    merged = raw / "Dataset020_Merged"
    description = json.loads((merged / "dataset.json").read_text())
    assert description["labels"] == {**LIVER_SPLEEN, "ignore": 3}
    names = [*(f"001_A_case{n}" for n in range(4)), *(f"002_B_case{n}" for n in range(3))]
    found = sorted(path.name for path in (merged / "labelsTr").iterdir())
    assert found == [f"{name}.nii.gz" for name in names]
    # A's labels are as they were: links. B's are new files in the same place.
    own = merged / "labelsTr" / "001_A_case1.nii.gz"
    assert os.readlink(own) == str(raw / "Dataset001_A" / "labelsTr" / "case1.nii.gz")
    new, old = merged / "labelsTr/002_B_case2.nii.gz", raw / "Dataset002_B/labelsTr/case2.nii.gz"
    assert np.array_equal(read_array(new), np.array([3, 3, 1])[read_array(old)])
    one, other = sitk.ReadImage(str(new)), sitk.ReadImage(str(old))
    assert one.GetOrigin() == pytest.approx(other.GetOrigin())
    assert one.GetSpacing() == pytest.approx(other.GetSpacing())
    assert (merged / "imagesTr" / "002_B_case0_0000.nii.gz").is_symlink()
    after = snapshot(raw)
    assert {x: y for x, y in after.items() if not x.startswith("Dataset020")} == before

    record = json.loads((merged / "merged_from.json").read_text())
    becomes = {"background": "ignore", "stomach": "ignore", "liver": "liver"}
    assert record["datasets"][1]["labels"] == becomes
    splits = json.loads((merged / "splits_final.json").read_text())
    fold = next(fold for fold, split in enumerate(splits) if "001_A_case0" in split["val"])
    entry = record["datasets"][0]["cases"]["001_A_case0"]
    assert entry == {"case": "case0", "validated_in_fold": fold}
    # nnU-Net's planners begin with this; a fingerprint must be there.
    planned = raw.parent / "nnUNet_preprocessed" / "Dataset020_Merged"
    planned.mkdir()
    (planned / "dataset_fingerprint.json").write_text("{}")
    ExperimentPlanner(20)
    assert json.loads((planned / "splits_final.json").read_text()) == splits
    # The same command again does nothing, another one is refused.
    assert main([*TWO[:2], "Dataset002_B", *TWO[3:]]) == 0
    assert "Already there" in capsys.readouterr().out
    assert main([*TWO, "--copy"]) == 2
    assert "-d 20 is taken" in capsys.readouterr().err


def test_training_only_copies_and_own_splits(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 5)
    vals = [[f"case{number}"] for number in (3, 1, 4, 0, 2)]
    (c / "splits_final.json").write_text(json.dumps([{"train": [], "val": val} for val in vals]))
    # What label 1 means in B is said here; in FLARE22 it is the liver, and 2 the right kidney.
    given = ["1", "3", "2=FLARE22", "-d", "20", "--train-only", "2", "--copy", *TWO[5:]]
    assert main(["merge-datasets", *given]) == 0
    assert "its own folds are kept" in capsys.readouterr().out
    merged = raw / "Dataset020_Merged"
    assert not any(path.is_symlink() for path in merged.rglob("*"))
    splits = json.loads((merged / "splits_final.json").read_text())
    assert all(f"002_B_case{n}" in split["train"] for split in splits for n in range(3))
    assert [x for split in splits for x in split["val"] if "003_C" in x] == [
        f"003_C_{val[0]}" for val in vals
    ]
    assert {len(split["val"]) for split in splits} == {1, 2}
    old = read_array(raw / "Dataset002_B" / "labelsTr" / "case0.nii.gz")
    new = read_array(merged / "labelsTr" / "002_B_case0.nii.gz")
    assert np.array_equal(new, np.array([0, 1, 0])[old])


def test_interrupted_and_resumed(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, written = merge.write_labels, []

    def interrupted(reader: Any, labels: np.ndarray, properties: Any, target: Path) -> None:
        written.append(target.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(reader, labels, properties, target)

    monkeypatch.setattr(merge, "write_labels", interrupted)
    assert main(TWO) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(raw / ".unfinished_Dataset020_Merged") in last
    assert not (raw / "Dataset020_Merged").exists()
    assert main([*TWO, "--copy"]) == 2
    assert "other input or options (copy)" in capsys.readouterr().err
    assert main(TWO) == 0
    # One before the interruption, the other two after it; A's are links.
    assert written == [f"002_B_case{number}.nii.gz" for number in (0, 1, 1, 2)]
    files = ["dataset.json", "imagesTr", "labelsTr", "merged_from.json", "splits_final.json"]
    assert sorted(path.name for path in (raw / "Dataset020_Merged").iterdir()) == files
    assert not list((raw / "Dataset020_Merged").rglob(".*"))


def test_a_full_disk_and_damaged_cases_leave_what_is_finished(
    raw: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    label = raw / "Dataset002_B" / "labelsTr" / "case1.nii.gz"
    content = label.read_bytes()
    label.write_bytes(content[:50])
    assert "case1.nii.gz: cut off or damaged" in refused(*TWO)
    label.write_bytes(content)

    def cut(self: Any, labels: np.ndarray, file: str, properties: Any) -> None:
        # As ITK does on a full disk: without a word.
        Path(file).write_bytes(content[: len(content) // 2])

    with monkeypatch.context() as full:
        full.setattr(SimpleITKIO, "write_seg", cut)
        assert "could not be written whole" in refused(*TWO)
    finished = (raw / ".unfinished_Dataset020_Merged" / "labelsTr").glob("*002_B*")
    assert {path.name for path in finished} == {"002_B_case0.nii.gz", "002_B_case2.nii.gz"}
    assert main(TWO) == 0


def test_labels_that_are_almost_whole_numbers_are_written_as_such(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnU-Net would cut 0.9999 to 0."""
    label = write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 2) / "labelsTr" / "case0.nii.gz"
    expected = read_array(label)
    write_array(label, np.where(expected > 0, expected - 1e-4, 0).astype(np.float32))
    assert main(SAME) == 0
    assert "rounded" in capsys.readouterr().out
    new = raw / "Dataset020_Merged" / "labelsTr" / "003_C_case0.nii.gz"
    assert not new.is_symlink()
    assert np.array_equal(read_array(new), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda labels: np.where(labels == 2, 7, labels), "undeclared label values (7 ("),
        (lambda labels: labels + np.float32(0.3), "not a label map"),
        (lambda labels: np.stack([labels, labels], -1), "several values per voxel"),
        (lambda labels: np.stack([labels, labels]), "more than three axes"),
        (lambda labels: labels[:5], "not of its image's size"),
    ],
    ids=["undeclared", "halves", "components", "volumes", "size"],
)
def test_label_maps_that_are_refused(
    raw: Path, refused: Refused, make: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    label = write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 2) / "labelsTr" / "case1.nii.gz"
    array = make(read_array(label))
    write_array(label, array, isVector=array.shape[-1] == 2)
    told = refused(*SAME)
    assert message in told
    assert str(label) in told
    assert not (raw / "Dataset020_Merged").exists()


def test_images_that_are_not_finite_are_refused(raw: Path, refused: Refused) -> None:
    image = write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 2) / "imagesTr/case1_0000.nii.gz"
    array = read_array(image)
    array[0, 0, 0] = np.nan
    write_array(image, array)
    assert "1 of 990 voxels are NaN" in refused(*SAME)


@pytest.mark.parametrize("copy", [[], ["--copy"]])
def test_spacing_of_tif_travels(raw: Path, copy: list[str]) -> None:
    shutil.rmtree(raw / "Dataset002_B")
    for folder in (raw / "Dataset001_A", write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 2)):
        for file in folder.glob("*Tr/*.nii.gz"):
            tifffile.imwrite(file.with_name(file.name.replace(".nii.gz", ".tif")), read_array(file))
            file.unlink()
            name = file.name.replace("_0000.nii.gz", "").replace(".nii.gz", "")
            file.with_name(f"{name}.json").write_text('{"spacing": [3, 2, 1]}')
        labels = {"background": 0, "spleen": 1, "liver": 2} if "C" in folder.name else LIVER_SPLEEN
        change_description(folder, file_ending=".tif", labels=labels)
    assert main([*SAME, *copy]) == 0
    merged = raw / "Dataset020_Merged"
    names = {
        f"{part}_case{n}" for part, count in (("001_A", 4), ("003_C", 2)) for n in range(count)
    }
    for part in ("imagesTr", "labelsTr"):
        spacings = {x.stem: json.loads(x.read_text()) for x in (merged / part).glob("*.json")}
        assert spacings == {name: {"spacing": [3, 2, 1]} for name in names}
    assert not list(merged.rglob(".partial*"))


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_voxels_of_detached_headers_travel(raw: Path, ending: str) -> None:
    more = {"ending": ending, "overwrite_image_reader_writer": "SimpleITKIO"}
    write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 2, **more)
    write_dataset(raw / "Dataset004_D", {"background": 0, "spleen": 1, "liver": 2}, 2, **more)
    assert main(["merge-datasets", "3", "4", "-d", "20"]) == 0
    shutil.move(raw / "Dataset020_Merged", raw.parent / "moved")
    for part, name in (("imagesTr", "003_C_case1_0000"), ("labelsTr", "004_D_case0")):
        folder, case = raw / f"Dataset{name[:5]}" / part, name[6:]
        old, new = read_array(folder / f"{case}{ending}"), raw.parent / "moved" / part / name
        expected = np.array([0, 2, 1])[old] if part == "labelsTr" else old
        assert np.array_equal(read_array(new.with_name(f"{name}{ending}")), expected)


def test_pictures_in_colours(raw: Path, refused: Refused) -> None:
    """One file per case with three channels, as nnU-Net reads them."""
    labels = {"background": 0, "vessel": 1}
    for number in (3, 4):
        folder = raw / f"Dataset{number:03d}_P"
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        for case in range(3):
            picture = np.random.default_rng(case).integers(0, 255, (16, 16, 3)).astype(np.uint8)
            io.imsave(folder / f"imagesTr/r{case}_0000.png", picture, check_contrast=False)
            mask = (picture[..., 0] > 99).astype(np.uint8)
            io.imsave(folder / f"labelsTr/r{case}.png", mask, check_contrast=False)
        content = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": labels}
        (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".png"}))
    assert main(["merge-datasets", "3", "4", "-d", "20"]) == 0
    merged = raw / "Dataset020_Merged"
    assert len(list((merged / "imagesTr").iterdir())) == 6
    io.imsave(folder / "labelsTr/r0.png", 255 * mask, check_contrast=False)
    assert "undeclared label values (255" in refused("merge-datasets", "3", "4", "-d", "21")
    io.imsave(folder / "labelsTr/r0.png", picture, check_contrast=False)
    assert "colours" in refused("merge-datasets", "3", "4", "-d", "22")


def test_fewer_cases_than_folds(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 2)
    assert main([*SAME, "--train-only", "1"]) == 0
    told = capsys.readouterr().out
    assert "fold 'all'" in told
    assert "splits_final" not in told


def test_refusals(raw: Path, refused: Refused) -> None:
    def wrong(*words: str) -> str:
        told = refused("merge-datasets", *words)
        assert not list(raw.glob("*020_*")) + list(raw.glob(".unfinished*"))
        return told

    into = ("-d", "20")
    assert "at least two" in wrong("1", *into)
    assert "given twice" in wrong("1", "1", *into)
    assert "-d 2 is taken" in wrong("1", "2", "-d", "2")
    assert "-n may hold" in wrong("1", "2", *into, "-n", "a/b")
    assert "from 1 to 999" in wrong("1", "2", "-d", "1000")
    assert "Expected one Dataset009_*" in wrong("1", "9", *into)
    assert "--train-only 7" in wrong("1", "2", *into, "--train-only", "7")
    assert "DATASET=CLASS" in wrong("1", "2", *into, "--not-shown", "1")
    told = wrong("1", "2", *into)
    assert "Each dataset lacks a class (Dataset001_A: stomach; Dataset002_B: spleen)" in told
    more = ("--classes", "liver", "spleen", "--not-shown", "1=heart")
    assert "'heart' is none of the classes liver, spleen" in wrong("1", "2", *into, *more)
    assert "2=Nothing" in wrong("1", "2=Nothing", *into) or "neither" in wrong(
        "1", "2=Nothing", *into
    )
    write_dataset(raw / "Dataset003_C", {"background": 0, "liver": 1}, 1, channel="T1")
    assert "--channel-names" in wrong("1", "3", *into)
    assert "names 2 channel(s)" in wrong("1", "3", *into, "--channel-names", "a", "b")
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    write_dataset(raw / "Dataset004_D", regions, 1, regions_class_order=[1, 2])
    assert "has regions" in wrong("1", "4", *into)
    write_dataset(raw / "Dataset006_F", {"background": 0, "heart": 1}, 1)
    assert "Dataset006_F annotates none" in wrong("1", "6", *into, "--classes", "liver")
    write_dataset(raw / "Dataset005_E", LIVER_SPLEEN, 1, ending=".nrrd")
    assert "differ in their file ending" in wrong("1", "5", *into)
    change_description(raw / "Dataset006_F", channel_names={"CT": 0})
    assert "wrong way round" in wrong("1", "6", *into)
    more = ("--channel-names", "CT", "--not-shown", "3=spleen")
    assert main(["merge-datasets", "1", "3", *into, *more]) == 0
