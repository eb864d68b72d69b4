"""Import of PyMIC checkpoints: pretrained weights for fine-tuning, segmentation models that
predict, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from stunet_plugin.cli import main
from stunet_plugin.inference.build_network import build_network
from stunet_plugin.networks.fmunet import DROPOUT, FMUNet
from stunet_plugin.networks.pctnet import PCTNet
from stunet_plugin.weights.pretrained import describe_mismatches

from import_helpers import checkpoint_in, load_model, refuse, stunet_import, write_planned_dataset
from network_helpers import SMALL, randomise

NETWORKS = {"PCTNet": PCTNet, "FMUNet": FMUNet}
PATCHES = {0: (32, 32, 32), 1: (16, 32, 32), 2: (8, 32, 32)}
FIXTURES = [(f"fmunet_mode{mode}_tiny", mode, "") for mode in range(3)] + [
    ("pctnet_mode0_tiny", 0, ""),
    ("pctnet_tiny", 1, "mode1_"),
    ("pctnet_mode2_tiny", 2, ""),
]


@pytest.fixture
def published(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Write a PyMIC checkpoint of a small network with random weights, as PyMIC does; return its
    path."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))

    def write(
        network: str, mode: int, outputs: int = 5, channels: int = 1, change: Any = None
    ) -> Path:
        plain = getattr(importlib.import_module(f"plain_{network.lower()}"), f"Plain{network}")
        sizes = (PATCHES[mode],) if network == "PCTNet" else ()
        built = randomise(plain(channels, outputs, mode, *sizes, *SMALL.values(), DROPOUT, True))
        weights = built.state_dict()
        if change is not None:
            change(weights)
        checkpoint = {
            "iteration": 30000,
            "valid_pred": np.float64(0.8),
            "model_state_dict": weights,
            "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        }
        path = tmp_path / f"{network.lower()}_volf.pt"
        torch.save(checkpoint, path)
        return path

    return write


def small_network(network: str, mode: int, outputs: int, channels: int = 1) -> nn.Module:
    return NETWORKS[network](channels, outputs, mode, **SMALL)


@pytest.mark.parametrize(("network", "mode"), [("PCTNet", 0), ("PCTNet", 2), ("FMUNet", 1)])
def test_pretrained_weights_fit_stock_fine_tuning_for_any_classes(
    published: Callable[..., Path],
    tmp_path: Path,
    network: str,
    mode: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--mode", mode] if network == "PCTNet" else []
    assert stunet_import(published(network, mode), "--out", tmp_path / "model", *options) == 0
    out = capsys.readouterr().out
    file = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    assert f"-tr {network}Trainer_ft -pretrained_weights {file}" in out
    assert f"-pl {network}Planner" in out
    checkpoint = checkpoint_in(tmp_path / "model")
    assert checkpoint["trainer_name"] == f"{network}Trainer"
    assert not any(".seg_layers." in name for name in checkpoint["network_weights"])
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "fold_0",
        "provenance.json",
    ]

    target = small_network(network, mode, outputs=3)
    assert describe_mismatches(target, checkpoint["network_weights"], heads_too=False) == ""
    load_pretrained_weights(target, file)
    own = target.state_dict()
    assert all(
        torch.equal(own[name], value) for name, value in checkpoint["network_weights"].items()
    )
    # Another mode is another network at its first levels.
    other = small_network(network, 1 if mode != 1 else 2, outputs=3)
    assert f"mode {other.mode.number}" in describe_mismatches(
        other, checkpoint["network_weights"], heads_too=False
    )

    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "heads left out" in capsys.readouterr().out


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "mode", "prefix"), FIXTURES, ids=[name for name, _, _ in FIXTURES]
)
def test_segmentation_model_predicts_as_published(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: int, prefix: str
) -> None:
    recorded = np.load(shared / "fixtures" / f"{name}.npz")
    patch = recorded["input"].shape[2:]
    options = [
        "--spacing",
        3,
        1,
        1,
        "--patch-size",
        *patch,
        "--labels",
        "background",
        "a",
        "b",
        "c",
        "d",
    ]
    modes = ["--mode", mode] if name.startswith("pctnet") else []
    assert (
        stunet_import(
            shared / "fixtures" / f"{name}.pt", "--out", tmp_path / "model", *options, *modes
        )
        == 0
    )
    predictor = load_model(tmp_path / "model", monkeypatch)
    with torch.no_grad():
        output = predictor.network(torch.from_numpy(recorded["input"]))
    assert np.abs(output.numpy() - recorded[f"{prefix}output_0"]).max() <= 1e-5
    plans, dataset = (
        json.loads((tmp_path / "model" / f"{file}.json").read_text())
        for file in ("plans", "dataset")
    )
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["architecture"]["arch_kwargs"]["mode"] == mode
    assert (configuration["spacing"], configuration["patch_size"]) == ([3, 1, 1], list(patch))
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert plans["image_reader_writer"] == "SimpleITKIO"
    assert list(dataset["labels"]) == ["background", "a", "b", "c", "d"]


def test_segmentation_model_of_any_outputs_predicts_a_whole_image(
    published: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = published("FMUNet", 1, outputs=3)
    assert (
        stunet_import(
            source, "--out", tmp_path / "model", "--spacing", 1, 1, 1, "--patch-size", 16, 32, 32
        )
        == 0
    )
    predictor = load_model(tmp_path / "model", monkeypatch)
    image = np.random.default_rng(0).normal(size=(1, 20, 40, 36)).astype(np.float32)
    predicted = predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})
    assert predicted.shape == image.shape[1:]
    assert set(np.unique(predicted)) <= {0, 1, 2}
    labels = json.loads((tmp_path / "model" / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "class_1": 1, "class_2": 2}


@pytest.mark.parametrize("network", NETWORKS)
def test_other_image_channels(published: Callable[..., Path], tmp_path: Path, network: str) -> None:
    """By default copies of an image give what the image gave, since norms behind the stem have
    learned its response."""
    source, mode = published(network, 1), ["--mode", 1]
    for channels in (1, 4):
        assert (
            stunet_import(
                source, "--out", tmp_path / str(channels), "--in-channels", channels, *mode
            )
            == 0
        )
    one, four = (small_network(network, 1, 2, channels).eval() for channels in (1, 4))
    for network_, channels in ((one, 1), (four, 4)):
        load_pretrained_weights(
            network_, tmp_path / str(channels) / "fold_0" / "checkpoint_final.pth"
        )
    four.decoder.seg_layers.load_state_dict(one.decoder.seg_layers.state_dict())
    x = torch.randn(1, 1, 16, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(four(x.expand(-1, 4, -1, -1, -1)), one(x), rtol=1e-3, atol=1e-3)
    mismatches = describe_mismatches(
        four, checkpoint_in(tmp_path / "1")["network_weights"], heads_too=False
    )
    assert "--in-channels 4" in mismatches


def test_own_checkpoints_are_read_too(
    published: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--spacing", 1, 1, 1, "--patch-size", 16, 32, 32]
    assert (
        stunet_import(published("PCTNet", 1), "--out", tmp_path / "model", "--mode", 1, *options)
        == 0
    )
    file = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    capsys.readouterr()
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert "nnU-Net v2 checkpoint of this plugin's PCT-Net" in out
    assert "PCTNet of no published size in mode 1 (widths [4, 8, 16, 32, 64])" in out
    assert stunet_import(file, "--out", tmp_path / "again", "--in-channels", 2) == 0
    assert "mode 1, not 2. Leave --mode out" in refuse(
        capsys, file, tmp_path / "out" / "model", "--mode", "2"
    )


@pytest.mark.parametrize(
    ("network", "mode", "patch"), [("PCTNet", 1, [16, 32, 32]), ("FMUNet", 0, [32, 32, 32])]
)
def test_plans_like_a_segmentation_model(
    published: Callable[..., Path],
    network: str,
    mode: int,
    patch: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan has the model's spacing and patch and carries its widths, so that the weights fit
    what a trainer builds for it."""
    folder = write_planned_dataset(tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    options = [
        "--spacing",
        3,
        1,
        1,
        "--patch-size",
        *patch,
        *(["--mode", mode] if network == "PCTNet" else []),
    ]
    assert stunet_import(published(network, mode), "--out", tmp_path / "model", *options) == 0
    capsys.readouterr()
    assert main(["plan-like", str(tmp_path / "model"), "-d", "7"]) == 0
    name = f"{network}Plans_like_mode{mode}"
    assert f"-p {name} -tr {network}Trainer_ft -pretrained_weights" in capsys.readouterr().out
    plans = json.loads((folder / f"{name}.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert (plans["dataset_name"], configuration["spacing"], configuration["patch_size"]) == (
        folder.name,
        [3, 1, 1],
        patch,
    )
    assert configuration["median_image_size_in_voxels"] == [200 / 3, 150, 120]
    manager = PlansManager(plans)
    built = build_network(
        f"{network}Trainer",
        manager,
        manager.get_configuration("3d_fullres"),
        1,
        3,
        deep_supervision=True,
    )
    assert (
        describe_mismatches(
            built, checkpoint_in(tmp_path / "model")["network_weights"], heads_too=False
        )
        == ""
    )


def test_what_has_no_plan_says_what_to_do(
    published: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_planned_dataset(tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    source = published("PCTNet", 1)
    assert stunet_import(source, "--out", tmp_path / "pretext", "--mode", 1) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "pretext")]) == 0
    said = capsys.readouterr().out
    assert (
        "none, as these are the weights of a pretext task: fine-tune with the dataset's own, of"
        " PCTNetPlanner" in said
    )
    for given, advice in (
        (
            tmp_path / "pretext",
            (
                "any plan of PCTNet in mode 1. Take the dataset's own: nnUNetv2_plan_and_preprocess"
                " -d 7"
            ),
        ),
        (source, "--spacing Z Y X --patch-size Z Y X"),
    ):
        assert main(["plan-like", str(given), "-d", "7"]) == 2
        message = capsys.readouterr().err
        assert "has no plan" in message
        assert advice in message
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "nnUNetPlans.json"]


def test_other_widths_than_the_plans_are_named(
    published: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    assert stunet_import(published("FMUNet", 0), "--out", tmp_path / "model", "--mode", 0) == 0
    assert (
        'Then write:   "features_per_stage": [4, 8, 16, 32, 64] into the arch_kwargs'
        in capsys.readouterr().out
    )
    weights = torch.load(
        tmp_path / "model" / "fold_0" / "checkpoint_final.pth", weights_only=False
    )["network_weights"]
    with torch.device("meta"):
        network = FMUNet(
            1, 3, mode=0, features_per_stage=(8, 16, 32, 64, 128), deep_supervision=True
        )
    assert "The weights have other widths than the plan's network" in describe_mismatches(
        network, weights, heads_too=False
    )


def test_a_pretext_checkpoint_of_ours_is_not_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "checkpoint_final.pth"
    arguments = {"dataset_json": {"volume_fusion": {"classes": 4}}}
    torch.save(
        {
            "network_weights": small_network("FMUNet", 1, 5).state_dict(),
            "trainer_name": "VolumeFusionTrainer_FMUNet",
            "init_args": arguments,
        },
        file,
    )
    assert f"fine-tune with -pretrained_weights {file}" in refuse(capsys, file, tmp_path / "model")


@pytest.mark.parametrize("network", NETWORKS)
def test_inspect(
    published: Callable[..., Path], network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(published(network, 2))]) == 0
    out = capsys.readouterr().out
    assert f"PyMIC checkpoint of {'PCT-Net' if network == 'PCTNet' else network}" in out
    assert "1 input channel(s), 5 outputs" in out
    assert "30000" in out
    assert ("--mode N" in out) == (network == "PCTNet")
    assert ("in mode 2" in out) == (network == "FMUNet")


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda weights: weights.pop(name)


def with_value(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda weights: weights.update({name: value})


QKV = "pyramid_ct.convtrans_d2.trans.blocks.0.attn.qkv.weight"
TABLE = "pyramid_ct.convtrans_e2.trans.blocks.0.attn.relative_position_bias_table"
COUNTER = "pyramid_ct.down3.conv.0.num_batches_tracked"
REFUSED: dict[str, tuple[str, Any, tuple[str, ...], str]] = {
    "no mode": (
        "PCTNet",
        None,
        (),
        "holds the stems and heads of all three anisotropy modes. Choose yours with --mode: 0 ",
    ),
    "unknown mode": ("PCTNet", None, ("--mode", "3"), "Unknown anisotropy mode 3. Modes: 0 "),
    "the other mode": ("FMUNet", None, ("--mode", "0"), "holds a FMUNet in mode 1, not 0"),
    "strides": (
        "FMUNet",
        None,
        ("--spacing", "1", "1", "1", "--patch-size", "16", "32", "32", "--strides", "2,2,2"),
        "FMUNet of no published size in mode 1 has the strides [[1, 2, 2], [2, 2, 2]",
    ),
    "patch that does not fit": (
        "FMUNet",
        None,
        ("--spacing", "1", "1", "1", "--patch-size", "20", "32", "32"),
        "must be divisible by [8, 16, 16], but it is [20, 32, 32]",
    ),
    "labels without a plan": (
        "FMUNet",
        None,
        ("--labels", "background", "a"),
        "Give the spacing and the patch size",
    ),
    "labels of another number": (
        "FMUNet",
        None,
        (
            "--labels",
            "background",
            "a",
            "--spacing",
            "1",
            "1",
            "1",
            "--patch-size",
            "16",
            "32",
            "32",
        ),
        "have 5 outputs, background included, but the labels (--labels) are 2",
    ),
    "pretext and labels": (
        "FMUNet",
        None,
        ("--pretext", "--labels", "background", "a"),
        "Leave one or the other out",
    ),
    "missing tensor": (
        "PCTNet",
        without(QKV),
        ("--mode", "1"),
        "tensors are missing (for example decoder.blocks.1.transformer",
    ),
    "missing stem": (
        "PCTNet",
        without("embeddings.1.proj.weight"),
        ("--mode", "1"),
        "that tell its sizes are missing",
    ),
    "unknown tensor": (
        "PCTNet",
        with_value("extra.weight", torch.ones(2)),
        ("--mode", "1"),
        "'extra.weight' is not a parameter",
    ),
    "misshapen": (
        "PCTNet",
        with_value(QKV, torch.ones(3, 3)),
        ("--mode", "1"),
        "tensors have the wrong shape for widths [4, 8",
    ),
    "flat kernel": (
        "FMUNet",
        with_value("project.weight", torch.ones(4, 1)),
        (),
        "expected a convolution with 3 axes",
    ),
    "kernels of no mode": (
        "FMUNet",
        with_value("project.weight", torch.ones(4, 1, 5, 5, 5)),
        (),
        "which are those of no mode",
    ),
    "larger windows": (
        "PCTNet",
        with_value(TABLE, torch.ones(13**3, 4)),
        ("--mode", "1"),
        "windows are 7 voxels long",
    ),
    "table of no window": (
        "PCTNet",
        with_value(TABLE, torch.ones(100, 4)),
        ("--mode", "1"),
        "100 is none of 1, 27",
    ),
    "text for a table": (
        "PCTNet",
        with_value(TABLE, "x"),
        ("--mode", "1"),
        "is a str, not a tensor",
    ),
    "fractional counter": (
        "PCTNet",
        with_value(COUNTER, torch.ones(())),
        ("--mode", "1"),
        "no plain tensor",
    ),
    "NaN": (
        "FMUNet",
        with_value("project.bias", torch.full((4,), torch.nan)),
        (),
        "hold NaN or infinite values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_and_leaves_nothing(
    published: Callable[..., Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network, change, options, message = REFUSED[name]
    assert message in refuse(
        capsys, published(network, 1, change=change), tmp_path / "out" / "model", *options
    )


def test_outputs_that_could_be_anything_need_a_word(
    published: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published("FMUNet", 1, outputs=3)
    assert "has 3 outputs, and a PyMIC checkpoint of FMUNet does not say" in refuse(
        capsys, source, tmp_path / "out" / "model"
    )
    assert stunet_import(source, "--out", tmp_path / "model", "--pretext") == 0


def test_truncated_file_is_refused(
    published: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published("FMUNet", 1)
    source.write_bytes(source.read_bytes()[:-3000])
    assert "it is truncated" in refuse(capsys, source, tmp_path / "out" / "model")


def test_a_mode_for_stunet_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from import_helpers import write_v1

    message = refuse(
        capsys, write_v1(tmp_path / "x.model"), tmp_path / "out" / "model", "--mode", "1"
    )
    assert "which has no anisotropy modes. Leave --mode out" in message


def test_default_place_in_nnunet_results(
    published: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable, raising=False)
    assert stunet_import(published("PCTNet", 0), "--mode", 2, "--dataset-id", 103) == 0
    folder = tmp_path / "results" / "Dataset103_pctnet_volf_mode2" / "PCTNetTrainer__pretext__mode2"
    assert checkpoint_in(folder)["init_args"]["mode"] == 2
    record = json.loads((folder / "provenance.json").read_text())
    assert record["format"] == "PyMIC checkpoint of PCT-Net"
