"""The experiment on ranking weights: its arithmetic, and the commands it would run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of ``benchmarks/``, which as a script finds its neighbours in its own
    folder."""
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    return importlib.import_module


def test_correlations_of_a_ranking_that_is_right_but_for_one_pair(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    report = benchmarks("ranking_report")
    runs = [
        {
            "name": f"{size} {number}",
            "size": size,
            "seed": seed,
            "dice": 0.5 + 0.1 * number + 0.01 * seed,
            "ccfv": score,
            "published_sums": -score,
            "spread": score,
            "consistency": None if number == 0 else score,
        }
        for size in ("tiny", "small")
        for number, score in enumerate((-4.0, -3.0, -1.0, -2.0))
        for seed in (0, 1)
    ]
    report.write_report(runs, {}, tmp_path / "r.json", tmp_path / "r.png")
    found = json.loads((tmp_path / "r.json").read_text())
    tiny = found["correlations"]["tiny"]
    # Five pairs of six in order; the third and the fourth are not.
    assert tiny["ccfv"]["kendall_tau"] == pytest.approx(4 / 6)
    assert tiny["published_sums"]["kendall_tau"] == pytest.approx(-4 / 6)
    assert (tiny["ccfv"]["candidates"], tiny["consistency"]["candidates"]) == (4, 3)
    assert found["candidates"][1]["dice"] == pytest.approx(0.605)
    assert (
        "| tiny 0 | 0.505 ± 0.005 | -4.00 | 4.00 | -4.00 | n/a |" in (tmp_path / "r.md").read_text()
    )
    assert (tmp_path / "r.png").stat().st_size > 0


def test_variants_follow_from_the_parts(benchmarks: Callable[[str], ModuleType]) -> None:
    report = benchmarks("ranking_report")
    levels = [{"consistency": 2.0, "energy": 0.5}, {"consistency": 4.0, "energy": 1.0}]
    averages = {
        "candidates": [
            {"name": "a", "score": -3.0, "levels": levels},
            {"name": "b", "score": None, "levels": []},
        ]
    }
    sums = {"candidates": [{"name": "b", "score": None}, {"name": "a", "score": -9.0}]}
    found = report.scores_of_ranking(averages, sums)
    assert found["a"] == {
        "ccfv": -3.0,
        "published_sums": -9.0,
        "spread": pytest.approx(-np.log(4)),
        "consistency": -np.log(8),
    }
    assert found["b"] == dict.fromkeys(report.VARIANTS)


def test_dry_run_prints_the_commands_and_writes_nothing(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = benchmarks("ranking")
    data = tmp_path / "data"
    (data / "labelsTr").mkdir(parents=True)
    for index in range(9):
        (data / "labelsTr" / f"case{index}.nii.gz").touch()
    arguments = [
        "--data",
        str(data),
        "--work",
        str(tmp_path / "work"),
        "--test-cases",
        "2",
        "--sizes",
        "tiny",
        "--seeds",
        "1",
    ]
    assert script.main([*arguments, "--cases", "4", "--shares", "1", "0.5", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    ranking = next(line for line in printed.splitlines() if "stunet rank" in line)
    assert "'tiny random=random:STUNetTrainer_tiny'" in ranking
    assert ranking.count("tiny Volume Fusion") == ranking.count("tiny supervised") == 2
    assert printed.count("nnUNetv2_train 905 ") == 5
    assert printed.count("-pretrained_weights") == 4
    assert not (tmp_path / "work").exists()
    assert script.main([*arguments, "--cases", "7", "--dry-run"]) == 2
    assert "No cases are left" in capsys.readouterr().err
    assert (
        script.main([*arguments, "--cases", "4", "--weights", "tiny:x=nothing", "--dry-run"]) == 2
    )
