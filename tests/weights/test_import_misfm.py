"""Import of PyMIC checkpoints: pretrained weights for fine-tuning, and models that segment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from stunet_plugin.inference.build_network import build_network
from stunet_plugin.networks.fmunet import DROPOUT, FMUNet
from stunet_plugin.networks.pctnet import PCTNet
from stunet_plugin.weights.pretrained import describe_mismatches

import import_helpers as helpers
from conftest import Stunet
from network_helpers import SMALL, plain_module, randomise

NETWORKS = {"PCTNet": PCTNet, "FMUNet": FMUNet}
PATCHES = {0: (32, 32, 32), 1: (16, 32, 32), 2: (8, 32, 32)}
SEGMENTS = "--spacing 3 1 1 --patch-size 16 32 32"
QKV = "pyramid_ct.convtrans_d2.trans.blocks.0.attn.qkv.weight"
TABLE = "pyramid_ct.convtrans_e2.trans.blocks.0.attn.relative_position_bias_table"
STEM, OUR_STEM = "project.weight", "encoder.stages.0.0.weight"
Published = Callable[..., Path]


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """Write a PyMIC checkpoint of a small network with random weights, as PyMIC does; changes to
    None remove."""

    def write(network: str, mode: int, outputs: int = 5, changes: Any = None) -> Path:
        plain = getattr(plain_module(network.lower()), f"Plain{network}")
        sizes = (PATCHES[mode],) if network == "PCTNet" else ()
        module = randomise(plain(1, outputs, mode, *sizes, *SMALL.values(), DROPOUT, True))
        weights = module.state_dict() | (changes or {})
        checkpoint = {
            "iteration": 30000,
            "valid_pred": np.float64(0.8),
            "model_state_dict": {key: x for key, x in weights.items() if x is not None},
        }
        torch.save(checkpoint, path := tmp_path / f"{network.lower()}_volf.pt")
        return path

    return write


def small_network(network: str, mode: int, channels: int = 1) -> nn.Module:
    return NETWORKS[network](channels, 3, mode, **SMALL)


def mismatches(network: nn.Module, folder: Path) -> str:
    weights = helpers.checkpoint_in(folder)["network_weights"]
    return describe_mismatches(network, weights, heads_too=False)


@pytest.mark.parametrize(("network", "mode"), [("PCTNet", 0), ("PCTNet", 2), ("FMUNet", 1)])
def test_pretrained_weights_fit_stock_fine_tuning_for_any_classes(
    published: Published, stunet: Stunet, nnunet_folders: Path, network: str, mode: int
) -> None:
    source, is_pctnet = published(network, mode), network == "PCTNet"
    said = stunet("inspect", source)
    assert f"PyMIC checkpoint of {'PCT-Net' if is_pctnet else network}" in said
    assert "1 input channel(s), 5 outputs" in said
    assert ("--mode N" in said) == is_pctnet

    said = stunet("import", source, "--dataset-id 103", f"--mode {mode}" if is_pctnet else "")
    out = nnunet_folders / "nnUNet_results" / f"Dataset103_{network.lower()}_volf_mode{mode}"
    out /= f"{network}Trainer__pretext__mode{mode}"
    assert f"-tr {network}Trainer_ft -pretrained_weights {helpers.checkpoint_of(out)}" in said
    assert f"-pl {network}Planner" in said
    assert '"features_per_stage": [4, 8, 16, 32, 64]' in said, "not the widths of the planner"
    assert f"fine-tune with the dataset's own, of {network}Planner" in stunet("inspect", out)
    checkpoint = helpers.checkpoint_in(out)
    weights = checkpoint["network_weights"]
    assert checkpoint["trainer_name"] == f"{network}Trainer"
    assert not any(".seg_layers." in name for name in weights)
    assert {path.name for path in out.iterdir()} == {"fold_0", "provenance.json"}

    target = small_network(network, mode)
    assert mismatches(target, out) == ""
    load_pretrained_weights(target, helpers.checkpoint_of(out))
    assert all(torch.equal(target.state_dict()[name], value) for name, value in weights.items())
    # Another mode is another network at its first levels.
    other = small_network(network, 1 if mode != 1 else 2)
    assert f"mode {other.mode.number}" in mismatches(other, out)

    # Copies of an image give what it gave, since norms behind the stem have learned its response.
    four = stunet.model(source, f"--mode {mode}", "--in-channels 4")
    one, wide = (helpers.checkpoint_in(x)["network_weights"][OUR_STEM] for x in (out, four))
    torch.testing.assert_close(wide.sum(1), one.sum(1))
    assert "--in-channels 4" in mismatches(small_network(network, mode, 4), out)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "mode", "prefix"),
    [
        *((f"fmunet_mode{mode}_tiny", mode, "") for mode in range(3)),
        ("pctnet_mode0_tiny", 0, ""),
        ("pctnet_tiny", 1, "mode1_"),
        ("pctnet_mode2_tiny", 2, ""),
    ],
)
def test_segmentation_model_predicts_as_published(
    shared: Path, stunet: Stunet, name: str, mode: int, prefix: str
) -> None:
    recorded = np.load(shared / "fixtures" / f"{name}.npz")
    patch = recorded["input"].shape[2:]
    plan = ("--spacing 3 1 1 --patch-size", *patch, "--labels background a b c d")
    option = f"--mode {mode}" if name.startswith("pctnet") else ""
    model = stunet.model(shared / "fixtures" / f"{name}.pt", *plan, option)
    with torch.no_grad():
        network = helpers.load_model(model, stunet.patch).network
        output = network(torch.from_numpy(recorded["input"]))
    # Of the largest output: the recorded ones are as far from those in double precision.
    expected = recorded[f"{prefix}output_0"]
    assert np.abs(output.numpy() - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    written = helpers.configuration(model)
    assert written["architecture"]["arch_kwargs"]["mode"] == mode
    assert (written["spacing"], written["patch_size"]) == ([3, 1, 1], list(patch))
    assert written["normalization_schemes"] == ["ZScoreNormalization"]
    assert helpers.read(model)["image_reader_writer"] == "SimpleITKIO"
    assert list(helpers.read(model, "dataset")["labels"]) == ["background", "a", "b", "c", "d"]


def test_own_checkpoints_are_read_too(published: Published, stunet: Stunet, tmp_path: Path) -> None:
    file = helpers.checkpoint_of(stunet.model(published("PCTNet", 1), "--mode 1", SEGMENTS))
    said = stunet("inspect", file)
    assert "nnU-Net v2 checkpoint of this plugin's PCT-Net" in said
    assert "PCTNet of no published size in mode 1 (widths [4, 8, 16, 32, 64])" in said
    assert "mode 1, not 2" in stunet.refuse_import(file, "--mode 2")
    # Without a plan other outputs than those of the pretext task could be anything.
    assert "has 3 outputs" in stunet.refuse_import(published("FMUNet", 1, outputs=3))

    pretext = {
        "network_weights": small_network("FMUNet", 1).state_dict(),
        "init_args": {"dataset_json": {"volume_fusion": {"classes": 4}}},
    }
    torch.save(pretext, file := tmp_path / "checkpoint_final.pth")
    assert f"-pretrained_weights {file}" in stunet.refuse_import(file)


def test_plans_like_a_segmentation_model(
    published: Published, stunet: Stunet, planned: Path
) -> None:
    """The plan has the model's spacing, patch and widths, so that the weights fit what a trainer
    builds for it."""
    source, name = published("PCTNet", 1), "PCTNetPlans_like_mode1"
    model = stunet.model(source, "--mode 1", SEGMENTS)
    said = stunet("plan-like", model, "-d 7")
    assert f"-p {name} -tr PCTNetTrainer_ft -pretrained_weights" in said
    written = helpers.configuration(planned, name)
    assert (written["spacing"], written["patch_size"]) == ([3, 1, 1], [16, 32, 32])
    assert written["median_image_size_in_voxels"] == [200 / 3, 150, 120]
    manager = PlansManager(helpers.read(planned, name))
    chosen = manager.get_configuration("3d_fullres")
    built = build_network("PCTNetTrainer", manager, chosen, 1, 3, deep_supervision=True)
    assert mismatches(built, model) == ""
    message = stunet.refuse("plan-like", stunet.model(source, "--mode 1"), "-d 7")
    assert "has no plan" in message
    assert "nnUNetv2_plan_and_preprocess -d 7" in message


@pytest.mark.parametrize(
    ("network", "options", "changes", "message"),
    [
        ("PCTNet", "", {}, "--mode"),
        ("FMUNet", "--mode 0", {}, "mode 1, not 0"),
        ("FMUNet", f"{SEGMENTS} --strides 2,2,2", {}, "[[1, 2, 2], [2, 2, 2]"),
        ("FMUNet", "--spacing 1 1 1 --patch-size 20 32 32", {}, "divisible by [8, 16, 16]"),
        ("FMUNet", "--pretext --labels background a", {}, "--pretext"),
        ("PCTNet", "--mode 1", {QKV: None}, "missing (for example decoder.blocks.1.transformer"),
        ("PCTNet", "--mode 1", {QKV: torch.ones(3, 3)}, "wrong shape for widths [4, 8"),
        ("PCTNet", "--mode 1", {TABLE: torch.ones(13**3, 4)}, "windows are 7 voxels long"),
        ("FMUNet", "", {STEM: torch.ones(4, 1, 5, 5, 5)}, "no mode"),
    ],
)
def test_wrong_options_and_weights_are_refused(
    published: Published, stunet: Stunet, network: str, options: str, changes: Any, message: str
) -> None:
    assert message in stunet.refuse_import(published(network, 1, changes=changes), options)
