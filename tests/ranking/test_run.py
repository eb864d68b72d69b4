"""`stunet rank` from candidates to table: every kind of candidate, the same numbers for the same
seed, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stunet_plugin.cli import main
from stunet_plugin.datasets.raw_dataset import RawDataset
from stunet_plugin.ranking.candidates import Candidate, Plan
from stunet_plugin.ranking.ccfv import LevelScore
from stunet_plugin.ranking.run import Result, ranking_table
from stunet_plugin.ranking.target import class_names

from conftest import Stunet
from dataset_helpers import change_json, read_array, write_array
from import_helpers import (
    make_network,
    nnssl_checkpoint,
    published_weights,
    unet_checkpoint,
    unet_entry,
    v1_plans,
    with_changes,
    write_v1,
)

SHAPE, SPACING = (16, 16, 64), (1.5, 1.5, 1.5)
DATASET = "Dataset004_Boxes"
RANK = "rank -d 4 --device cpu --step-size 1 --json ranking.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled dataset (a dim and a bright box in noise), and two models that were imported."""
    root = tmp_path_factory.mktemp("rank")
    rng, raw = np.random.default_rng(5), root / "raw" / DATASET
    for number in range(4):
        labels = np.zeros(SHAPE, np.uint8)
        low = rng.integers(1, 4, 3)
        labels[tuple(slice(first, first + 7) for first in low)] = 1
        labels[tuple(slice(first + 8, first + 12) for first in low)] = 2
        image = (100 * labels + rng.normal(0, 20, SHAPE)).astype(np.float32)
        write_array(raw / f"imagesTr/case{number}_0000.nii.gz", image, spacing=SPACING)
        write_array(raw / f"labelsTr/case{number}.nii.gz", labels, spacing=SPACING)
    classes = {"background": 0, "dim": 1, "bright": 2}
    content = {"channel_names": {"0": "MRI"}, "labels": classes, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(content))
    plans = with_changes(v1_plans(), {"plans/plans_per_stage/0/patch_size": np.array(SHAPE)})
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        source = write_v1(root / f"{name}.model", published_weights(make_network(outputs=3)), plans)
        assert main(["import", str(source), "--out", str(root / name)]) == 0
    return root


@pytest.fixture
def folders(made: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "raw", nnunet_folders / "nnUNet_raw", dirs_exist_ok=True)
    for name in ("one", "two"):
        shutil.copytree(made / name, nnunet_folders / name)
    monkeypatch.chdir(nnunet_folders)
    return nnunet_folders


def rank(stunet: Stunet, words: str) -> Any:
    stunet(RANK, words)
    content = json.loads(Path("ranking.json").read_text())
    for entry in content["candidates"]:
        entry.pop("seconds")
    return content


def checkpoint(name: str = "one", **changes: Any) -> dict[str, Any]:
    loaded = torch.load(Path(name, "fold_0", "checkpoint_final.pth"), weights_only=True)
    return {**loaded, **changes}


def write_plans() -> Plan:
    """Plans of the dataset, as of the imported model."""
    plans = json.loads(Path("one/plans.json").read_text())
    plan = Plan({**plans, "dataset_name": DATASET, "plans_name": "Mine"}, "3d_fullres")
    target = Path("nnUNet_preprocessed", DATASET)
    target.mkdir()
    (target / "Mine.json").write_text(json.dumps(plan.plans))
    return plan


def test_ranking_of_models_with_their_own_plans(folders: Path, stunet: Stunet) -> None:
    words = "first=one two random --cases 3"
    assert main([*RANK.split(), *words.split(), "--figure", "ranking.png"]) == 0
    table, progress = stunet.capsys.readouterr()
    # The result alone, to be piped on.
    assert table.split()[:4] == ["rank", "heads", "inverse", "ccfv"]
    assert "Dataset004_Boxes: 3 of 4 cases, 3 candidates, 3 levels" in progress
    found = rank(stunet, words)
    assert found["by_architecture"] == [[entry["name"] for entry in found["candidates"]]]
    assert "architectures" not in table
    assert [entry["rank"] for entry in found["candidates"]] == [1, 2, 3]
    assert len(found["cases"]) == 3
    scores = [entry["score"] for entry in found["candidates"]]
    assert scores == sorted(set(scores), reverse=True)
    for entry in found["candidates"]:
        assert entry["score"] == entry["scores"]["heads"] > 0
        for name, of_level in (("ccfv", "score"), ("inverse", "inverse")):
            summed = sum(level[of_level] for level in entry["levels"])
            assert entry["scores"][name] == pytest.approx(summed)
        assert all(set(x["class_distances"]) == {"dim", "bright"} for x in entry["levels"])
        # From the first run: the same numbers.
        assert f"{entry['score']:.3f}  " in table
    assert Path("ranking.png").read_bytes().startswith(b"\x89PNG")


def test_networks_of_nnunet_and_nnssl(folders: Path, stunet: Stunet) -> None:
    """A trainer that nobody here has is of no matter; without -p nnssl's own preparation counts."""
    unet_checkpoint(Path("unet.pth"), unet_entry("PlainConvUNet"))
    nnssl_checkpoint(Path("ssl.pth"), unet_entry(), prefix="net.")
    found = rank(stunet, "unet.pth ssl.pth --cases 2 --levels 2")
    assert {entry["trainer"] for entry in found["candidates"]} == {"PlannedTrainer"}
    assert all(entry["score"] is not None for entry in found["candidates"])
    nnssl_checkpoint(Path("encoder.pth"), unet_entry(), "encoder.")
    message = stunet(RANK, "unet.pth encoder.pth", code=2)
    assert "encoder.pth is an encoder without a decoder" in message


def test_the_datasets_plans_and_its_preprocessed_cases(folders: Path, stunet: Stunet) -> None:
    plan = write_plans()
    # Weights of a pretext task: a trainer, no plan.
    trainer = "VolumeFusionTrainer_STUNet_tiny"
    torch.save(checkpoint("two", trainer_name=trainer, init_args={}), "pretext.pth")
    # nnU-Net's own trainer builds what the plan names: the same network.
    words = "model=one pretext.pth random:STUNetTrainer_tiny random:nnUNetTrainer -p Mine"
    scores = {entry["name"]: entry["score"] for entry in rank(stunet, words)["candidates"]}
    assert scores["random:nnUNetTrainer"] == scores["random:STUNetTrainer_tiny"]
    assert len(set(scores.values())) == 3
    folder = Path("nnUNet_preprocessed", DATASET, plan.chosen.data_identifier)
    folder.mkdir()
    preprocessor = plan.chosen.preprocessor_class(verbose=False)
    raw = Path("nnUNet_raw", DATASET)
    description = json.loads((raw / "dataset.json").read_text())
    for number in range(4):
        images = [f"{raw}/imagesTr/case{number}_0000.nii.gz"]
        label = raw / "labelsTr" / f"case{number}.nii.gz"
        files = (str(folder / f"case{number}"), images, str(label))
        preprocessor.run_case_save(*files, plan.manager, plan.chosen, description)
        label.write_bytes(b"")
    found = {entry["name"]: entry["score"] for entry in rank(stunet, words)["candidates"]}
    assert found == pytest.approx(scores)


def test_weights_decide_not_their_heads_and_broken_ones_are_last(
    folders: Path, stunet: Stunet
) -> None:
    weights = checkpoint()["network_weights"]
    heads = {name: torch.rand(7, 2) for name in weights if ".seg_layers." in name}
    torch.save(checkpoint(network_weights={**weights, **heads}), "heads.pth")
    broken = {name: torch.full_like(value, torch.nan) for name, value in weights.items()}
    torch.save(checkpoint(network_weights=broken), "broken.pth")
    write_plans()
    words = "broken.pth one heads.pth -p Mine --levels 2 --names case3 case0"
    assert "not finite" in stunet(RANK, words)
    found = rank(stunet, words)
    assert found["cases"] == ["case0", "case3"]
    first, second, last = found["candidates"]
    assert first["score"] == second["score"]
    assert len(first["levels"]) == 2
    assert (last["name"], last["rank"]) == ("broken.pth", None)


def test_the_published_sums_and_the_inverse(folders: Path, stunet: Stunet) -> None:
    """Of a class that one case lacks and another has in one voxel, two cases are left: one pair.
    The published script divides by half the square of the cases, and by the classes."""
    for number, voxels in ((0, 0), (1, 1)):
        file = Path("nnUNet_raw", DATASET, "labelsTr", f"case{number}.nii.gz")
        array = read_array(file)
        places = np.argwhere(array == 2)[voxels:]
        array[tuple(places.T)] = 0
        write_array(file, array, spacing=SPACING)
    plain, other = (
        {entry["name"]: entry["levels"][0] for entry in rank(stunet, f"one two {x}")["candidates"]}
        for x in ("--score ccfv", "--published-sums --score inverse")
    )
    for name, level in plain.items():
        one, two = level["class_distances"]["dim"] * 6, level["class_distances"]["bright"]
        summed = (one * (1 + 1 / (16 / 2) / 2) + two) * (1 + 1 / (4 / 2) / 2)
        assert other[name]["consistency"] == pytest.approx(summed)
        assert other[name]["inverse"] == pytest.approx(-np.log(level["energy"] * summed))


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
def test_labels_in_another_orientation_than_the_image(
    folders: Path, stunet: Stunet, reader: str
) -> None:
    """RAS against LPS: the same voxels in another order, as a label tool may write them."""
    change_json(Path("one/plans.json"), image_reader_writer=reader)
    words = "one random --cases 2"
    expected = rank(stunet, words)["candidates"]
    labels = Path("nnUNet_raw", DATASET, "labelsTr")
    for file in labels.iterdir():
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), "RAS"), str(file))
    assert rank(stunet, words)["candidates"] == expected
    file = str(labels / "case0.nii.gz")
    moved = sitk.ReadImage(file)
    moved.SetOrigin((50, 0, 0))
    sitk.WriteImage(moved, file)
    words = "one random --names case0 case1"
    assert "not on its image's voxels" in stunet(RANK, words, code=2)
    sitk.WriteImage(sitk.Cast(moved, sitk.sitkInt16) * 5, file)
    assert "undeclared label values (5" in stunet(RANK, words, code=2)


def test_regions_and_the_ignore_label() -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    description = {"labels": labels, "regions_class_order": [1, 2]}
    raw = RawDataset(Path("Dataset001_X"), description, ())
    assert class_names(raw) == {0: "background", 1: "label 1", 2: "core"}


def test_other_architectures_are_pointed_out(folders: Path) -> None:
    plan = write_plans()
    kwargs = "configurations/3d_fullres/architecture/arch_kwargs"
    wide = with_changes(plan.plans, {f"{kwargs}/features_per_stage": [4, 8, 16, 32, 32, 32]})
    plans = {"a": plan, "b": Plan(wide, "3d_fullres"), "c": plan}
    candidates = [Candidate(name, None, "STUNetTrainer", plans[name]) for name in plans]
    results = [Result(one, (LevelScore(score=1.0),), 0.5, 0.0) for one in candidates]
    last = ranking_table(results, "ccfv").splitlines()[-1]
    assert last == "These are 2 architectures; compare within each: a, c | b"
    assert "architectures" not in ranking_table(results, "heads")


def test_slips_are_told_before_torch_is_imported(folders: Path) -> None:
    Path("text.pth").write_text("weights")
    slips = {
        "one none.pth": "no such file",
        "one text.pth": "text.pth",
        "one two -d 5": "Expected one Dataset005_*",
        "one two -p Nothing": "no such plans",
        "one two --names case0 caze1": "Did you mean case1?",
        "one": "at least two candidates",
        "x=one x=two": "Two candidates are called x",
        "one two --json not/there.json": "no folder",
        "one two --cases 1": "--cases must be at least 2",
        "one two --step-size 0": "--step-size",
        "one random:STUNetTrainer_tiny": "no plan of its own",
    }
    code = (
        "import json, sys\nfrom stunet_plugin.cli import main\n"
        f"codes = [main([*{RANK.split()}, *x.split()]) for x in json.loads(sys.argv[1])]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, json.dumps(list(slips))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[2] * len(slips)} False"
    for line, message in zip(done.stderr.splitlines(), slips.values(), strict=True):
        assert message in line


def test_refusals(folders: Path, made: Path, stunet: Stunet) -> None:
    plan = write_plans()
    two_channels = with_changes(
        plan.plans, {"configurations/3d_fullres/normalization_schemes": ["CTNormalization"] * 2}
    )
    cascade = with_changes(plan.plans, {"configurations/3d_fullres/previous_stage": "3d_lowres"})
    for name, plans in (("Two", two_channels), ("Cascade", cascade)):
        Path("nnUNet_preprocessed", DATASET, f"{name}.json").write_text(json.dumps(plans))
    torch.save(checkpoint(trainer_name="STUNetTrainer_small"), "small.pth")
    weights = checkpoint()["network_weights"]
    less = {name: weights[name] for name in weights if "encoder.stages.0" not in name}
    torch.save(checkpoint(network_weights=less), "less.pth")
    for words, message in (
        ("one two --levels 6", "--levels must be 1 to 5"),
        (f"one {made}/one.model", "stunet import"),
        ("one two -p Mine -c 2d", "no configuration '2d'"),
        ("one two -p Two", "the plan Mine, 3d_fullres is for 2"),
        ("one two -p Cascade", "second stage of a cascade"),
        ("one x=small.pth -p Mine", "x: STUNetTrainer_small trains STU-Net small"),
        ("one less.pth -p Mine", "tensors are missing"),
    ):
        assert message in stunet(RANK, words, code=2), words
    labels = Path("nnUNet_raw", DATASET, "labelsTr")
    for file in labels.iterdir():
        write_array(file, 0 * read_array(file), spacing=SPACING)
    assert "No class has 2 voxels in two of the cases" in stunet(RANK, "one two", code=2)
    (labels / "case0.nii.gz").unlink()
    assert "have no labels" in stunet(RANK, "one two", code=2)
