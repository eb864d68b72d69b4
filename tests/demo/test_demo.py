"""`stunet demo`: the dataset, the whole run, interruption, a user's dataset, wrong input."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.cli import main
from stunet_plugin.demo import run
from stunet_plugin.demo.phantom import HOUNSFIELD, LABELS, make_case, write_dataset
from stunet_plugin.nnunet.commands import find_command

from conftest import Stunet
from dataset_helpers import change_json
from unlabeled_helpers import snapshot


def test_phantoms_are_ct_like_and_reproducible(tmp_path: Path) -> None:
    images = []
    for folder in (tmp_path / "Dataset001_A", tmp_path / "Dataset002_B"):
        write_dataset(folder, num_cases=1, seed=5)
        images.append(sitk.ReadImage(str(folder / "imagesTr/phantom_000_0000.nii.gz")))
    assert np.array_equal(*map(sitk.GetArrayFromImage, images))
    assert images[0].GetSpacing()[0] != images[0].GetSpacing()[2]
    image, labels, _ = make_case(np.random.default_rng(1))
    for name, value in LABELS.items():
        if value:
            assert (labels == value).sum() > 50
            assert abs(image[labels == value].mean() - HOUNSFIELD[name]) < 60
    assert image[0, 0, 0] < -900


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of nnU-Net's commands, but for the evaluation's; predictions are the
    references."""
    script = """#!/bin/sh
    name=$(ls nnUNet_raw)
    echo "Preprocessing $name"
    case $0 in *preprocess)
        mkdir -p nnUNet_preprocessed/$name
        echo '[{"val": ["phantom_001"]}]' > nnUNet_preprocessed/$name/splits_final.json;;
    *train)
        model=nnUNet_results/$name/STUNetTrainer_tiny__nnUNetPlans__3d_fullres
        mkdir -p $model
        cp nnUNet_raw/$name/dataset.json $model
        plans='{"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager"}'
        echo $plans > $model/plans.json
        echo "2026-01-01 10:00:01.000000: train_loss -0.12 "
        echo "2026-01-01 10:00:01.000000: Pseudo dice [np.float32(0.5), np.float32(0.7)] "
        echo "2026-01-01 10:00:01.000000: Epoch time: 12.3 s "
        eval "$END";;
    *predict)
        mkdir predictions && cp held_out/labels/* predictions && echo done with phantom_001;;
    esac
    """
    for name in ("plan_and_preprocess", "train", "predict"):
        (tmp_path / f"nnUNetv2_{name}").write_text(script)
        (tmp_path / f"nnUNetv2_{name}").chmod(0o755)

    def find(name: str) -> str:
        return find_command(name) if "evaluate" in name else str(tmp_path / name)

    monkeypatch.setattr(run, "find_command", find)
    return tmp_path / "my demo"


FACTS = "train_loss -0.12, Pseudo dice [0.5, 0.7], Epoch time: 12.3 s"
TINY = ("--size", "tiny", "--epochs", "3")


@pytest.mark.posix
@pytest.mark.parametrize(("end", "code"), [("exit 3", 1), ("sleep 0.3; kill -INT $PPID", 130)])
def test_a_demo_that_fails_or_is_interrupted_says_how_to_start_again(
    commands: Path, stunet: Stunet, end: str, code: int
) -> None:
    stunet.patch.setenv("END", f"{end}; sleep 60")
    stunet.patch.setattr(run, "write_dataset", lambda folder: write_dataset(folder, 2))
    given = [*TINY, "--out", str(commands), "--device", "cpu"]
    assert main(["demo", *given]) == code
    told, errors = stunet.capsys.readouterr()
    assert "    Preprocessing Dataset999_StunetDemo\n" in told
    last = errors.splitlines()[-1]
    assert f"rm -r '{commands}' && " in last
    assert shlex.split(last.partition("&& ")[2]) == ["stunet", "demo", *given]
    if code == 1:
        assert told.endswith(f"    epoch   1 of 3: {FACTS}\n")
        assert "nnUNetv2_train ended with exit code 3. Its last lines:\n    Prepro" in errors


@pytest.mark.slow
@pytest.mark.posix
def test_a_users_dataset_with_regions(commands: Path, nnunet_folders: Path, stunet: Stunet) -> None:
    stunet.patch.setattr(run, "PROCESSES", 1)
    raw = nnunet_folders / "nnUNet_raw" / "Dataset077_Mine"
    write_dataset(raw, num_cases=5)
    regions = {"background": 0, "abdomen": [1, 2, 3, 4, 5], "vessel": [4], "ignore": 6}
    change_json(raw / "dataset.json", labels=regions, regions_class_order=[1, 4])
    before = snapshot(raw)
    told = stunet("demo --device cpu --dataset 77 --out", commands, *TINY)
    assert f"    epoch   1 of 3: {FACTS}\n" in told
    assert "    case   1 of 1: done with phantom_001\n" in told
    assert "nnUNetv2_evaluate_folder" in told
    assert f"{'phantom_001':<11}    1.000   1.000 1.000" in told
    assert (commands / "overlay.png").is_file()
    assert snapshot(raw) == before


SMALLER = """
import sys
from stunet_plugin.cli import main
from stunet_plugin.demo import run
from stunet_plugin.demo.phantom import write_dataset

run.PROCESSES = 1
run.write_dataset = lambda folder: write_dataset(folder, 6)
sys.exit(main(sys.argv[1:]))
"""
"""The command with fewer cases, and fewer workers that import torch."""


@pytest.mark.slow
def test_the_whole_run(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "work" / "demo"
    for folder in (home, out.parent):
        folder.mkdir()
    clean = {x: y for x, y in os.environ.items() if not x.startswith(("nnUNet", "STUNET"))}
    words = ["--size", "tiny", "--epochs", "1", "--device", "cpu", "--out", str(out)]
    command, clean = [sys.executable, "-c", SMALLER, "demo", *words], {**clean, "HOME": str(home)}
    done = subprocess.run(command, env=clean, cwd=out.parent, capture_output=True, text=True)
    # Random weights decide whether one epoch finds anything.
    found_nothing = "finds next to nothing (mean Dice 0.0" in done.stderr
    assert done.returncode == int(found_nothing), done.stderr
    assert ("Try --size small" in done.stderr) == found_nothing
    training = "$ nnUNetv2_train 999 3d_fullres 0 -tr STUNetTrainer_tiny"
    for text in (training, "epoch   1 of 1", "mean Dice", "Everything is in"):
        assert text in done.stdout
    assert (out / "overlay.png").stat().st_size > 10_000
    assert os.listdir(out.parent) == ["demo"]
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_wrong_input(nnunet_folders: Path, stunet: Stunet) -> None:
    write_dataset(nnunet_folders / "nnUNet_raw" / "Dataset003_Few", num_cases=3)
    (nnunet_folders / "thesis.tex").write_text("important")
    for words, message in (
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        (f"--out {nnunet_folders}", "not empty"),
        (f"--out {nnunet_folders}/thesis.tex", "not empty"),
        ("--dataset 3", "has only 3 labelled cases"),
    ):
        assert message in stunet.refuse("demo --device cpu --out", nnunet_folders / "x", words)
