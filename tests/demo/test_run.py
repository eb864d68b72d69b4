"""`stunet demo`: the data set, the whole run, interruption and resuming, a user's data set, wrong
input."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.demo.phantom import HOUNSFIELD, LABELS, make_case, write_dataset
from stunet_plugin.demo.progress import Progress
from stunet_plugin.demo.run import run_demo
from stunet_plugin.demo.settings import DemoSettings
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import find_command

from conftest import PHANTOM_ID, Workspace


def test_phantoms_are_ct_like_and_reproducible(tmp_path: Path) -> None:
    write_dataset(tmp_path / "Dataset001_A", num_cases=2, seed=5)
    write_dataset(tmp_path / "Dataset002_B", num_cases=2, seed=5)
    for name in ("imagesTr/phantom_001_0000.nii.gz", "labelsTr/phantom_001.nii.gz"):
        images = [
            sitk.ReadImage(str(tmp_path / dataset / name))
            for dataset in ("Dataset001_A", "Dataset002_B")
        ]
        assert np.array_equal(sitk.GetArrayFromImage(images[0]), sitk.GetArrayFromImage(images[1]))
        assert images[0].GetSpacing()[0] != images[0].GetSpacing()[2]
    image, labels, spacing = make_case(np.random.default_rng(1))
    assert image.shape == labels.shape
    assert len(spacing) == 3
    for name, value in LABELS.items():
        if value:
            assert (labels == value).sum() > 50
            assert abs(image[labels == value].mean() - HOUNSFIELD[name]) < 60
    assert image[0, 0, 0] < -900


def test_a_data_set_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def fail(image: object, path: str) -> None:
        written.append(path)
        if len(written) == 3:
            raise RuntimeError("disk full")
        Path(path).write_text("")

    monkeypatch.setattr(sitk, "WriteImage", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_dataset(tmp_path / "raw" / "Dataset001_A", num_cases=4)
    assert list((tmp_path / "raw").iterdir()) == []


def test_progress_tells_epochs_and_cases(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(epochs=3)
    for line in (
        "2026-01-01 10:00:00.000000: Epoch 0 \n",
        "2026-01-01 10:00:01.000000: train_loss -0.12 \n",
        "2026-01-01 10:00:01.000000: Pseudo dice [np.float32(0.5), np.float32(0.7)] \n",
        "2026-01-01 10:00:01.000000: Epoch time: 12.3 s \n",
        "something else\n",
        "Predicting case_1:\n",
    ):
        progress.see(line)
    assert capsys.readouterr().out.split("\n") == [
        "    epoch   1 of 3: loss -0.12, pseudo Dice 0.600, 12.3 s",
        "    Predicting case_1:",
        "",
    ]


def demo(out: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a small demo without any of nnU-Net's variables."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("nnUNet_", "STUNET_"))
    }
    command = [
        find_command("stunet"),
        "demo",
        "--size",
        "tiny",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_whole_run_interrupted_and_resumed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    out = tmp_path / "work" / "demo"
    out.parent.mkdir()
    process = demo(out, HOME=str(home))
    assert process.stdout is not None
    for line in process.stdout:
        if "nnUNetv2_plan_and_preprocess" in line:
            break
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert f"--out {out} --resume" in errors
    assert json.loads((out / "demo.json").read_text())["done"] == ["dataset"]

    again = demo(out)
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 2
    assert "Continue it with --resume" in errors

    resumed = demo(out, "--resume", HOME=str(home))
    output, errors = resumed.communicate(timeout=900)
    assert resumed.returncode == 0, errors
    for text in (
        "Data set: done already",
        "$ nnUNetv2_train 999 3d_fullres 0 -tr STUNetTrainer_tiny",
        "mean Dice",
        "Everything is in",
    ):
        assert text in output
    assert (out / "overlay.png").stat().st_size > 10_000
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_users_data_set_with_regions(phantoms: Workspace, tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "Dataset077_Mine"
    shutil.copytree(phantoms.dataset_folder(phantoms.raw), raw)
    description = json.loads((raw / "dataset.json").read_text())
    description["labels"] = {
        "background": 0,
        "abdomen": [1, 2, 3, 4, 5],
        "vessel": [4],
        "ignore": 6,
    }
    description["regions_class_order"] = [1, 4]
    (raw / "dataset.json").write_text(json.dumps(description))
    before = sorted(path for path in raw.rglob("*"))
    process = demo(tmp_path / "demo", "--dataset", 77, nnUNet_raw=str(raw.parent))
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert "nnUNetv2_evaluate_folder" in output
    assert "abdomen" in output
    assert sorted(path for path in raw.rglob("*")) == before


def test_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DemoSettings(None, "tiny", 1, "cpu")
    with pytest.raises(PluginError, match="--epochs must be at least 1, not 0"):
        DemoSettings.from_options(None, "tiny", 0, "cpu")
    with pytest.raises(
        PluginError, match="--dataset takes the number of a dataset in nnUNet_raw, 1 to 999, not -1"
    ):
        DemoSettings.from_options(-1, "tiny", 1, "cpu")
    with pytest.raises(PluginError, match="--out is empty"):
        run_demo(DemoSettings(None, "tiny", 1, "cpu"), " ", False)
    with pytest.raises(PluginError, match="no interrupted demo in"):
        run_demo(settings, str(tmp_path / "new"), resume=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "demo.json").write_text(
        json.dumps({"settings": asdict(settings), "done": []})
    )
    with (tmp_path / "running" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PluginError, match="A demo is running in"):
            run_demo(settings, str(tmp_path / "running"), resume=True)
    (tmp_path / "running" / "demo.json").write_text("{")
    with pytest.raises(PluginError, match=r"demo.json is damaged. Start a new demo"):
        run_demo(settings, str(tmp_path / "running"), resume=True)
    write_dataset(tmp_path / "raw" / "Dataset003_Few", num_cases=3)
    (tmp_path / "raw" / "Dataset004_Empty").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    for dataset, message in (
        (3, "splits into 5 folds, .* has only 3 labelled cases"),
        (4, "is no dataset of nnU-Net v2"),
    ):
        with pytest.raises(PluginError, match=message):
            run_demo(DemoSettings(dataset, "tiny", 1, "cpu"), str(tmp_path / "x"), resume=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("important")
    with pytest.raises(PluginError, match=r"not empty. Choose another folder with --out"):
        run_demo(settings, str(tmp_path / "mine"), resume=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(PluginError, match=r"Cannot write to .*thesis.tex"):
        run_demo(settings, str(tmp_path / "mine" / "thesis.tex" / "demo"), resume=False)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(
        PluginError,
        match=(
            rf"--dataset {PHANTOM_ID}: expected one Dataset{PHANTOM_ID}_.* found 0. Datasets there:"
            r" none"
        ),
    ):
        run_demo(DemoSettings(int(PHANTOM_ID), "tiny", 1, "cpu"), str(tmp_path / "x"), resume=False)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(PluginError, match="export nnUNet_raw="):
        run_demo(DemoSettings(5, "tiny", 1, "cpu"), str(tmp_path / "x"), resume=False)
