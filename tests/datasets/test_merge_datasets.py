"""`stunet merge-datasets`: what becomes ignore and why, folds, names, links, interrupted runs,
refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from stunet_plugin.cli import main
from stunet_plugin.datasets import merge
from stunet_plugin.datasets.folds import balanced_folds
from stunet_plugin.datasets.label_systems import LabelSystem
from stunet_plugin.datasets.label_union import all_classes, joint_system, map_to_union
from stunet_plugin.errors import PluginError

from unlabeled_helpers import snapshot


def system(name: str, *classes: str, **more: Any) -> LabelSystem:
    labels = {"background": 0, **{one: value for value, one in enumerate(classes, 1)}}
    return LabelSystem.from_table({"labels": labels, **more}, name)


def joined(
    *systems: LabelSystem,
    classes: list[str] | None = None,
    not_shown: dict[int, set[str]] | None = None,
) -> list[dict]:
    """What the classes of each system become."""
    absent = [(not_shown or {}).get(number, set()) for number in range(len(systems))]
    joint = joint_system(systems, classes, absent)
    pairs = zip(systems, absent, strict=True)
    return [map_to_union(one, joint, names, systems).describe(one, joint) for one, names in pairs]


# --- labels


def test_same_classes_in_another_order_and_under_other_names() -> None:
    first, second = system("A", "liver", "Left Kidney"), system("B", "kidney_left", "liver")
    joint = joint_system([first, second], None, [(), ()])
    assert joint.classes == {"liver": (1,), "kidney_left": (2,)}
    assert joint.ignore is None
    table = map_to_union(second, joint, (), [first, second])
    assert table.translate(np.array([0, 1, 2])).tolist() == [0, 2, 1]
    assert map_to_union(first, joint, (), [first, second]).changes_nothing
    assert not table.changes_nothing


def test_the_background_of_a_dataset_that_lacks_a_class_becomes_ignore() -> None:
    first, second = joined(system("A", "liver", "spleen"), system("B", "liver"))
    assert first == {"background": "background", "liver": "liver", "spleen": "spleen"}
    assert second == {"background": "ignore", "liver": "liver"}


def test_a_class_that_is_known_to_be_absent() -> None:
    assert joined(
        system("A", "liver", "prostate"), system("B", "liver"), not_shown={1: {"Prostate"}}
    )[1] == {"background": "background", "liver": "liver"}


def test_a_larger_class_hides_its_part_and_not_the_background() -> None:
    apart, together = (
        system("A", "kidney_left", "kidney_right", "liver"),
        system("B", "kidney", "liver"),
    )
    first, second = joined(apart, together, classes=["kidney_left", "kidney_right", "liver"])
    assert first["background"] == "background"
    assert second == {"background": "background", "kidney": "ignore", "liver": "liver"}
    # The other way round both are the larger class.
    first, second = joined(apart, together, classes=["kidney", "liver"])
    assert first == {
        "background": "background",
        "kidney_left": "kidney",
        "kidney_right": "kidney",
        "liver": "liver",
    }
    assert second == {"background": "background", "kidney": "kidney", "liver": "liver"}
    with pytest.raises(PluginError, match="'kidney.*' and 'kidney.*' overlap in A"):
        joined(apart, together)


def test_half_of_a_class_is_not_the_class() -> None:
    """One kidney annotated: the other one is in the background, so neither can be told."""
    _, second = joined(
        system("A", "kidney", "liver"),
        system("B", "kidney_left", "liver"),
        classes=["kidney", "liver"],
    )
    assert second == {"background": "ignore", "kidney_left": "ignore", "liver": "liver"}


def test_classes_that_are_left_out() -> None:
    first, second = joined(
        system("A", "liver", "spleen"), system("B", "stomach", "spleen"), classes=["spleen"]
    )
    assert first == {"background": "background", "liver": "background", "spleen": "spleen"}
    assert second["stomach"] == "background"
    # With a class that B does not annotate, what is not joint in B may hold it.
    assert joined(
        system("A", "liver", "spleen"),
        system("B", "stomach", "spleen"),
        classes=["spleen", "liver"],
    )[1] == {"background": "ignore", "stomach": "ignore", "spleen": "spleen"}


def test_groups_of_one_system_are_not_classes_of_their_own() -> None:
    grouped = system("A", "lobe_1", "lobe_2", groups={"lung": ["lobe_1", "lobe_2"]})
    assert all_classes([grouped]) == ["lobe_1", "lobe_2"]
    first, second = joined(grouped, system("B", "lung"), classes=["lung"])
    assert first == {"background": "background", "lobe_1": "lung", "lobe_2": "lung"}
    # B's lung hides the lobes: A says that they are parts of it.
    assert joined(grouped, system("B", "lung"), classes=["lobe_1", "lobe_2"])[1] == {
        "background": "background",
        "lung": "ignore",
    }
    assert second == {"background": "background", "lung": "lung"}


def test_an_ignore_label_stays_one() -> None:
    source = LabelSystem.from_table({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "A")
    other = system("B", "liver", "spleen")
    joint = joint_system([source, other], ["liver"], [(), ()])
    assert joint.ignore == 2
    assert map_to_union(source, joint, (), [source, other]).translate(
        np.array([0, 1, 2])
    ).tolist() == [0, 1, 2]


def test_classes_that_nobody_has() -> None:
    with pytest.raises(PluginError, match="No dataset has the class\\(es\\) heart"):
        joined(system("A", "liver"), system("B", "spleen"), classes=["heart", "liver"])


# --- folds


def test_every_dataset_has_its_share_of_every_fold() -> None:
    cases = {
        "A": [f"a{n}" for n in range(13)],
        "B": [f"b{n}" for n in range(7)],
        "C": [f"c{n}" for n in range(4)],
    }
    folds = balanced_folds(cases, ["C"], 0)
    assert len(folds) == 5
    for fold in folds:
        assert set(cases["C"]) <= set(fold["train"])
        assert not set(fold["train"]) & set(fold["val"])
        assert len(fold["train"]) + len(fold["val"]) == 24
        assert 2 <= sum(name in cases["A"] for name in fold["val"]) <= 3
        assert 1 <= sum(name in cases["B"] for name in fold["val"]) <= 2
    assert [len(fold["val"]) for fold in folds] == [4] * 5
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(
        [*cases["A"], *cases["B"]]
    )
    assert folds == balanced_folds(cases, ["C"], 0) != balanced_folds(cases, ["C"], 1)
    assert balanced_folds({"A": ["a", "b"], "B": ["c", "d"]}, [], 0) == []


# --- the command


def write_dataset(
    folder: Path, labels: dict[str, Any], cases: int, channel: str = "CT", **more: Any
) -> Path:
    """Cases of the same names in every dataset; the labels are drawn from all values."""
    rng = np.random.default_rng(len(folder.name))
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    values = sorted(
        {
            value
            for entry in labels.values()
            for value in (entry if isinstance(entry, list) else [entry])
        }
    )
    for number in range(cases):
        for array, file in (
            (rng.normal(size=(9, 10, 11)).astype(np.float32), f"imagesTr/case{number}_0000.nii.gz"),
            (rng.choice(values, (9, 10, 11)).astype(np.uint8), f"labelsTr/case{number}.nii.gz"),
        ):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((1.0, 2.0, 3.0))
            image.SetOrigin((number, 5, -3))
            sitk.WriteImage(image, str(folder / file))
    content = {
        "channel_names": {"0": channel},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two datasets with cases of the same names."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "nnUNet_raw"
    write_dataset(folder / "Dataset001_A", {"background": 0, "liver": 1, "spleen": 2}, 4)
    write_dataset(folder / "Dataset002_B", {"background": 0, "stomach": 1, "liver": 2}, 3)
    return folder


def read(path: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return array


def test_two_datasets_become_one_that_nnunet_plans(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(raw)
    assert (
        main(["merge-datasets", "1", "Dataset002_B", "-d", "20", "--classes", "liver", "spleen"])
        == 0
    )
    told = capsys.readouterr().out
    assert "Dataset002_B (Dataset002_B): 3 cases\n  does not annotate: spleen" in told
    assert "Note: nnU-Net counts ignored voxels as foreground" in told
    merged = raw / "Dataset020_Merged"
    description = json.loads((merged / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    names = [*(f"001_A_case{n}" for n in range(4)), *(f"002_B_case{n}" for n in range(3))]
    assert sorted(path.name for path in (merged / "labelsTr").iterdir()) == [
        f"{name}.nii.gz" for name in names
    ]
    # A's labels are as they were: links. B's are new files in the same place.
    own = merged / "labelsTr" / "001_A_case1.nii.gz"
    assert os.readlink(own) == str(raw / "Dataset001_A" / "labelsTr" / "case1.nii.gz")
    new, old = (
        merged / "labelsTr" / "002_B_case2.nii.gz",
        raw / "Dataset002_B" / "labelsTr" / "case2.nii.gz",
    )
    assert np.array_equal(read(new), np.array([3, 3, 1])[read(old)])
    for measure in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(sitk.ReadImage(str(new)), measure)() == pytest.approx(
            getattr(sitk.ReadImage(str(old)), measure)()
        )
    assert (merged / "imagesTr" / "002_B_case0_0000.nii.gz").is_symlink()
    assert {
        name: entry for name, entry in snapshot(raw).items() if not name.startswith("Dataset020")
    } == before

    record = json.loads((merged / "merged_from.json").read_text())
    assert record["datasets"][1]["labels"] == {
        "background": "ignore",
        "stomach": "ignore",
        "liver": "liver",
    }
    splits = json.loads((merged / "splits_final.json").read_text())
    # nnU-Net's planners begin with this; a fingerprint must be there.
    planned = raw.parent / "nnUNet_preprocessed" / "Dataset020_Merged"
    planned.mkdir()
    (planned / "dataset_fingerprint.json").write_text("{}")
    ExperimentPlanner(20)
    assert json.loads((planned / "splits_final.json").read_text()) == splits
    assert record["datasets"][0]["cases"]["001_A_case0"] == {
        "case": "case0",
        "validated_in_fold": next(
            fold for fold, split in enumerate(splits) if "001_A_case0" in split["val"]
        ),
    }


def test_training_only_and_copies(raw: Path) -> None:
    write_dataset(raw / "Dataset003_C", {"background": 0, "liver": 1, "spleen": 2}, 4)
    given = [
        "merge-datasets",
        "1",
        "3",
        "2=FLARE22",
        "-d",
        "20",
        "--train-only",
        "2",
        "--copy",
        "--classes",
        "liver",
        "spleen",
    ]
    # What label 1 means in B is said here; in FLARE22 it is the liver, and 2 the right kidney.
    assert main(given) == 0
    merged = raw / "Dataset020_Merged"
    assert not any(path.is_symlink() for path in merged.rglob("*"))
    splits = json.loads((merged / "splits_final.json").read_text())
    assert all(f"002_B_case{n}" in split["train"] for split in splits for n in range(3))
    assert {len(split["val"]) for split in splits} == {1, 2}
    old = read(raw / "Dataset002_B" / "labelsTr" / "case0.nii.gz")
    assert np.array_equal(
        read(merged / "labelsTr" / "002_B_case0.nii.gz"), np.array([0, 1, 0])[old]
    )


def test_interrupted_and_continued(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, written = merge.write_labels, []

    def interrupted(reader: Any, labels: np.ndarray, properties: Any, target: Path) -> None:
        if len(written) == 1:
            written.append("")
            raise KeyboardInterrupt
        written.append(target.name)
        write(reader, labels, properties, target)

    monkeypatch.setattr(merge, "write_labels", interrupted)
    given = ["merge-datasets", "1", "2", "-d", "20", "--classes", "liver", "spleen"]
    assert main(given) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    unfinished = raw / ".unfinished_Dataset020_Merged"
    assert (
        last
        == f"Interrupted. What is finished is in {unfinished}. The same command resumes where it"
        " stopped."
    )
    assert not (raw / "Dataset020_Merged").exists()
    assert main([*given, "--copy"]) == 2
    assert "other input or options (copy)" in capsys.readouterr().err
    assert main(given) == 0
    merged = raw / "Dataset020_Merged"
    # One before the interruption, the other two after it; A's are links.
    assert written == ["002_B_case0.nii.gz", "", "002_B_case1.nii.gz", "002_B_case2.nii.gz"]
    assert sorted(path.name for path in merged.iterdir()) == [
        "dataset.json",
        "imagesTr",
        "labelsTr",
        "merged_from.json",
        "splits_final.json",
    ]
    assert not list(merged.rglob(".*"))


def test_a_label_that_is_not_declared_stops_the_merge(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "Dataset002_B" / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "liver": 1},
                "file_ending": ".nii.gz",
            }
        )
    )
    assert main(["merge-datasets", "1", "2", "-d", "20"]) == 2
    assert "case0.nii.gz: undeclared label values (2 (" in capsys.readouterr().err
    assert not (raw / "Dataset020_Merged").exists()


def test_a_damaged_or_full_disk_leaves_what_is_finished(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["merge-datasets", "1", "2", "-d", "20", "--classes", "liver", "spleen"]
    label = raw / "Dataset002_B" / "labelsTr" / "case1.nii.gz"
    content = label.read_bytes()
    label.write_bytes(content[:50])
    assert main(given) == 2
    assert "case1.nii.gz: cut off or damaged" in capsys.readouterr().err
    label.write_bytes(content)

    def cut(self: Any, labels: np.ndarray, file: str, properties: Any) -> None:
        # As ITK does on a full disk: without a word.
        Path(file).write_bytes(content[: len(content) // 2])

    with monkeypatch.context() as full:
        full.setattr(SimpleITKIO, "write_seg", cut)
        assert main(given) == 2
        assert "could not be written whole" in capsys.readouterr().err
    unfinished = raw / ".unfinished_Dataset020_Merged"
    finished = {path.name for path in (unfinished / "labelsTr").glob("*002_B*")}
    assert finished == {"002_B_case0.nii.gz", "002_B_case2.nii.gz"}
    assert main(given) == 0


def test_refusals(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["merge-datasets", *arguments]) == 2
        assert not list(raw.glob("*020_*")) + list(raw.glob(".unfinished*"))
        return capsys.readouterr().err

    assert "at least two" in refused("1", "-d", "20")
    assert "given twice" in refused("1", "1", "-d", "20")
    assert "-d 2 is taken" in refused("1", "2", "-d", "2")
    assert "-n may hold" in refused("1", "2", "-d", "20", "-n", "a/b")
    assert "Expected one Dataset009_*" in refused("1", "9", "-d", "20")
    assert "--train-only 7" in refused("1", "2", "-d", "20", "--train-only", "7")
    assert "DATASET=CLASS" in refused("1", "2", "-d", "20", "--not-shown", "1")
    told = refused("1", "2", "-d", "20")
    assert "Each dataset lacks a class (Dataset001_A: stomach; Dataset002_B: spleen)" in told
    assert "--classes" in told
    more = ("--classes", "liver", "spleen", "--not-shown", "1=heart")
    assert "'heart' is none of the classes liver, spleen" in refused("1", "2", "-d", "20", *more)
    assert "neither a published label system" in refused("1", "2=Nothing", "-d", "20")
    write_dataset(raw / "Dataset003_C", {"background": 0, "liver": 1}, 1, channel="T1")
    assert "--channel-names" in refused("1", "3", "-d", "20")
    write_dataset(
        raw / "Dataset004_D",
        {"background": 0, "whole": [1, 2], "core": 2},
        1,
        regions_class_order=[1, 2],
    )
    assert "has regions" in refused("1", "4", "-d", "20")
    write_dataset(raw / "Dataset006_F", {"background": 0, "heart": 1}, 1)
    assert "Dataset006_F annotates none of the classes liver" in refused(
        "1", "6", "-d", "20", "--classes", "liver"
    )
    (raw / "Dataset005_E" / "imagesTr").mkdir(parents=True)
    (raw / "Dataset005_E" / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "liver": 1},
                "file_ending": ".nrrd",
            }
        )
    )
    assert "no cases" in refused("1", "5", "-d", "20")
    (raw / "Dataset005_E" / "labelsTr").mkdir()
    for file in ("imagesTr/x_0000.nrrd", "labelsTr/x.nrrd"):
        (raw / "Dataset005_E" / file).touch()
    assert "differ in their file ending" in refused("1", "5", "-d", "20")
    assert (
        main(
            [
                "merge-datasets",
                "1",
                "3",
                "-d",
                "20",
                "--channel-names",
                "CT",
                "--not-shown",
                "3=spleen",
            ]
        )
        == 0
    )
