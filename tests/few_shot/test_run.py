"""``stunet few-shot``: draws, refusals, and a comparison from weights to tables that is interrupted
and extended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from stunet_plugin.cli import main
from stunet_plugin.datasets.draws import draw_labelled, hold_out
from stunet_plugin.errors import PluginError
from stunet_plugin.few_shot import run

from conftest import PHANTOM_ID, Stock, Stunet, Workspace
from dataset_helpers import write_dataset
from import_helpers import nnssl_checkpoint, unet_checkpoint, unet_entry, write_v1


def test_draws_are_nested_distinct_and_never_test_cases() -> None:
    names = [f"case_{index:03d}" for index in range(30)]
    test, pool = hold_out(names, 10, 3)
    assert hold_out(names[::-1], 10, 3) == (test, pool)
    draws = draw_labelled(pool, (5, 1), 20, 3)
    assert len({cases[0] for (count, _), cases in draws.items() if count == 1}) == 20
    for draw in range(1, 21):
        assert set(draws[1, draw]) < set(draws[5, draw]) < set(pool)
    # More draws and other numbers change nothing of those that are there.
    more = draw_labelled(pool[::-1], (1, 2, 5), 20, 3)
    assert draws.items() <= more.items()
    with pytest.raises(PluginError, match=r"only 20 different draw\(s\) of 1 are made"):
        draw_labelled(pool, (1,), 21, 3)
    with pytest.raises(PluginError, match="20 cases are left to train on"):
        draw_labelled(pool, (1, 21), 1, 3)


def test_wrong_input_is_refused(stunet: Stunet, nnunet_folders: Path, tmp_path: Path) -> None:
    raw = nnunet_folders / "nnUNet_raw" / "Dataset007_Mine"
    write_dataset(raw, {"background": 0, "a": 1}, 8)
    unet = unet_checkpoint(tmp_path / "unet.pth", unet_entry())
    weights = torch.load(unet, weights_only=True)
    plans = {**weights["init_args"]["plans"], "dataset_name": "Dataset007_Mine"}
    here = {**weights, "init_args": {**weights["init_args"], "plans": plans, "fold": "all"}}
    torch.save(here, tmp_path / "here.pth")
    weights["network_weights"] = {"blocks.0.attention.weight": torch.ones(3, 3)}
    torch.save(weights, tmp_path / "unknown.pth")
    nnssl_checkpoint(tmp_path / "encoder.pth", unet_entry(), "encoder.")
    some = f"-d 7 -o {tmp_path / 'out'} --test 4 --shots 2"
    for words, message in (
        (f"{unet} random {some} --shots 5", "4 cases are left to train on, fewer than --shots 5"),
        (f"{unet} random {some} --draws 7", "only 4 different draw(s) of 2"),
        (f"{unet} random {some} --test 9", "8 cases of Dataset007_Mine can be tested on"),
        (f"{unet} random {some} --iterations 25", "multiple of 10"),
        (f"{unet} random {some} --shots 1 --rank", "needs --shots 2 or more"),
        (f"{unet} {some}", "at least two candidates"),
        (f"x={unet} x=random {some}", "Two candidates are called x"),
        (f"{unet} random:PlannedTrainer {some}", "training from scratch of each network"),
        (f"{unet} random {some} -p Mine", "there is no"),
        (f"{unet} random {some} --test-names case0 cas1", "Did you mean case1?"),
        (f"{unet} random {some} --test-names case0 --train-names case0 case1", "case0: to test"),
        (f"{tmp_path / 'none.pth'} random {some}", "no such file"),
        (f"{tmp_path / 'unknown.pth'} random {some}", "no network that is known here"),
        (f"{write_v1(tmp_path / 'x.model')} random {some}", "Run: stunet import"),
        (f"{tmp_path / 'encoder.pth'} random {some} --rank", "an encoder without a decoder"),
        # Trained on all cases of this very dataset.
        (f"{tmp_path / 'here.pth'} random {some}", "8 were trained on"),
        (f"{tmp_path / 'here.pth'} random {some} --test-names case0", "weights were trained on"),
        (f"a.b={unet} a_b={unet} {some}", "differ in signs alone"),
    ):
        assert message in stunet.refuse("few-shot", words), words


@pytest.mark.slow
def test_comparison_that_is_interrupted_and_extended(
    nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    root = nnunet_environment.root
    source = root / "ssl.pth"
    spacing = {"pretrain_plan/configurations/onemmiso/spacing": [9, 9, 9]}
    nnssl_checkpoint(source, unet_entry(), prefix="net.", **spacing)
    stock = Stock(nnunet_environment)
    monkeypatch.setattr(run, "run_command", stock)
    for name in ("STUNET_EPOCHS", "STUNET_ITERATIONS", "STUNET_VAL_ITERATIONS"):
        monkeypatch.delenv(name)
    out = root / "few"
    words = ["few-shot", f"ssl={source}", "random", "-d", PHANTOM_ID, "-o", str(out), "--rank"]
    words += ["--test", "2", "--shots", "2", "--iterations", "10", "-np", "1", "--device", "cpu"]
    before = sorted(nnunet_environment.preprocessed.rglob("*"))

    assert main([*words, "--draws", "1", "--check"]) == 0
    said = capfd.readouterr().out
    assert "2 trainings of 10 iterations, each tested on 2 cases; 0 are done." in said
    assert "Time left: about" in said
    assert "nnUNetv2_train" not in stock.ran
    stock.fail_at = 2
    assert main([*words, "--draws", "1"]) == 1
    assert "Finished trainings are kept" in capfd.readouterr().err
    assert main([*words, "--draws", "1"]) == 0
    # What was done was not done again.
    assert stock.ran.count("nnUNetv2_train") == 3
    assert stock.ran.count("nnUNetv2_preprocess") == 1
    said = capfd.readouterr().out
    assert "1 are done" in said
    assert "[1/1] random, 2 labelled case(s), draw 1: Dice" in said

    table = pd.read_csv(out / "scores.csv")
    assert set(table["candidate"]) == {"ssl", "random"}
    settings = json.loads((out / "settings.json").read_text())
    assert sorted(set(table["case"])) == settings["test cases"]
    assert not list(out.rglob("checkpoint_*.pth"))
    report = (out / "few_shot.md").read_text()
    assert "| 2 | ssl - random |" in report
    assert "weighted Kendall tau" in report
    assert (out / "few_shot.png").read_bytes().startswith(b"\x89PNG")
    log = (out / "runs/ssl/2_cases_draw_1/log.txt").read_text()
    assert f"-pretrained_weights {source}" in log
    assert sorted(nnunet_environment.preprocessed.rglob("*")) == before
    assert main([*words, "--draws", "1", "--iterations", "20"]) == 2
    assert "was begun with something else (--iterations)" in capfd.readouterr().err

    # Plans of the user: what trainers want beside them is there, too.
    plans = "ResidualEncoderUNetPlans_like_model"
    folder = next(nnunet_environment.preprocessed.glob(f"Dataset{PHANTOM_ID}_*"))
    shutil.copy(out / "nnUNet_preprocessed" / folder.name / f"{plans}.json", folder)
    words[words.index(str(out))] = str(root / "other")
    assert main([*words, "--draws", "1", "--check", "-p", plans]) == 0
    made = {x.name for x in (root / "other" / "nnUNet_preprocessed" / folder.name).iterdir()}
    assert {"dataset_fingerprint.json", "dataset.json", "splits_final.json"} <= made
    assert "nnUNetPlans.json" not in made
    # Other tests use the workspace, too.
    (folder / f"{plans}.json").unlink()
