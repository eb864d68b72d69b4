"""`stunet rank` from candidates to table: every kind of candidate, the same numbers for the same
seed, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from stunet_plugin.cli import main
from stunet_plugin.datasets.raw_dataset import RawDataset
from stunet_plugin.ranking.candidates import Candidate, Plan, same_networks
from stunet_plugin.ranking.ccfv import LevelScore
from stunet_plugin.ranking.run import Result, ranking_table
from stunet_plugin.ranking.target import Target

from import_helpers import make_network, published_weights, v1_plans, write_v1

SHAPE = (20, 24, 36)
DATASET = "Dataset004_Boxes"
FAST = ("-d", "4", "--device", "cpu", "--step-size", "1")


def write_target(folder: Path, cases: int = 4) -> None:
    """A labelled dataset: a dim and a bright box in noise."""
    rng = np.random.default_rng(5)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(cases):
        labels = np.zeros(SHAPE, np.uint8)
        low = rng.integers(2, 6, 3)
        labels[tuple(slice(first, first + 8) for first in low)] = 1
        labels[tuple(slice(first + 9, first + 13) for first in low)] = 2
        image = (100 * labels + rng.normal(0, 20, SHAPE)).astype(np.float32)
        write_scan(folder / f"imagesTr/case{number}_0000.nii.gz", image)
        write_scan(folder / f"labelsTr/case{number}.nii.gz", labels)
    classes = {"background": 0, "dim": 1, "bright": 2}
    content = {"channel_names": {"0": "MRI"}, "labels": classes, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": cases}))


def write_scan(path: Path, array: np.ndarray) -> None:
    scan = sitk.GetImageFromArray(array)
    scan.SetSpacing((1.5, 1.5, 1.5))
    sitk.WriteImage(scan, str(path))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders, a labelled dataset, and two models that were imported."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    write_target(tmp_path / "nnUNet_raw" / DATASET)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        weights = published_weights(make_network(outputs=3))
        source = write_v1(tmp_path / f"{name}.model", weights, v1_plans(classes=2))
        assert main(["import", str(source), "--out", str(tmp_path / name)]) == 0
    return tmp_path


def rank(folder: Path, *words: object) -> dict[str, Any]:
    out = folder / "ranking.json"
    assert main(["rank", *map(str, words), *FAST, "--json", str(out)]) == 0
    content: dict[str, Any] = json.loads(out.read_text())
    for entry in content["candidates"]:
        entry.pop("seconds")
    return content


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["rank", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def write_plans(folder: Path, name: str = "Mine") -> Plan:
    """Plans of the dataset, as of the imported model."""
    plans = json.loads((folder / "one" / "plans.json").read_text())
    target = folder / "nnUNet_preprocessed" / DATASET
    target.mkdir(exist_ok=True)
    plan = Plan({**plans, "dataset_name": target.name, "plans_name": name}, "3d_fullres")
    (target / f"{name}.json").write_text(json.dumps(plan.plans))
    return plan


def test_ranking_of_models_with_their_own_plans(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = folders / "ranking.png"
    given = (f"first={folders / 'one'}", folders / "two", "random", "--cases", 3)
    found = rank(folders, *given, "--figure", figure)
    table, progress = capsys.readouterr()
    # The result alone, to be piped on.
    assert table.startswith("rank      CCFV")
    assert "Dataset004_Boxes: 3 of 4 cases, 3 candidates, 3 levels" in progress
    names = ["first", str(folders / "two"), "random"]
    assert found["by_architecture"] == [names]
    assert "architectures" not in table
    assert [entry["rank"] for entry in found["candidates"]] == [1, 2, 3]
    assert sorted(entry["name"] for entry in found["candidates"]) == sorted(names)
    assert len(found["cases"]) == 3
    scores = [entry["score"] for entry in found["candidates"]]
    assert scores == sorted(set(scores), reverse=True)
    for entry in found["candidates"]:
        assert entry["score"] == pytest.approx(sum(level["score"] for level in entry["levels"]))
        for level in entry["levels"]:
            distances = level["class_distances"]
            assert set(distances) == {"dim", "bright"}
            score = np.log(level["energy"] / np.mean(list(distances.values())))
            assert level["score"] == pytest.approx(score)
        assert f"{entry['score']:.3f}" in table
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert rank(folders, *given)["candidates"] == found["candidates"]


def test_the_datasets_plans_and_its_preprocessed_cases(folders: Path) -> None:
    plan = write_plans(folders)
    # Weights of a pretext task: a trainer, no plan.
    checkpoint = torch.load(folders / "two" / "fold_0" / "checkpoint_final.pth", weights_only=True)
    pretext = {**checkpoint, "trainer_name": "VolumeFusionTrainer_STUNet_tiny", "init_args": {}}
    torch.save(pretext, folders / "pretext.pth")
    # nnU-Net's own trainer builds what the plan names: the same network.
    random = ("random:STUNetTrainer_tiny", "random:nnUNetTrainer")
    given = (f"model={folders / 'one'}", f"pretext={folders / 'pretext.pth'}", *random)
    from_raw = rank(folders, *given, "-p", "Mine")
    scores = {entry["name"]: entry["score"] for entry in from_raw["candidates"]}
    assert scores["random:nnUNetTrainer"] == scores["random:STUNetTrainer_tiny"]
    assert len(set(scores.values())) == 3
    folder = folders / "nnUNet_preprocessed" / DATASET / plan.chosen.data_identifier
    folder.mkdir()
    preprocessor = plan.chosen.preprocessor_class(verbose=False)
    raw = folders / "nnUNet_raw" / DATASET
    description = json.loads((raw / "dataset.json").read_text())
    for number in range(4):
        images = [str(raw / "imagesTr" / f"case{number}_0000.nii.gz")]
        label = raw / "labelsTr" / f"case{number}.nii.gz"
        files = (str(folder / f"case{number}"), images, str(label))
        preprocessor.run_case_save(*files, plan.manager, plan.chosen, description)
        label.write_bytes(b"")
    assert len(nnUNetDatasetBlosc2.get_identifiers(str(folder))) == 4
    from_preprocessed = rank(folders, *given, "-p", "Mine")
    for entry, other in zip(from_raw["candidates"], from_preprocessed["candidates"], strict=True):
        assert entry["name"] == other["name"]
        assert entry["score"] == pytest.approx(other["score"])


def test_weights_decide_not_their_heads(folders: Path) -> None:
    file = folders / "one" / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    weights = checkpoint["network_weights"]
    heads = {name: torch.rand(7, 2) for name in weights if ".seg_layers." in name}
    torch.save({**checkpoint, "network_weights": {**weights, **heads}}, folders / "other.pth")
    write_plans(folders)
    options = ("-p", "Mine", "--levels", 2, "--names", "case3", "case0")
    found = rank(folders, file, folders / "other.pth", *options)
    assert found["cases"] == ["case0", "case3"]
    first, second = found["candidates"]
    assert first["score"] == second["score"]
    assert len(first["levels"]) == 2


def test_the_published_sums_and_the_other_variety(folders: Path) -> None:
    given = (folders / "one", folders / "two")
    plain, sums, spread = (
        rank(folders, *given, *more)
        for more in ((), ("--published-sums",), ("--variety", "spread"))
    )
    by_name = [
        {entry["name"]: entry["levels"][0] for entry in found["candidates"]}
        for found in (plain, sums, spread)
    ]
    for name in by_name[0]:
        averaged, summed, spread_out = (levels[name] for levels in by_name)
        one, two = (averaged["class_distances"][label] * 6 for label in ("dim", "bright"))
        factor = 1 + 1 / (16 / 2) / 2
        assert summed["consistency"] == pytest.approx((one * factor + two) * factor)
        assert spread_out["score"] == pytest.approx(
            -np.log(averaged["energy"] * averaged["consistency"])
        )


def test_classes_that_only_some_cases_have(folders: Path) -> None:
    """A class of one voxel in one case, missing in another: left out of those cases, not of the
    score."""
    for number, voxels in ((0, 0), (1, 1)):
        file = folders / "nnUNet_raw" / DATASET / "labelsTr" / f"case{number}.nii.gz"
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        places = np.argwhere(array == 2)
        array[array == 2] = 0
        array[tuple(places[:voxels].T)] = 2
        write_scan(file, array)
    found = rank(folders, folders / "one", folders / "two")
    assert set(found["candidates"][0]["levels"][0]["class_distances"]) == {"dim", "bright"}


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_labels_in_another_orientation_than_the_image(
    folders: Path, capsys: pytest.CaptureFixture[str], reader: str
) -> None:
    """RAS against LPS: the same voxels in another order, as a label tool may write them."""
    for name in ("one", "two"):
        file = folders / name / "plans.json"
        plans = {**json.loads(file.read_text()), "image_reader_writer": reader}
        file.write_text(json.dumps(plans))
    given = (f"a={folders / 'one'}", f"b={folders / 'two'}")
    expected = rank(folders, *given)
    labels = folders / "nnUNet_raw" / DATASET / "labelsTr"
    for file in labels.iterdir():
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), "RAS"), str(file))
    assert rank(folders, *given)["candidates"] == expected["candidates"]
    moved = sitk.ReadImage(str(labels / "case0.nii.gz"))
    moved.SetOrigin((50, 0, 0))
    sitk.WriteImage(moved, str(labels / "case0.nii.gz"))
    assert "not on its image's voxels" in refused(capsys, *given, "-d", 4)
    changed = sitk.Cast(moved, sitk.sitkInt16) * 5
    sitk.WriteImage(changed, str(labels / "case0.nii.gz"))
    assert "undeclared label values (5" in refused(capsys, *given, "-d", 4)


def test_broken_weights_are_ranked_last(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(folders / "two" / "fold_0" / "checkpoint_final.pth", weights_only=True)
    for value in checkpoint["network_weights"].values():
        value.fill_(float("nan"))
    torch.save(checkpoint, folders / "broken.pth")
    write_plans(folders)
    given = (f"broken={folders / 'broken.pth'}", f"good={folders / 'one'}", "-p", "Mine")
    ranks = [(entry["name"], entry["rank"]) for entry in rank(folders, *given)["candidates"]]
    assert ranks == [("good", 1), ("broken", None)]
    assert "not finite" in capsys.readouterr().out


def test_regions_and_the_ignore_label() -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    description = {"labels": labels, "regions_class_order": [1, 2]}
    target = Target(RawDataset(Path("Dataset001_X"), description, ()), ())
    assert target.labels == {0: "background", 1: "label 1", 2: "core"}


def test_other_architectures_are_pointed_out(folders: Path) -> None:
    plan = write_plans(folders)
    wide = json.loads(json.dumps(plan.plans))
    kwargs = wide["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [2 * width for width in kwargs["features_per_stage"]]
    candidates = [
        Candidate("a", None, "STUNetTrainer_tiny", plan),
        Candidate("b", None, "STUNetTrainer", Plan(wide, "3d_fullres")),
        Candidate("c", None, "STUNetTrainer", plan),
    ]
    alike = same_networks(candidates)
    assert alike == [["a", "c"], ["b"]]
    results = [Result(candidate, (LevelScore(1.0, {}, 1.0, 1.0),), 0.0) for candidate in candidates]
    last = ranking_table(results, alike).splitlines()[-1]
    assert last.startswith("These are 2 architectures")
    assert last.endswith(": a, c | b")


def test_slips_are_told_before_torch_is_imported(folders: Path) -> None:
    one, two = map(str, (folders / "one", folders / "two"))
    (folders / "text.pth").write_text("weights")
    slips = (
        ([one, str(folders / "none.pth"), "-d", "4"], "no such file"),
        ([one, str(folders / "text.pth"), "-d", "4"], "text.pth"),
        ([one, two, "-d", "5"], "Expected one Dataset005_*"),
        ([one, two, "-d", "4", "-p", "Nothing"], "no such plans"),
        ([one, two, "-d", "4", "--names", "case0", "caze1"], "Did you mean case1?"),
    )
    code = "import json, sys\nfrom stunet_plugin.cli import main\n"
    code += (
        "codes = [main(['rank', *given]) for given in json.loads(sys.argv[1])]\nprint(codes,"
        " 'torch' in sys.modules)"
    )
    given = json.dumps([arguments for arguments, _ in slips])
    done = subprocess.run(
        [sys.executable, "-c", code, given], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{[2] * len(slips)} False"
    for line, (_, message) in zip(done.stderr.splitlines(), slips, strict=True):
        assert message in line


def test_refusals(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = folders / "one", folders / "two"
    assert "at least two candidates" in refused(capsys, one, "-d", 4)
    assert "Two candidates are called x" in refused(capsys, f"x={one}", f"x={two}", "-d", 4)
    assert "no folder" in refused(
        capsys, one, two, "-d", 4, "--json", folders / "not" / "there.json"
    )
    assert "no such file" in refused(capsys, one, folders / "none.pth", "-d", 4)
    assert "Expected one Dataset005_*" in refused(capsys, one, two, "-d", 5)
    assert "--cases must be at least 2" in refused(capsys, one, two, "-d", 4, "--cases", 1)
    assert "has no case x" in refused(capsys, one, two, "-d", 4, "--names", "case0", "x")
    assert "make no pair" in refused(capsys, one, two, "-d", 4, "--names", "case0")
    assert "--levels must be from 1 to 5" in refused(capsys, one, two, "-d", 4, "--levels", 6)
    assert "--step-size" in refused(capsys, one, two, "-d", 4, "--step-size", 0)
    assert "no such plans" in refused(capsys, one, two, "-d", 4, "-p", "Nothing")
    assert "no plan of its own" in refused(capsys, one, "random:STUNetTrainer_tiny", "-d", 4)
    assert "stunet import" in refused(capsys, one, folders / "one.model", "-d", 4)
    write_plans(folders)
    assert "no configuration '2d'" in refused(capsys, one, two, "-d", 4, "-p", "Mine", "-c", "2d")
    checkpoint = torch.load(one / "fold_0" / "checkpoint_final.pth", weights_only=True)
    torch.save({**checkpoint, "trainer_name": "STUNetTrainer_small"}, folders / "small.pth")
    message = refused(capsys, one, f"x={folders / 'small.pth'}", "-d", 4, "-p", "Mine")
    assert "x: STUNetTrainer_small trains STU-Net small" in message
    weights = {
        name: value
        for name, value in checkpoint["network_weights"].items()
        if "encoder.stages.0" not in name
    }
    torch.save({**checkpoint, "network_weights": weights}, folders / "less.pth")
    assert "tensors are missing" in refused(
        capsys, one, folders / "less.pth", "-d", 4, "-p", "Mine"
    )
    raw = folders / "nnUNet_raw" / DATASET
    (raw / "labelsTr" / "case0.nii.gz").write_bytes(b"nothing")
    assert "Case case0 of Dataset004_Boxes cannot be prepared" in refused(capsys, one, two, "-d", 4)
    (raw / "labelsTr" / "case0.nii.gz").unlink()
    assert "have no labels" in refused(capsys, one, two, "-d", 4)
