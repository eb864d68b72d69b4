"""Experiments: their commands, printed without being run, and the arithmetic of their reports."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from stunet_plugin import trainers
from stunet_plugin.errors import PluginError


@pytest.fixture(autouse=True)
def _scripts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("experiments/trainers", "experiments"):
        monkeypatch.syspath_prepend(str(repository / folder))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty raw dataset of nine cases, and the validation of a trained model."""
    for folder in ("data/labelsTr", "model/fold_0/validation"):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(9):
            (tmp_path / folder / f"case{index}.nii.gz").touch()
    return tmp_path / "data"


DRY_RUNS = {
    "volume_fusion": (
        "--groups stunet pctnet fmunet rate classes length --test-cases 2 --cases 4 --seeds 1",
        "-tr VolumeFusionTrainer_STUNet_small -p nnUNetPlans -device cpu",
        "-tr STUNetTrainer_small -p nnUNetPlans -device cpu -pretrained_weights",
    ),
    "ranking": (
        "--test-cases 2 --sizes tiny --seeds 1 --cases 4 --shares 1 0.5",
        "stunet rank 'tiny random=random:STUNetTrainer_tiny' 'tiny supervised=",
    ),
    "hospitals": (
        "--networks pctnet nnunet",
        "stunet plan -pl PCTNetPlanner -d 911",
        "-tr nnUNetTrainerBudget -p nnUNetPlans",
        "stunet merge-datasets 911 916 --train-only 916 -d 919 -n AWithPseudoB_nnunet",
        "stunet crosseval",
    ),
    "fitted_heads": (
        "--test-cases 2 --labelled-cases 2 --seeds 1 --json none.json",
        "STUNET_HEADS=auto nnUNetv2_train 21 3d_fullres_small_batch 1 -tr STUNetTrainer_small_ft",
        "nnUNetv2_train 22 3d_fullres_small_batch 1 -tr STUNetTrainer_small -p",
    ),
    "self_training": (
        "--seeds 1 --json none.json",
        "stunet pseudo-label",
        "stunet merge-datasets 951 961 --train-only 961 -d 981 -n AWithNear1",
        "STUNET_SELF_TRAINING=mean-teacher nnUNetv2_train 991 3d_fullres_small_batch 0 -tr SelfTr",
    ),
    "network_options_hippocampus": (
        "--test-cases 2 --training-cases 2 --seeds 1 --json none.json",
        "nnUNetv2_train 23 3d_fullres_small_batch 0 -tr STUNetTrainer_tiny_GRC -p nnUNetPlans",
        "-tr STUNetTrainer_tiny -p nnUNetPlans_SPM_without_prior -device",
        "-tr UNETRTrainer_tiny_STP_Fast -p nnUNetPlans_UNETR_random -device",
    ),
    "fine_tuning_circle": (
        "--model {model} --json none.json",
        "nnUNetv2_train 15 3d_fullres_small_batch 0 -tr STUNetTrainer_small_ft",
    ),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_the_commands_and_writes_nothing(
    data: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    work, model = data.parent / "work", data.parent / "model"
    options, *expected = [text.format(model=model) for text in DRY_RUNS[name]]
    script = import_module(name)
    arguments = [*options.split(), "--work", str(work), "--dry-run", "--data"]
    assert script.main([*arguments, str(data)]) == 0
    output = capsys.readouterr().out
    for words in expected:
        assert words in output
    known = {*trainers.__all__, *import_module("fast_unetr").TRAINERS}
    assert known.issuperset(re.findall(r"-tr ([A-Z]\w+)", output))
    lines = output.splitlines()
    assert len(lines) == len(set(lines))
    assert not work.exists()
    assert script.main([*arguments, str(data.parent)]) == 2
    assert f"{name}.py: --data" in capsys.readouterr().err


def test_splits_never_mix_and_depend_on_nothing_but_the_names() -> None:
    common, names = import_module("common"), [f"case_{index:03d}" for index in range(217)]
    test, pool = common.hold_out(names, 60, common.SPLIT_SEED)
    assert (len(test), len(pool), len({*test, *pool})) == (60, 157, 217)
    assert common.hold_out(names[::-1], 60, common.SPLIT_SEED) == (test, pool)
    few, more, other = (common.draw_labelled(pool, *draw) for draw in ((1, 4), (1, 8), (2, 4)))
    assert set(few) < set(more) < set(pool) > set(other) != set(few)
    with pytest.raises(PluginError, match="fewer than 158"):
        common.draw_labelled(pool, 1, 158)


def test_report_compares_with_scratch_of_the_same_seed(tmp_path: Path) -> None:
    report, arms = import_module("volume_fusion_report"), import_module("volume_fusion").ARMS
    runs = {"stunet_scratch": (0.5, 0.6), "stunet_pretrained": (0.7, 0.7), "K___8": (0.6,)}
    for arm, dice in runs.items():
        for seed, value in enumerate(dice):
            folder = tmp_path / "fine_tuning" / arm / f"cases_4_seed_{seed}"
            folder.mkdir(parents=True)
            hd95 = 2.0 if (arm, seed) == ("stunet_scratch", 0) else float("nan")
            cases = {"case": {"Anterior": {"DSC": value, "ASSD": 1.0, "HD95": hd95}}}
            scores = {"train_loss": [1, 0.5], "seconds": 9, "cases": cases}
            (folder / "scores.json").write_text(json.dumps(scores))
    names = ("merged", "test_cases", "batch", "pretrain_iterations", "fine_tune_iterations")
    settings = dict.fromkeys((*names, "size", "device", "mirroring"), 1)
    report.write_report(tmp_path, arms, settings, tmp_path / "report.json", tmp_path)
    table = (tmp_path / "report.md").read_text().splitlines()
    distances = "1.000 ± 0.000 | 2.000 ± 0.000 (of 1)"
    assert table[2] == f"| stunet scratch | 4 | 0.550 ± 0.050 |  | {distances} | 2 |"
    assert table[3].startswith("| stunet pretrained | 4 | 0.700 ± 0.000 | +0.200, +0.100 |")
    assert table[4].startswith("| K = 8 | 4 | 0.600 ± 0.000 | +0.100 |")
    # NaN is no JSON.
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)["runs"]
    assert [run["HD95"] for run in found] == [2.0, None, None, None, None]
    assert len(list(tmp_path.glob("volume_fusion_*.png"))) == 3


def test_ranking_that_is_right_but_for_one_pair(tmp_path: Path) -> None:
    script = import_module("ranking")
    levels = [{"consistency": 2.0, "energy": 0.5}, {"consistency": 4.0, "energy": 1.0}]
    none = {"name": "b", "scores": dict.fromkeys(("heads", "inverse", "ccfv"))}
    known = {"heads": 0.5, "inverse": -np.log(4), "ccfv": -3.0}
    averages = [{"name": "a", "scores": known, "levels": levels}, none]
    sums = [none, {"name": "a", "scores": {**known, "ccfv": -9.0}}]
    scores = script.scores_of_ranking({"candidates": averages}, {"candidates": sums})
    expected = {"ccfv": -3.0, "published_sums": -9.0, "consistency": -np.log(8), "heads": 0.5}
    assert scores["a"] == pytest.approx({**expected, "spread": -np.log(4)})
    assert scores["b"] == dict.fromkeys(script.VARIANTS)
    runs = [
        {"name": f"tiny {n}", "size": "tiny", "seed": seed, "dice": 0.5 + 0.1 * n + 0.01 * seed}
        | {"ccfv": score, "published_sums": -score, "spread": score}
        | {"consistency": score if n else None, "heads": score}
        for n, score in enumerate((-4.0, -3.0, -1.0, -2.0))
        for seed in (0, 1)
    ]
    script.write_report(runs, Namespace(), tmp_path / "r.json", tmp_path / "r.png")
    correlations = json.loads((tmp_path / "r.json").read_text())["correlations"]
    found = {one["variant"]: one["kendall_tau"] for one in correlations if one["group"] == "tiny"}
    # Five pairs of six in order; the third and the fourth are not.
    assert found["ccfv"] == pytest.approx(4 / 6) == -found["published_sums"]
    row = "| tiny 0 | 0.505 ± 0.005 | -4.00 | 4.00 | -4.00 | n/a | -4.00 |"
    assert row in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.png").is_file()


def test_network_options_are_compared_by_seeds_and_where_the_budgets_are_alike(
    tmp_path: Path,
) -> None:
    script = import_module("network_options_hippocampus")
    budgets = {name: dict.fromkeys(("iterations", "time"), 20) for name in script.ARMS}
    budgets["SPM"]["time"] = 10
    del budgets["UNETR random"]["time"]
    runs = [
        {"arm": name, "iterations": iterations, "seed": seed}
        | {"mean_validation_dice": 0.5 + seed / 10 + (0.01 * seed + 0.02 if name == "SPM" else 0)}
        for seed in (1, 2)
        for name in script.ARMS
        for iterations in dict.fromkeys(budgets[name].values())
    ]
    found = script.comparisons(runs, budgets)
    pairs = [(one["arm"], one["control"], one["alike"]) for one in found]
    assert len(pairs) == len(set(pairs)) == 12
    assert ("UNETR STP", "UNETR random", "time") not in pairs
    spm = next(one for one in found if one["arm"] == "SPM" and one["alike"] == "time")
    assert (spm["iterations"], spm["control_iterations"]) == (10, 20)
    assert spm["differences"] == pytest.approx([0.03, 0.04])
    low, high = spm["interval"]
    assert spm["mean"] == pytest.approx(0.035)
    assert low < spm["mean"] < high
    row = "| SPM - plain | time (10 / 20) | +0.035 | -0.029 to +0.099 | 2 of 2 | 0.09 |"
    assert row in script.comparison_table(found)
    seconds = dict.fromkeys(script.ARMS, 0.1)
    assert "| SPM | 100 ms | 10 | 0.630, 0.740 | 0.685 |" in script.arm_table(runs, seconds)
    script.save_figure(found, tmp_path / "differences.png")
    assert (tmp_path / "differences.png").is_file()


def test_work_folder_of_other_settings_is_refused(data: Path) -> None:
    given, experiment = {"data": data, "dry_run": False}, import_module("common").Experiment
    for batch in (2, 2):
        experiment(Namespace(work=data.parent / "work", batch=batch, **given))
    with pytest.raises(PluginError, match="batch was 2.*another --work"):
        experiment(Namespace(work=data.parent / "work", batch=4, **given))
