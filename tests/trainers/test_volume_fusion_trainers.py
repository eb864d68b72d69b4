"""Pretraining inside nnU-Net: any network, any labels, K + 1 outputs, weights that fit the
segmentation trainer, refusals."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet_plugin import trainers
from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining.cases import check_fold, describe_cases
from stunet_plugin.pretraining.score import (
    confusion_matrix,
    dice_per_class,
    overlap_counts,
    pretext_score,
)
from stunet_plugin.trainers.volume_fusion_trainers import NETWORKS, TRAINERS
from stunet_plugin.weights.pretrained import describe_misfits

from conftest import PHANTOM_ID, Workspace

TINY = "VolumeFusionTrainer_STUNet_tiny"
REGIONS = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
}
SMALL_PATCH = [16, 32, 32]
FEW_POOLINGS = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]


@pytest.fixture
def plans(nnunet_environment: Workspace) -> dict[str, Any]:
    """The phantoms' plans with a narrow, shallow U-Net and a small patch."""
    content = {**copy.deepcopy(nnunet_environment.plans()), "continue_training": False}
    chosen = content["configurations"]["3d_fullres"]
    chosen["patch_size"] = SMALL_PATCH
    kwargs = chosen["architecture"]["arch_kwargs"]
    kwargs.update(
        n_stages=3, features_per_stage=[4, 8, 8], strides=FEW_POOLINGS, kernel_sizes=[[3, 3, 3]] * 3
    )
    kwargs.update(n_conv_per_stage=[1] * 3, n_conv_per_stage_decoder=[1] * 2)
    return content


@pytest.fixture
def make(plans: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def build(
        name: str = TINY, configuration: str = "3d_fullres", fold: int | str = 0, **options: str
    ) -> Any:
        for variable, value in options.items():
            monkeypatch.setenv(variable, value)
        return TRAINERS[name](
            copy.deepcopy(plans), configuration, fold, REGIONS, torch.device("cpu")
        )  # type: ignore[arg-type]

    return build


def test_there_is_a_trainer_for_every_network() -> None:
    names = [name for name in trainers.__all__ if name.startswith("VolumeFusionTrainer")]
    assert names == list(TRAINERS)
    assert {
        "VolumeFusionTrainer",
        "VolumeFusionTrainer_STUNet_huge",
        "VolumeFusionTrainer_PCTNet",
    } <= set(names)
    for trainer in TRAINERS.values():
        assert (
            trainer.segmentation_trainer == "nnUNetTrainer"
            or trainer.segmentation_trainer in trainers.__all__
        )


def test_a_name_that_does_not_exist_is_answered_with_the_nearest(capsys: Any) -> None:
    assert not hasattr(trainers, "VolumeFusionTrainer_STUNet_bse")
    assert "Did you mean VolumeFusionTrainer_STUNet_base?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        ("VolumeFusionTrainer", "3d_fullres"),
        (TINY, "3d_fullres"),
        (TINY, "2d"),
        ("VolumeFusionTrainer_FMUNet", "3d_fullres"),
    ],
)
def test_a_step_trains_k_plus_1_outputs_whatever_the_labels(
    make: Callable[..., Any], plans: dict[str, Any], name: str, configuration: str
) -> None:
    plans["configurations"]["2d"]["patch_size"] = [32, 64]
    trainer = make(name, configuration, STUNET_VF_CLASSES="2", nnUNet_n_proc_DA="0")
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    training, validation = trainer.get_dataloaders()
    fused = trainer._fuse(next(training))
    outputs = trainer.network(fused["data"])
    assert [output.shape[2:] for output in outputs] == [
        target.shape[2:] for target in fused["target"]
    ]
    assert [output.shape[1] for output in outputs] == [3] * len(outputs)
    assert fused["target"][0].max() == 2
    assert np.isfinite(trainer.train_step(next(training))["loss"])
    without = [
        key for key, parameter in trainer.network.named_parameters() if parameter.grad is None
    ]
    assert without == []
    with torch.no_grad():
        counts = trainer.validation_step(next(validation))
    assert len(counts["tp_hard"]) == 3
    assert counts["tp_hard"].sum() + counts["fp_hard"].sum() == fused["target"][0].numel()


def test_class_0_counts_in_the_dice_loss(make: Callable[..., Any]) -> None:
    trainer = make()
    trainer.initialize()
    assert trainer.loss.loss.dc.do_bg
    assert not trainer.label_manager.has_regions
    assert trainer.label_manager.ignore_label is None
    assert trainer.dataset_json["labels"] == {
        "background": 0,
        "alpha 1/4": 1,
        "alpha 2/4": 2,
        "alpha 3/4": 3,
        "alpha 1": 4,
    }


@pytest.mark.parametrize(
    "name",
    ["VolumeFusionTrainer", "VolumeFusionTrainer_STUNet_small", "VolumeFusionTrainer_FMUNet"],
)
def test_optimizer_is_the_published_one_for_every_network(name: str) -> None:
    trainer = TRAINERS[name].__new__(TRAINERS[name])
    trainer.initial_lr = trainer.learning_rate
    optimizer = trainer.make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"], trainer.epochs) == (
        1e-3,
        1e-5,
        1000,
    )


def test_seed_makes_the_draws_the_same(make: Callable[..., Any]) -> None:
    first, second = (make(STUNET_SEED="5") for _ in range(2))
    assert torch.equal(
        *(torch.rand(3, generator=trainer._fusion_draws) for trainer in (first, second))
    )


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.suffix or "planned")
def test_weights_fit_the_segmentation_trainer(plans: dict[str, Any], network: Any) -> None:
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    pretext = TRAINERS[f"VolumeFusionTrainer{network.suffix}"]
    fine_tuning = getattr(trainers, network.fine_tuned_by, network.trainer)
    with torch.device("meta"):
        weights = pretext.build_network_architecture(manager, configuration, 1, 5).state_dict()
        segmentation = fine_tuning.build_network_architecture(manager, configuration, 1, 3)
    assert describe_misfits(segmentation, weights, heads_too=False) == ""
    assert "another shape" in describe_misfits(segmentation, weights, heads_too=True)


def test_one_case_is_enough_with_fold_all(
    make: Callable[..., Any], nnunet_environment: Workspace, tmp_path: Path
) -> None:
    source = nnunet_environment.dataset_folder(nnunet_environment.preprocessed)
    target = tmp_path / source.name
    shutil.copytree(
        source, target, ignore=lambda folder, names: [name for name in names if "splits" in name]
    )
    data = target / "nnUNetPlans_3d_fullres"
    case = sorted(data.glob("*.pkl"))[0].stem
    for file in data.iterdir():
        if not file.name.startswith(case):
            file.unlink()
    trainer = make(
        fold="all",
        nnUNet_preprocessed=str(tmp_path),
        nnUNet_n_proc_DA="0",
        STUNET_VAL_ITERATIONS="1",
    )
    trainer.initialize()
    training, _ = trainer.get_dataloaders()
    assert set(next(training)["keys"]) == {case}
    trainer.perform_actual_validation()
    score = json.loads(Path(trainer.output_folder, "validation", "pretext_score.json").read_text())
    assert (score["cases"], score["held_out"]) == (1, False)
    lines = describe_cases(data, "all", expected=6)
    assert lines[0].startswith("Only 1 of the 6 cases of dataset.json are preprocessed"), lines
    before = sorted(nnunet_environment.results.rglob("*"))
    with pytest.raises(
        PluginError,
        match=r"1 case.s., too few for nnU-Net's 5 folds.*3d_fullres all -tr VolumeFusion",
    ):
        make(fold=0)
    assert sorted(nnunet_environment.results.rglob("*")) == before


def test_splits_that_do_not_fit_the_cases(tmp_path: Path) -> None:
    data, splits = tmp_path / "data", tmp_path / "splits_final.json"
    data.mkdir()
    for case in "abc":
        (data / f"{case}.b2nd").touch()
    splits.write_text(
        json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["a", "gone"], "val": ["b", "c"]}])
    )
    check_fold(data, 0, "")
    (line,) = describe_cases(data, 0, expected=3)
    assert line.startswith("1 preprocessed case(s) are not used"), line
    with pytest.raises(
        PluginError,
        match="names 1 case.s. for fold 1 that are not preprocessed in .*, for example gone",
    ):
        check_fold(data, 1, "")
    check_fold(data, 7, "")
    assert describe_cases(data, 7, expected=3) == describe_cases(data, "all", expected=3) == []
    splits.write_text("[")
    with pytest.raises(PluginError, match="splits_final.json is damaged"):
        check_fold(data, 0, "")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"STUNET_VF_CLASSES": "0"}, "STUNET_VF_CLASSES='0' must be an integer from 1 to 255"),
        ({}, {"STUNET_VF_SCHEME": "2024"}, "STUNET_VF_SCHEME='2024' must be one of 2023, 2025"),
        (
            {},
            {"STUNET_VF_SMALLEST": "0.5", "STUNET_VF_LARGEST": "0.2"},
            "smallest 0.5 and largest 0.2",
        ),
        (
            {},
            {"STUNET_VF_LARGEST": "0.05", "STUNET_VF_SMALLEST": "0.01"},
            r"patch of \[16, 32, 32\] voxels is too small",
        ),
        (
            {"previous_stage": "3d_lowres"},
            {},
            "second stage of a cascade.*Pretrain 3d_lowres or 3d_fullres",
        ),
        ({"data_identifier": "nowhere"}, {}, "not preprocessed.*nnUNetv2_preprocess -d 901"),
    ],
)
def test_refusals_leave_nothing_behind(
    make: Callable[..., Any],
    plans: dict[str, Any],
    nnunet_environment: Workspace,
    change: dict[str, Any],
    options: dict[str, str],
    message: str,
) -> None:
    plans["configurations"]["3d_fullres"].update(change)
    before = sorted(nnunet_environment.results.rglob("*"))
    with pytest.raises(PluginError, match=message):
        make(**options)
    assert sorted(nnunet_environment.results.rglob("*")) == before


def test_planned_network_without_strides_is_refused(
    make: Callable[..., Any], plans: dict[str, Any]
) -> None:
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = {"embed_dim": 8}
    with pytest.raises(
        PluginError,
        match="VolumeFusionTrainer needs a plan whose network has one output per resolution stage",
    ):
        make("VolumeFusionTrainer")


def test_missing_files_of_cases_are_named(
    make: Callable[..., Any], nnunet_environment: Workspace, tmp_path: Path
) -> None:
    source = nnunet_environment.dataset_folder(nnunet_environment.preprocessed)
    shutil.copytree(source, tmp_path / source.name)
    label = sorted((tmp_path / source.name / "nnUNetPlans_3d_fullres").glob("*_seg.b2nd"))[0]
    label.unlink()
    with pytest.raises(
        PluginError,
        match=(
            f"1 file.s. of preprocessed cases are missing .*{label.name}.*nnUNetv2_preprocess again"
        ),
    ):
        make(nnUNet_preprocessed=str(tmp_path))


def test_training_cannot_be_continued_with_other_blocks(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make()
    trainer.initialize()
    checkpoint = str(tmp_path / "checkpoint_latest.pth")
    trainer.save_checkpoint(checkpoint)
    make().load_checkpoint(checkpoint)
    with pytest.raises(
        PluginError,
        match=r"that training had classes 4, now 2\. Set the STUNET_VF_ options as they were",
    ):
        make(STUNET_VF_CLASSES="2").load_checkpoint(checkpoint)


def test_score_is_of_all_draws_together() -> None:
    class_map = torch.tensor([[[0, 0, 1, 2]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 0]]]), 3).movedim(-1, 1).float()
    confusion = confusion_matrix(logits, class_map)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert [counts.tolist() for counts in overlap_counts(confusion)] == [
        [1, 1, 0],
        [1, 1, 0],
        [1, 0, 1],
    ]
    assert dice_per_class(confusion) == pytest.approx([2 / 4, 2 / 3, 0])
    score = pretext_score([confusion, confusion], ["0", "1/2", "1"])
    assert score["dice_per_alpha"]["1/2"] == pytest.approx(2 / 3)
    assert score["accuracy"] == 0.5
    assert score["mean_absolute_error_of_alpha"] == pytest.approx((0.5 + 1) / 4)
    assert score["mean_dice_of_batches"] == {
        "mean": pytest.approx(7 / 18),
        "standard_deviation": 0,
        "batches": 2,
    }


@pytest.mark.slow
def test_stock_commands_pretrain_and_fine_tune(
    phantoms: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    phantoms.run("nnUNetv2_train", PHANTOM_ID, "3d_fullres", 0, "-tr", TINY, "-device", "cpu")
    model = phantoms.model(TINY)
    fold = model / "fold_0"
    for name in (
        "volume_fusion_epoch_0000.png",
        "volume_fusion_epoch_0001.png",
        "progress.png",
        "checkpoint_final.pth",
    ):
        assert (fold / name).is_file(), name
    score = json.loads((fold / "validation" / "pretext_score.json").read_text())
    assert score["held_out"]
    assert list(score["dice_per_alpha"]) == ["0", "1/4", "2/4", "3/4", "1"]
    assert np.sum(score["confusion"]["voxels"]) == 10 * 2 * np.prod(
        phantoms.plans()["configurations"]["3d_fullres"]["patch_size"]
    )
    # Trainers of other tests, made in this process, have logs there too.
    log = max(fold.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime).read_text()
    assert "Pretext Dice {'0':" in log
    weights = fold / "checkpoint_final.pth"
    assert (
        torch.load(weights, weights_only=False)["network_weights"][
            "decoder.seg_layers.0.weight"
        ].shape[0]
        == 5
    )

    tuned = phantoms.run(
        "nnUNetv2_train",
        PHANTOM_ID,
        "3d_fullres",
        1,
        "-tr",
        "STUNetTrainer_tiny_ft",
        "-device",
        "cpu",
        "-pretrained_weights",
        weights,
        "--disable_checkpointing",
    )
    assert f"come from {TINY}" in tuned.stdout
    assert "no pretrained weights were given" not in tuned.stdout

    for key, value in phantoms.environment.items():
        if key.startswith("nnUNet_"):
            monkeypatch.setenv(key, value)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    with pytest.raises(
        PluginError, match="pretrained with Volume Fusion.*Fine-tune it.*-tr STUNetTrainer_tiny_ft"
    ):
        predictor.initialize_from_trained_model_folder(os.fspath(model), (0,))
