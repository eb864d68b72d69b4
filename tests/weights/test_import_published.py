"""Imported weights compute what the published code computes; the four published files; memory;
other input channels."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stunet_plugin.commands.import_ import Import
from stunet_plugin.networks.from_plan import resolve
from stunet_plugin.networks.presets import get_preset
from stunet_plugin.weights.choose_plan import choose_labels, choose_plan, published_facts
from stunet_plugin.weights.identify import Origin
from stunet_plugin.weights.locate import Source
from stunet_plugin.weights.safe_loading import load_plans_pickle
from stunet_plugin.weights.stunet import read_stunet

from import_helpers import (
    checkpoint_in,
    load_model,
    make_network,
    published_weights,
    refuse,
    stunet_import,
    v1_checkpoint,
    v1_plans,
    write_v1,
)

TOLERANCE = 1e-5
"""Largest difference relative to the largest output: the fixtures' own float32 rounding is of that
size."""

V2_OPTIONS = [
    *(
        "--spacing",
        "1",
        "1",
        "1",
        "--patch-size",
        "8",
        "64",
        "64",
        "--labels",
        "background",
        "a",
        "b",
    ),
    *("--strides", "1,2,2", "1,2,2", "2,2,2", "2,2,2", "1,2,2"),
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A v1 checkpoint of random weights with its .pkl."""
    return write_v1(tmp_path / "source" / "tiny.model")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "file", "options", "trainer"),
    [
        ("stunet_v1_tiny", "stunet_v1_tiny.model", [], "STUNetTrainer_tiny"),
        ("stunet_v2_tiny", "stunet_v2_tiny.pth", V2_OPTIONS, "STUNetTrainer"),
    ],
)
def test_fixtures_give_their_recorded_outputs(
    name: str,
    file: str,
    options: list[str],
    trainer: str,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert stunet_import(shared / "fixtures" / file, "--out", tmp_path / "model", *options) == 0
    recorded = np.load(shared / "fixtures" / f"{name}.npz")
    image = torch.from_numpy(recorded["input"])
    predictor = load_model(tmp_path / "model", monkeypatch)
    assert predictor.trainer_name == trainer
    assert predictor.allowed_mirroring_axes == (0, 1, 2)
    with torch.inference_mode():
        predicted = predictor._internal_maybe_mirror_and_predict(image).numpy()
        windows = predictor.predict_sliding_window_return_logits(image[0]).float().numpy()
        predictor.network.decoder.deep_supervision = True
        outputs = predictor.network(image)
    assert len(outputs) == sum(key.startswith("output_") for key in recorded)
    for index, output in enumerate(outputs):
        expected = recorded[f"output_{index}"]
        assert np.abs(output.numpy() - expected).max() <= TOLERANCE * max(
            1.0, np.abs(expected).max()
        )
    expected = recorded["output_0"]
    assert np.abs(predicted - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())
    # nnU-Net adds windows up in half precision.
    assert np.abs(windows - expected[0]).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.shared
def test_facts_are_those_of_the_published_pickles(shared: Path) -> None:
    facts = published_facts()
    order = json.loads((shared / "fixtures" / "official" / "label_orders.json").read_text())
    assert facts["labels"] == [order[str(value)] for value in range(105)]
    assert facts["labels"][1:] == sorted(facts["labels"][1:])
    for name in facts["checkpoints"]:
        published = load_plans_pickle(shared / "fixtures" / "official" / f"{name}.pkl")["plans"]
        as_json = json.loads(json.dumps(published))
        assert {key: as_json[key] for key in facts["plans"]} == facts["plans"]


@pytest.mark.shared
def test_published_small_imports_with_and_without_its_pickle(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = published_weights(make_network("small", 1, 105))
    official = shared / "fixtures" / "official" / "small_ep4k.model.pkl"
    folders = []
    for name, plans in (("with", pickle.loads(official.read_bytes())), ("without", {})):
        path = write_v1(tmp_path / name / "small_ep4k.model", weights, plans)
        folders.append(tmp_path / f"model_{name}")
        assert stunet_import(path, "--out", folders[-1]) == 0
    assert "those of small_ep4k.model" in capsys.readouterr().out
    assert (folders[0] / "plans.json").read_text() == (folders[1] / "plans.json").read_text()
    plans, dataset = (
        json.loads((folders[1] / f"{name}.json").read_text()) for name in ("plans", "dataset")
    )
    strides = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"]
    assert strides == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]]
    assert plans["dataset_name"] == "Dataset101_TotalSegmentator"
    assert (dataset["labels"]["spleen"], len(dataset["labels"])) == (77, 105)
    predictor = load_model(folders[1], monkeypatch)
    assert predictor.trainer_name == "STUNetTrainer_small"
    assert (
        sum(value.numel() for value in predictor.network.parameters())
        == get_preset("small").parameters
    )


@pytest.mark.shared
@pytest.mark.parametrize("size", ["large", "huge"])
def test_published_large_and_huge_are_recognised(size: str, shared: Path) -> None:
    """Up to the writing, which is the same for all sizes: 1.8 and 5.8 GB are too much for a test.

    The tensors are reserved, not touched, so they take no memory; names and shapes are all that is
    looked at.
    """
    with torch.device("meta"):
        network = make_network(size, 1, 105)
    checkpoint = v1_checkpoint(
        {name: torch.empty(value.shape) for name, value in published_weights(network).items()}
    )
    file = Path(f"{size}_ep4k.model")
    weights = read_stunet(Origin.V1, checkpoint, checkpoint["state_dict"], file)
    assert weights.trainer == f"STUNetTrainer_{size}"
    assert f"{get_preset(size).parameters:,} parameters" in weights.description
    plans = []
    for pickled in (shared / "fixtures" / "official" / f"{file}.pkl", None):
        source = Source(str(file), file, pickled)
        plan = choose_plan(source, weights, Import(str(file)))
        plan.check_network(weights)
        labels = choose_labels(source, weights, plan, None)
        labels.check_outputs(weights.outputs)
        assert labels.names[77] == "spleen"
        plans.append(plan.to_plans(weights, "Dataset101_TotalSegmentator"))
    assert plans[0] == plans[1]
    chosen = plans[0]["configurations"]["3d_fullres"]
    resolved = resolve(chosen, get_preset(size), f"STUNetTrainer_{size}")
    assert resolved.architecture == chosen["architecture"]


IMPORT_AND_MEASURE = """
import resource, sys
from stunet_plugin.weights.import_model import import_checkpoint
from stunet_plugin.commands.import_ import Import
tiny, small, out = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
import_checkpoint(Import(tiny, out=out + "/tiny"))
before = peak()
import_checkpoint(Import(small, out=out + "/small"))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_import_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    """In a process of its own, with an optimizer state of the same size beside the weights;
    libraries do not count."""
    tiny = write_v1(tmp_path / "tiny.model")
    weights = published_weights(make_network("small", 1, 105))
    content = v1_checkpoint(weights)
    content["optimizer_state_dict"]["state"] = {
        index: {"momentum_buffer": torch.ones_like(value)}
        for index, value in enumerate(weights.values())
    }
    path = tmp_path / "small_ep4k.model"
    torch.save(content, path)
    size = sum(value.numel() * 4 for value in weights.values())
    assert path.stat().st_size > 2 * size
    command = [sys.executable, "-c", IMPORT_AND_MEASURE, str(tiny), str(path), str(tmp_path)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(result.stdout.splitlines()[-1]) <= 1.3 * size
    assert (
        size < (tmp_path / "small" / "fold_0" / "checkpoint_final.pth").stat().st_size < 1.01 * size
    )


@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 3), (3, 1), (2, 2)])
def test_stem_for_other_channels(old: int, new: int, tmp_path: Path) -> None:
    """With the same image in all channels: `mean` keeps the response, `repeat` multiplies it by new
    / old."""
    network = make_network(channels=old).eval()
    source = write_v1(tmp_path / "x.model", published_weights(network), v1_plans(channels=old))
    image = torch.randn(1, 1, 32, 32, 64, generator=torch.Generator().manual_seed(1))
    images = {channels: image.expand(-1, channels, -1, -1, -1) for channels in (old, new)}
    for stem, factor in (("mean", 1.0), ("repeat", new / old)):
        assert (
            stunet_import(source, "--out", tmp_path / stem, "--in-channels", new, "--stem", stem)
            == 0
        )
        plans, dataset = (
            json.loads((tmp_path / stem / f"{name}.json").read_text())
            for name in ("plans", "dataset")
        )
        assert (
            len(dataset["channel_names"])
            == len(plans["configurations"]["3d_fullres"]["normalization_schemes"])
            == new
        )
        inflated = make_network(channels=new).eval()
        inflated.load_state_dict(checkpoint_in(tmp_path / stem)["network_weights"])
        with torch.inference_mode():
            for name in network.keys_to_in_proj:
                layer, original = (module.get_submodule(name) for module in (inflated, network))
                response, before = layer(images[new]), original(images[old])
                bias = original.bias[:, None, None, None]
                torch.testing.assert_close(
                    response - bias, factor * (before - bias), rtol=1e-4, atol=1e-5
                )
                if old == new:
                    assert torch.equal(layer.weight, original.weight)
            if stem == "mean":
                torch.testing.assert_close(
                    inflated(images[new]), network(images[old]), rtol=1e-3, atol=1e-3
                )


def test_stem_refuses_no_channels(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "at least 1, not 0" in refuse(
        capsys, tiny, tmp_path / "out" / "model", "--in-channels", "0"
    )
