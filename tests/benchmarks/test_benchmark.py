"""The benchmark of the training step: its yardstick is the same function, its memory meter is
right, its script runs."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PATCH = (32, 32, 64)
CLASSES = 3


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of ``benchmarks/``, which as a script finds its neighbours in its own
    folder."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def measure_step(benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return benchmarks("measure_step")


def test_both_networks_are_the_same_function(measure_step: ModuleType) -> None:
    case = measure_step.Case("ours", "tiny", "agreement", False, "cpu", PATCH, 1, CLASSES, 1)
    found = measure_step.agreement(case)
    assert found["outputs"] == 5
    assert found["largest_output"] > 1
    assert found["largest_difference"] <= 1e-5 * found["largest_output"]


@pytest.mark.parametrize("name", ["PCTNet-mode1", "FMUNet-mode2"])
def test_networks_of_misfm_are_the_same_function_at_full_width(
    measure_step: ModuleType, name: str
) -> None:
    """At a size from which predictions on the CPU go slab by slab."""
    found = measure_step.agreement(
        measure_step.Case("ours", name, "agreement", False, "cpu", (16, 64, 112), 1, CLASSES, 1)
    )
    assert found["outputs"] == 4
    # The instance norms of FMUNet magnify rounding: of either network, to 1e-5 off a float64 run.
    assert found["largest_difference"] <= 3e-5 * found["largest_output"]


def test_both_networks_have_the_same_gradients(measure_step: ModuleType) -> None:
    ours, plain = (network.double() for network in measure_step.build_pair("tiny", CLASSES, PATCH))
    data = torch.randn(1, 1, *PATCH, dtype=torch.float64)
    for network in (ours, plain):
        sum(output.square().mean() for output in network(data)).backward()
    translated = measure_step.find_subject("tiny").translate(
        {name: value.grad for name, value in plain.named_parameters()}
    )
    own = {name: value.grad for name, value in ours.named_parameters()}
    assert own.keys() == translated.keys()
    largest = max(gradient.abs().max() for gradient in own.values())
    assert largest > 0
    assert all((own[name] - translated[name]).abs().max() <= 1e-9 * largest for name in own)


def test_allocation_peak_counts_what_lives_at_the_same_time(measure_step: ModuleType) -> None:
    mebibyte = 2**20

    def allocate() -> None:
        first = torch.empty(mebibyte, dtype=torch.uint8)
        second = torch.empty(2 * mebibyte, dtype=torch.uint8)
        del first
        third = torch.empty(mebibyte // 2, dtype=torch.uint8)
        del second, third

    assert measure_step.allocation_peak(allocate) == 3 * mebibyte


def test_allocation_peaks_of_parts(measure_step: ModuleType) -> None:
    kept = []

    def allocate() -> None:
        with torch.profiler.record_function("first"):
            kept.append(torch.empty(1000, dtype=torch.uint8))
            torch.empty(5000, dtype=torch.uint8)
        with torch.profiler.record_function("second"):
            torch.empty(3000, dtype=torch.uint8)

    assert measure_step.allocation_peaks(allocate, ["first", "second"]) == {
        "first": 6000,
        "second": 4000,
    }


def test_operations_have_kinds(benchmarks: Callable[[str], ModuleType]) -> None:
    kind_of = benchmarks("profile_step").kind_of
    names = {
        "aten::mkldnn_convolution": "convolution",
        "aten::convolution_backward": "convolution backward",
        "aten::_foreach_add_": "optimizer",
        "aten::_log_softmax_backward_data": "loss",
        "aten::native_group_norm": "norm and activation",
        "aten::cat": "concatenation and upsampling",
        "aten::copy_": "copies",
        "aten::add_": "sums and products",
        "aten::argmax": "other",
    }
    assert {name: kind_of(name) for name in names} == names


def test_script_writes_a_report_and_its_table(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    settings = [
        "--sizes",
        "tiny",
        "--patch",
        *PATCH,
        "--repeats",
        1,
        "--steps",
        1,
        "--classes",
        CLASSES,
        "--device",
        "cpu",
    ]
    finished = subprocess.run(
        [
            sys.executable,
            str(repository / "benchmarks" / "stunet_step.py"),
            *map(str, settings),
            "--out",
            str(out),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr

    report = json.loads(out.read_text())
    assert {"date", "machine", "versions", "settings", "agreement", "results"} <= report.keys()
    assert {"cpu", "cores", "threads", "gpu"} == report["machine"].keys()
    assert {"torch", "nnunetv2", "stunet-plugin"} <= report["versions"].keys()
    assert all(result["patch"] == list(PATCH) for result in report["results"])
    assert report["agreement"].keys() == {"tiny"}
    assert [(result["size"], result["mode"]) for result in report["results"]] == [
        ("tiny", "train"),
        ("tiny", "inference"),
    ]
    for result in report["results"]:
        networks = result["networks"]
        for key, ratio in (("seconds", "time"), ("peak_bytes", "memory")):
            ours, plain = networks["ours"][key]["median"], networks["plain"][key]["median"]
            assert math.isfinite(ours)
            assert min(ours, plain) > 0
            assert result["ratios"][ratio]["median"] == pytest.approx(ours / plain)
        assert (
            networks["ours"]["max_rss_bytes"]["median"] > networks["ours"]["peak_bytes"]["median"]
        )
    # Less memory in training is what our order of operations is for.
    assert report["results"][0]["ratios"]["memory"]["median"] < 0.95
    assert "| tiny | train |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "arguments", [("--table",), ("--out",), ("--patch", "32", "32", "32", "--out")]
)
def test_wrong_input_is_told_before_anything_is_measured(
    benchmarks: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    present = tmp_path / "present.json"
    present.write_text("{}")
    assert benchmarks("stunet_step").main(["--device", "cpu", *arguments, str(present)]) == 2
    assert arguments[0] in capsys.readouterr().err
    assert present.read_text() == "{}"


def test_one_mode_can_be_measured_alone(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inference of huge fits a memory that its training does not."""
    measured = []

    def run_worker(case: Any) -> dict[str, Any]:
        if case.mode == "agreement":
            return {"gpu": None, "outputs": 5, "largest_difference": 0.0, "largest_output": 1.0}
        measured.append((case.size, case.mode))
        return {"seconds": [1.0], "peak_bytes": 1, "reserved_bytes": None, "max_rss_bytes": 1}

    monkeypatch.setattr(benchmarks("side_by_side"), "run_worker", run_worker)
    out = tmp_path / "report.json"
    assert (
        benchmarks("stunet_step").main(
            [
                *(
                    "--sizes",
                    "large",
                    "huge",
                    "--modes",
                    "inference",
                    "--device",
                    "cpu",
                    "--repeats",
                    "1",
                    "--out",
                    str(out),
                )
            ]
        )
        == 0
    )
    assert set(measured) == {("large", "inference"), ("huge", "inference")}
    assert json.loads(out.read_text())["settings"]["modes"] == ["inference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "1"), "--patch and --mode go together"),
        (("--mode", "0", "--patch", "24", "32", "32"), "must be divisible by [16, 16, 16]"),
        (("--mode", "2", "--patch", "4", "16", "16"), "leaves a single voxel"),
    ],
)
def test_wrong_patches_for_misfm_are_told_before_anything_is_measured(
    benchmarks: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    out = tmp_path / "new.json"
    assert benchmarks("misfm_step").main(["--device", "cpu", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
