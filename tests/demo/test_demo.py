"""`stunet demo`: the dataset, the whole run, interruption, a user's dataset, wrong input."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.commands.demo import Demo
from stunet_plugin.demo.phantom import HOUNSFIELD, LABELS, make_case, write_dataset
from stunet_plugin.demo.run import run_demo
from stunet_plugin.demo.stock import Progress, run_stock
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import find_command

from conftest import PHANTOM_ID, Workspace


def test_phantoms_are_ct_like_and_reproducible(tmp_path: Path) -> None:
    write_dataset(tmp_path / "Dataset001_A", num_cases=2, seed=5)
    write_dataset(tmp_path / "Dataset002_B", num_cases=2, seed=5)
    for name in ("imagesTr/phantom_001_0000.nii.gz", "labelsTr/phantom_001.nii.gz"):
        first, second = (
            sitk.ReadImage(str(tmp_path / dataset / name))
            for dataset in ("Dataset001_A", "Dataset002_B")
        )
        assert np.array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
        assert first.GetSpacing()[0] != first.GetSpacing()[2]
    image, labels, spacing = make_case(np.random.default_rng(1))
    assert (image.shape, len(spacing)) == (labels.shape, 3)
    for name, value in LABELS.items():
        if value:
            assert (labels == value).sum() > 50
            assert abs(image[labels == value].mean() - HOUNSFIELD[name]) < 60
    assert image[0, 0, 0] < -900


def test_a_dataset_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_progress_shows_epochs_and_cases(capsys: pytest.CaptureFixture[str]) -> None:
    epochs, cases = Progress(3, "epoch"), Progress(1, "case")
    for line in (
        "2026-01-01 10:00:00.000000: Epoch 0 \n",
        "2026-01-01 10:00:01.000000: train_loss -0.12 \n",
        "2026-01-01 10:00:01.000000: Pseudo dice [np.float32(0.5), np.float32(0.7)] \n",
        "2026-01-01 10:00:01.000000: Epoch time: 12.3 s \n",
        "something else\n",
        "predicting case_1\n",
    ):
        epochs.see(line)
    cases.see("done with case_1\n")
    assert capsys.readouterr().out.splitlines() == [
        "    epoch   1 of 3: loss -0.12, pseudo Dice 0.600, 12.3 s",
        "    predicting case_1",
        "    case   1 of 1: case_1",
    ]


def test_a_failing_command_ends_the_demo_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PluginError, match=r"(?s)exit code 2.*invalid int value.*log: "):
        run_stock(["nnUNetv2_preprocess", "-d", "x"], tmp_path, os.environ, 0, "")

    def fail(*_: object) -> None:
        run_stock(["nnUNetv2_preprocess", "-d", "x"], tmp_path, os.environ, 0, "")

    monkeypatch.setattr("stunet_plugin.demo.run._Run.run", fail)
    out = tmp_path / "my demo"
    assert run_demo(Demo(size="tiny", device="cpu", epochs=3, out=str(out))) == 1
    command = capsys.readouterr().err.splitlines()[-1].partition("&& ")[2]
    given = ["--size", "tiny", "--epochs", "3", "--out", str(out), "--device", "cpu"]
    assert shlex.split(command) == ["stunet", "demo", *given]


def start(out: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a small demo without any of nnU-Net's variables."""
    nnunet = ("nnUNet_", "STUNET_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(nnunet)}
    options = ["--size", "tiny", "--epochs", "1", "--device", "cpu", "--out", out, *arguments]
    return subprocess.Popen(
        [find_command("stunet"), "demo", *map(str, options)],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_interrupted_demo_says_to_start_again(tmp_path: Path) -> None:
    process = start(tmp_path / "demo")
    assert process.stdout is not None
    for line in process.stdout:
        if "nnUNetv2_plan_and_preprocess" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"Start again: rm -r {tmp_path / 'demo'} && stunet demo --size tiny" in errors


@pytest.mark.slow
def test_the_whole_run(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "work" / "demo"
    home.mkdir()
    out.parent.mkdir()
    process = start(out, HOME=str(home))
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    for text in (
        "This takes about 2 minutes",
        "$ nnUNetv2_train 999 3d_fullres 0 -tr STUNetTrainer_tiny",
        "epoch   1 of 1",
        "mean Dice",
        "Everything is in",
    ):
        assert text in output
    assert (out / "overlay.png").stat().st_size > 10_000
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_users_dataset_with_regions(phantoms: Workspace, tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "Dataset077_Mine"
    shutil.copytree(phantoms.dataset_folder(phantoms.raw), raw)
    description = json.loads((raw / "dataset.json").read_text())
    regions = {"background": 0, "abdomen": [1, 2, 3, 4, 5], "vessel": [4], "ignore": 6}
    changes = {"labels": regions, "regions_class_order": [1, 4]}
    (raw / "dataset.json").write_text(json.dumps({**description, **changes}))
    before = sorted(path for path in raw.rglob("*"))
    process = start(tmp_path / "demo", "--dataset", 77, nnUNet_raw=str(raw.parent))
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert "nnUNetv2_evaluate_folder" in output
    assert "abdomen" in output
    assert sorted(path for path in raw.rglob("*")) == before


def test_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "raw" / "Dataset003_Few", num_cases=3)
    (tmp_path / "raw" / "Dataset004_Empty").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    thesis = tmp_path / "mine" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("important")
    for options, message in (
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"out": " "}, "--out is empty"),
        ({"out": str(thesis.parent)}, "not empty"),
        ({"out": str(thesis / "demo")}, r"Cannot write to .*thesis.tex"),
        ({"dataset": -1}, "--dataset -1"),
        ({"dataset": 3}, "splits into 5 folds, .* has only 3 labelled cases"),
        ({"dataset": 4}, "no dataset.json"),
        ({"dataset": int(PHANTOM_ID)}, f"--dataset {PHANTOM_ID}: .*found 0"),
    ):
        given = {"out": str(tmp_path / "x"), "size": "tiny", "device": "cpu", **options}
        with pytest.raises(PluginError, match=message):
            run_demo(Demo(**given))  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "raw"]
    assert list(thesis.parent.iterdir()) == [thesis]
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(PluginError, match="export nnUNet_raw="):
        run_demo(Demo(dataset=5, device="cpu", out=str(tmp_path / "x")))
