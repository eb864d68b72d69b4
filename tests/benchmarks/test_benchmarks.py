"""Benchmarks: the plain networks are the same functions, the memory meter is right, scripts run."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stunet_plugin.cli import main
from stunet_plugin.pretraining.subvolumes import stretch
from stunet_plugin.pretraining.volume_fusion import TiledBlocks, VolumeFusion

from import_helpers import make_network, published_weights, v1_plans, write_v1


@pytest.fixture(autouse=True)
def _scripts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))


def test_both_networks_have_the_same_outputs_and_gradients() -> None:
    script, patch = import_module("measure_step"), (32, 32, 64)
    ours, plain = (network.double() for network in script.build_pair("tiny", 3, patch))
    data = torch.randn(1, 1, *patch, dtype=torch.float64)
    outputs = [network(data) for network in (ours, plain)]
    assert len(outputs[0]) == 5
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for heads in outputs:
        sum(head.square().mean() for head in heads).backward()
    gradients = {name: value.grad for name, value in plain.named_parameters()}
    own = {name: value.grad for name, value in ours.named_parameters()}
    largest = float(max(gradient.abs().max() for gradient in own.values()))
    assert largest > 0
    translated = script.find_subject("tiny").translate(gradients)
    torch.testing.assert_close(own, translated, rtol=0, atol=1e-9 * largest)


def test_allocation_peak_counts_what_lives_at_the_same_time() -> None:
    kept = []

    def allocate() -> None:
        kept.append(torch.empty(1000, dtype=torch.uint8))
        for size in (5000, 3000):
            torch.empty(size, dtype=torch.uint8)

    assert import_module("measure_step").allocation_peak(allocate) == 6000


def test_parts_of_unetr_add_up_to_its_prediction() -> None:
    script, patch = import_module("network_options"), (32, 32, 32)
    found = script.architectures("tiny", patch)
    assert len(found) == 10
    network = script.build(found["UNETR tiny STP 0.5"])
    seconds = script.measure(network, torch.randn(2, 1, *patch))
    assert seconds.keys() == {"prediction", "step", "encoder", "MTA", "decoder"}
    assert all(value > 0 for value in seconds.values())
    assert not any(module._forward_hooks for module in network.modules())
    rounds = {part: [value, 9.0, 0.0] for part, value in seconds.items()}
    row = {"parameters": 1, "gmac": 2, "peak_gb": 3, "seconds": rounds}
    shown = " | ".join(f"{seconds[part]:.3f}" for part in ("step", "prediction", "encoder"))
    assert f"| one | 1 | 2.00 | 3.00 | {shown} |" in script.table({"one": row})


@pytest.mark.slow
def test_step_writes_a_report_and_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, out = import_module("step"), tmp_path / "report.json"
    options = "--networks tiny --patch 32 32 64 --repeats 1 --steps 1 --device cpu"
    assert script.main(f"{options} --modes train --out {out}".split()) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["mode"] == "train"
    for key, ratio in (("seconds", "time"), ("peak_bytes", "memory")):
        ours, plain = (result["networks"][one][key]["median"] for one in ("ours", "plain"))
        assert result["ratios"][ratio]["median"] == pytest.approx(ours / plain)
    # Less memory in training is what our order of operations is for.
    assert 0 < result["ratios"]["memory"]["median"] < 0.95
    assert script.main(["--table", str(out)]) == 0
    assert "| tiny | train |" in capsys.readouterr().out
    profile = f"{options} --out {out}.json --profile --modes inference --peak-tflops 1"
    assert script.main(profile.split()) == 0
    for row in json.loads(Path(f"{out}.json").read_text())["rows"]:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["share_of_peak"] > 0


@pytest.mark.parametrize("options", ["--out", "--steps 0 --out", "--patch 32 32 32 --out"])
def test_wrong_input_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    (tmp_path / "present.json").write_text("{}")
    out = tmp_path / ("present.json" if options == "--out" else "new.json")
    assert import_module("step").main(["--device", "cpu", *options.split(), str(out)]) == 2
    assert capsys.readouterr().err.startswith("step.py: ")
    assert [path.name for path in tmp_path.iterdir()] == ["present.json"]


@pytest.mark.slow
def test_cpu_engine_reports_a_share_of_the_published_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.json"
    words = ["cpu_engine", "tiny", "--edge", "64", "--outputs", "3", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--json", str(out)])
    for variable in ("STUNET_HOME", "STUNET_CPU_PRECISION"):
        monkeypatch.setenv(variable, str(tmp_path))  # The script changes them.
    script = import_module("cpu_engine")
    monkeypatch.setattr(script, "MATRIX", 256)
    assert script.main() == 0
    (found,) = json.loads(out.read_text())["networks"]
    seconds = {way: spread["median"] for way, spread in found["seconds"].items()}
    expected = seconds["float32"] / seconds["published"]
    assert found["of_published"]["float32"]["median"] == pytest.approx(expected)


def test_label_agreement_of_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, folder, out = import_module("label_agreement"), tmp_path / "model", tmp_path / "a.json"
    weights = published_weights(make_network(outputs=5))
    source = write_v1(tmp_path / "m.model", weights, v1_plans())
    names = ["background", *(f"c{number}" for number in range(1, 5))]
    assert main(["import", str(source), "--out", str(folder), "--labels", *names]) == 0
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(40, 40, 80)))
    sitk.WriteImage(image, str(tmp_path / "a_0000.nii.gz"))
    words = ["label_agreement", str(folder), str(tmp_path / "a_0000.nii.gz"), "--json", str(out)]
    monkeypatch.setattr("sys.argv", words)
    for variable in ("STUNET_CPU", "STUNET_CPU_PRECISION"):
        monkeypatch.setenv(variable, "auto")  # The script changes them.
    assert script.main() == 0
    shares = json.loads(out.read_text())["share_of_equal_labels"]
    assert all(share["to exact"] > 0.95 for share in shares.values())
    assert shares["exact"]["to exact"] == 1


def test_published_pipeline_computes_what_ours_does() -> None:
    plain = import_module("plain_volume_fusion")
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16))
    low, high = np.percentile(image, [1.5, 99.0])
    ours = stretch(torch.from_numpy(image), float(low), float(high))
    assert ours.numpy() == pytest.approx(plain.contrast(image.copy(), 1.5, 99.0))

    random.seed(0)
    patch = (32, 64, 64)
    published = np.mean([plain.tile_classes(patch) == 0 for _ in range(300)])
    scheme = TiledBlocks(smallest=(8 / 32, 8 / 64, 8 / 64), largest=(1.0, 0.5, 0.5))
    fusion, generator = VolumeFusion(4, scheme), np.random.default_rng(0)
    drawn = fusion.draw_class_maps(torch.empty(300, *patch), generator)
    assert float((drawn == 0).float().mean()) == pytest.approx(published, abs=0.02)


def test_pipeline_reports_ours_beside_plain(tmp_path: Path) -> None:
    script, out = import_module("volume_fusion_pipeline"), tmp_path / "report.json"
    size = "--patch 16 24 24 --volume 24 40 40 --samples 2 --repeats 1 --out"
    assert script.main([*size.split(), str(out)]) == 0
    assert json.loads(out.read_text())["ours_over_plain"]["median"] > 0
