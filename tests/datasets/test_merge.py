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
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.images import read_geometry

from conftest import Stunet
from dataset_helpers import read_array, write_array, write_dataset
from unlabeled_helpers import snapshot

MERGE = "merge-datasets -d 20"
MERGED = "Dataset020_Merged"
CLASSES = " --classes liver spleen"
TWO = f"{MERGE} 1 2{CLASSES}"
LIVER_SPLEEN = {"background": 0, "liver": 1, "spleen": 2}
SPLEEN_LIVER = {"background": 0, "spleen": 1, "liver": 2}


def splits_of(raw: Path) -> list[dict[str, list[str]]]:
    return json.loads((raw / MERGED / "splits_final.json").read_text())


def test_two_datasets_become_one_that_nnunet_plans(raw: Path, stunet: Stunet) -> None:
    before = snapshot(raw)
    told = stunet(f"{MERGE} 1 Dataset002_B{CLASSES}")
    assert "Dataset002_B: 3 cases\n  does not annotate: spleen" in told
    assert "Note: nnU-Net counts ignored voxels as foreground" in told
    merged = raw / MERGED
    assert read_json(merged / "dataset.json")["labels"] == {**LIVER_SPLEEN, "ignore": 3}
    names = [*(f"001_A_case{n}" for n in range(4)), *(f"002_B_case{n}" for n in range(3))]
    found = sorted(path.name for path in (merged / "labelsTr").iterdir())
    assert found == [f"{name}.nii.gz" for name in names]
    # A's labels are as they were: links. B's are new files in the same place.
    own = merged / "labelsTr" / "001_A_case1.nii.gz"
    assert os.readlink(own) == str(raw / "Dataset001_A" / "labelsTr" / "case1.nii.gz")
    new, old = merged / "labelsTr/002_B_case2.nii.gz", raw / "Dataset002_B/labelsTr/case2.nii.gz"
    assert np.array_equal(read_array(new), np.array([3, 3, 1])[read_array(old)])
    assert read_geometry(new).agrees(read_geometry(old))
    assert (merged / "imagesTr" / "002_B_case0_0000.nii.gz").is_symlink()
    after = snapshot(raw)
    assert {x: y for x, y in after.items() if not x.startswith(MERGED)} == before
    record = read_json(merged / "merged_from.json")
    becomes = {"background": "ignore", "stomach": "ignore", "liver": "liver"}
    assert record["datasets"][1]["labels"] == becomes
    splits = splits_of(raw)
    fold = next(fold for fold, split in enumerate(splits) if "001_A_case0" in split["val"])
    entry = record["datasets"][0]["cases"]["001_A_case0"]
    assert entry == {"case": "case0", "validated_in_fold": fold}
    # nnU-Net's planners begin with this; a fingerprint must be there.
    planned = raw.parent / "nnUNet_preprocessed" / MERGED
    planned.mkdir()
    (planned / "dataset_fingerprint.json").write_text("{}")
    ExperimentPlanner(20)
    assert json.loads((planned / "splits_final.json").read_text()) == splits
    assert "Already there" in stunet(TWO)


def test_training_only_copies_and_own_splits(raw: Path, stunet: Stunet) -> None:
    c = write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 5)
    vals = [[f"case{number}"] for number in (3, 1, 4, 0, 2)]
    (c / "splits_final.json").write_text(json.dumps([{"train": [], "val": val} for val in vals]))
    (raw / "Dataset002_B" / "pseudo_labels.json").write_text("{}")
    # What label 1 means in B is said here; in FLARE22 it is the liver, and 2 the right kidney.
    told = stunet(f"{MERGE} 1 3 2=FLARE22 --train-only 2 --copy{CLASSES}")
    assert "its own folds are kept" in told
    assert not any(path.is_symlink() for path in (raw / MERGED).rglob("*"))
    # Self-training tells its target by it.
    assert read_json(raw / MERGED / "dataset.json")["pseudo_labelled"] == ["002_B_"]
    splits = splits_of(raw)
    assert all(f"002_B_case{n}" in split["train"] for split in splits for n in range(3))
    own = [x for split in splits for x in split["val"] if "003_C" in x]
    assert own == [f"003_C_{val[0]}" for val in vals]
    assert {len(split["val"]) for split in splits} == {1, 2}
    old = read_array(raw / "Dataset002_B" / "labelsTr" / "case0.nii.gz")
    new = read_array(raw / MERGED / "labelsTr" / "002_B_case0.nii.gz")
    assert np.array_equal(new, np.array([0, 1, 0])[old])


def test_a_full_disk_and_damaged_cases_leave_what_is_finished(
    raw: Path, monkeypatch: pytest.MonkeyPatch, stunet: Stunet
) -> None:
    label = raw / "Dataset002_B" / "labelsTr" / "case1.nii.gz"
    content = label.read_bytes()
    label.write_bytes(content[:50])
    assert "case1.nii.gz: cut off or damaged" in stunet(TWO, code=2)
    label.write_bytes(content)

    def cut(self: Any, labels: np.ndarray, file: str, properties: Any) -> None:
        # As ITK does on a full disk: without a word.
        Path(file).write_bytes(content[: len(content) // 2])

    with monkeypatch.context() as full:
        full.setattr(SimpleITKIO, "write_seg", cut)
        assert "could not be written whole" in stunet(TWO, code=2)
    finished = (raw / ".unfinished_Dataset020_Merged" / "labelsTr").glob("*002_B*")
    assert {path.name for path in finished} == {"002_B_case0.nii.gz", "002_B_case2.nii.gz"}
    stunet(TWO)
    files = ["dataset.json", "imagesTr", "labelsTr", "merged_from.json", "splits_final.json"]
    assert sorted(path.name for path in (raw / MERGED).iterdir()) == files


def test_labels_that_are_almost_whole_numbers_are_written_as_such(
    raw: Path, stunet: Stunet
) -> None:
    """nnU-Net would cut 0.9999 to 0."""
    label = write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 2) / "labelsTr" / "case0.nii.gz"
    expected = read_array(label)
    floats = np.where(expected > 0, expected - 1e-4, 0).astype(np.float32)
    write_array(label, floats, (0, 5, -3))
    told = stunet(f"{MERGE} 1 3 --train-only 1")
    assert "fold 'all'" in told, "one case to validate on"
    new = raw / MERGED / "labelsTr" / "003_C_case0.nii.gz"
    assert np.array_equal(read_array(new), expected)


def test_no_fold_trains_on_a_copy_of_what_it_validates(raw: Path, stunet: Stunet) -> None:
    shutil.copytree(write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 6), raw / "Dataset004_D")
    assert "12 cases have the same image" in stunet(f"{MERGE} 3 4")
    for fold in splits_of(raw):
        validated = {name.rpartition("_")[2] for name in fold["val"]}
        assert validated.isdisjoint(name.rpartition("_")[2] for name in fold["train"])


@pytest.mark.parametrize(
    ("file", "make", "message"),
    [
        ("labelsTr/case1", lambda x: np.where(x == 2, 7, x), "undeclared label values (7 ("),
        ("labelsTr/case1", lambda x: x[:5], "not of its image's size"),
        ("labelsTr/case1", lambda x: x, "not on the voxels of its image"),
        ("imagesTr/case1_0000", lambda x: np.where(x == x.max(), np.nan, x), "1 of 990 voxels"),
    ],
)
def test_files_that_are_refused(
    raw: Path, stunet: Stunet, file: str, make: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    path = write_dataset(raw / "Dataset003_C", LIVER_SPLEEN, 2) / f"{file}.nii.gz"
    write_array(path, make(read_array(path)))
    told = stunet(f"{MERGE} 1 3", code=2)
    assert message in told
    assert str(path) in told
    assert not (raw / MERGED).exists()


def test_spacing_of_tif_travels(raw: Path, stunet: Stunet) -> None:
    spacing = {"spacing": [3, 2, 1]}
    for name, labels in (("Dataset003_C", LIVER_SPLEEN), ("Dataset004_D", SPLEEN_LIVER)):
        for file in write_dataset(raw / name, labels, 2, ending=".tif").glob("*Tr/*.tif"):
            stem = file.stem.removesuffix("_0000")
            file.with_name(f"{stem}.json").write_text(json.dumps(spacing))
    stunet(f"{MERGE} 3 4")
    names = [f"{dataset}_case{case}" for dataset in ("003_C", "004_D") for case in range(2)]
    for part in ("imagesTr", "labelsTr"):
        found = {x.stem: read_json(x) for x in (raw / MERGED / part).glob("*.json")}
        assert found == dict.fromkeys(names, spacing)
    assert not list((raw / MERGED).rglob(".partial*"))


def test_two_cases_of_one_new_name_are_refused(raw: Path, stunet: Stunet) -> None:
    other = (raw / "Dataset001_A").rename(raw.parent / "Dataset001_A")
    for file in other.glob("*Tr/case0*"):
        file.rename(file.with_name(f"b_{file.name}"))
    same = write_dataset(raw / "Dataset001_A_b", LIVER_SPLEEN, 1)
    assert "2 cases would be called 001_A_b_case0" in stunet.refuse(MERGE, other, same)


def test_refusals(raw: Path, stunet: Stunet) -> None:
    write_dataset(raw / "Dataset003_C", {"liver": 1}, 1, channel="T1")
    write_dataset(raw / "Dataset004_D", {"whole": [1, 2], "core": 2}, 1, regions_class_order=[1, 2])
    write_dataset(raw / "Dataset005_E", LIVER_SPLEEN, 1, ending=".nrrd")
    write_dataset(raw / "Dataset006_F", {"heart": 1}, 1)
    write_dataset(raw / "Dataset007_G", LIVER_SPLEEN, 1, channel_names={"CT": 0})
    files = {"images": ["imagesTr/case0_0000.nii.gz"] * 2, "label": "labelsTr/case0.nii.gz"}
    two = {"channel_names": {"0": "CT", "1": "PET"}, "dataset": {"a": files}}
    write_dataset(raw / "Dataset008_H", LIVER_SPLEEN, 1, **two)
    for words, message in (
        ("1", "at least two"),
        ("1 2 -d 2", "-d 2 is taken"),
        ("1 2 -n a/b", "-n must be"),
        ("1 2 -d 1000", "from 1 to 999"),
        ("1 2 --train-only 7", "--train-only 7"),
        ("1 2 --not-shown 1", "DATASET=CLASS"),
        ("1 2", "Each dataset lacks a class (Dataset001_A: stomach; Dataset002_B: spleen)"),
        (f"1 2{CLASSES} --not-shown 1=heart", "'heart' is none of liver, spleen"),
        ("1 3", "--channel-names"),
        ("1 3 --channel-names a b", "must name 1 channel(s), not 2"),
        ("1 4", "has regions"),
        ("1 5", "differ in their file ending"),
        ("1 6 --classes liver", "Dataset006_F annotates none"),
        ("1 7", "wrong way round"),
        ("1 8", "differ in their number of channels: Dataset001_A has 1, Dataset008_H has 2"),
    ):
        assert message in stunet.refuse(MERGE, words), words
    stunet(f"{MERGE} 1 3 --channel-names CT --not-shown 3=spleen")
