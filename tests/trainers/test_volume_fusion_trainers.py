"""Pretraining inside nnU-Net; test_all_trainers.py trains and resumes all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin import trainers
from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining import score
from stunet_plugin.trainers.volume_fusion_trainers import NETWORKS
from stunet_plugin.weights.identify import Origin, read_weights
from stunet_plugin.weights.pretrained import describe_mismatches

from conftest import PHANTOM_ID, Workspace
from trainer_helpers import PATCH, RESIDUAL, Make, started

TINY = "VolumeFusionTrainer_STUNet_tiny"
REGIONS = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
}


@pytest.mark.parametrize("name", ["VolumeFusionTrainer", "VolumeFusionTrainer_FMUNet"])
def test_trains_k_plus_1_outputs_whatever_the_labels(make: Make, name: str) -> None:
    trainer = started(make(name, dataset=REGIONS, options={"STUNET_VF_CLASSES": 2}))
    assert trainer.dataset_json["labels"] == {"background": 0, "alpha 1/2": 1, "alpha 1": 2}
    assert not trainer.label_manager.has_regions
    assert trainer.label_manager.ignore_label is None
    assert trainer.loss.loss.dc.do_bg  # class 0 counts like the others
    training, validation = trainer.get_dataloaders()
    fused = trainer._fuse(next(training))
    assert {output.shape[1] for output in trainer.network(fused["data"])} == {3}
    assert fused["target"][0].max() == 2
    with torch.no_grad():
        counts = trainer.validation_step(next(validation))
    assert len(counts["tp_hard"]) == 3
    assert counts["tp_hard"].sum() + counts["fp_hard"].sum() == fused["target"][0].numel()


@pytest.mark.parametrize("suffix", NETWORKS)
def test_weights_fit_the_segmentation_trainer(make: Make, suffix: str) -> None:
    pretext = make(f"VolumeFusionTrainer{suffix}")
    plan = pretext.plans_manager, pretext.configuration_manager
    network, fine_tuned_by = NETWORKS[suffix]
    fine_tuning = trainers.TRAINERS.get(fine_tuned_by, network)
    with torch.device("meta"):
        weights = pretext.build_network_architecture(*plan, 1, 5).state_dict()
        segmentation = fine_tuning.build_network_architecture(*plan, 1, 3)
    assert describe_mismatches(segmentation, weights, heads_too=False) == ""
    assert "another shape" in describe_mismatches(segmentation, weights, heads_too=True)


def test_one_case_is_enough_and_an_unlearned_task_is_said_loudly(
    make: Make, nnunet_environment: Workspace, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    source = nnunet_environment.dataset_folder(nnunet_environment.preprocessed)
    data = tmp_path / source.name / "nnUNetPlans_3d_fullres"
    case = min(path.stem for path in (source / data.name).glob("*.pkl"))
    data.mkdir(parents=True)
    for file in (*source.glob("*.json"), *(source / data.name).glob(f"{case}*")):
        if "splits" not in file.name:
            shutil.copy(file, tmp_path / file.relative_to(source.parent))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    trainer = started(make(TINY, fold="all"))
    assert set(next(trainer.get_dataloaders()[0])["keys"]) == {case}
    for limit in (-1.0, 1.1):
        monkeypatch.setattr(score, "UNLEARNED_DICE", limit)
        capsys.readouterr()
        trainer.perform_actual_validation()
        warned = "not learned its task: Dice near 0" in capsys.readouterr().out
        assert warned == (limit > 1)
    file = Path(trainer.output_folder, "validation", "pretext_score.json")
    content = json.loads(file.read_text())
    assert (content["cases"], content["held_out"]) == (1, False)
    assert np.sum(content["confusion"]["voxels"]) == 10 * 2 * np.prod(PATCH)
    with pytest.raises(PluginError, match=r"too few .*3d_fullres all -tr VolumeFusion"):
        make(TINY)


def test_training_cannot_be_resumed_with_other_blocks(make: Make, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoint_latest.pth")
    started(make(TINY)).save_checkpoint(checkpoint)
    make(TINY).load_checkpoint(checkpoint)
    with pytest.raises(PluginError, match="had classes 4, now 2. Set the STUNET_VF_ options"):
        make(TINY, options={"STUNET_VF_CLASSES": 2}).load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["VolumeFusionTrainer", TINY])
def test_the_final_checkpoint_says_where_its_encoder_is(
    make: Make, tmp_path: Path, name: str
) -> None:
    """In nnssl's way, so that nnU-Net's development version, where it is installed, reads it."""
    trainer = started(make(name, **({} if name == TINY else {"architecture": RESIDUAL})))
    file = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    content = torch.load(file, weights_only=True)
    plan, network = content["nnssl_adaptation_plan"], trainer.network
    for key in ("key_to_encoder", "key_to_stem", *plan["keys_to_in_proj"]):
        network.get_submodule(plan.get(key, key))
    assert plan["architecture_plans"]["arch_class_name"].endswith(type(network).__name__)
    (images,) = plan["pretrain_plan"]["configurations"].values()
    assert images["patch_size"] == plan["recommended_downstream_patchsize"] == PATCH
    assert read_weights(file).origin is not Origin.NNSSL
    make(name, **({} if name == TINY else {"architecture": RESIDUAL})).load_checkpoint(str(file))
    reader = pytest.importorskip(
        "nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer",
        reason="needs an nnU-Net that reads checkpoints of nnssl",
    )
    chosen = trainer.configuration_manager
    other = trainer.build_network_architecture(trainer.plans_manager, chosen, 1, 3)
    keys = [plan[f"key{x}"] for x in ("_to_encoder", "_to_stem", "s_to_in_proj", "_to_lpe")]
    load = reader.PretrainedTrainer.load_pretrained_weights
    load(other, str(file), 1, 1, PATCH, PATCH, *keys)
    for key, value in network.encoder.state_dict().items():
        assert torch.equal(other.encoder.state_dict()[key], value)


@pytest.mark.slow
def test_stock_commands_pretrain_and_fine_tune(phantoms: Workspace) -> None:
    train = ("nnUNetv2_train", PHANTOM_ID, "3d_fullres")
    phantoms.run(*train, 0, "-tr", TINY, "-device", "cpu")
    fold = phantoms.model(TINY) / "fold_0"
    pictures = ("volume_fusion_epoch_0000.png", "volume_fusion_epoch_0001.png", "progress.png")
    assert all((fold / name).is_file() for name in pictures)
    content = json.loads((fold / "validation" / "pretext_score.json").read_text())
    assert content["held_out"]
    assert list(content["dice_per_alpha"]) == ["0", "1/4", "2/4", "3/4", "1"]
    weights = ("-pretrained_weights", fold / "checkpoint_final.pth", "--disable_checkpointing")
    tuned = phantoms.run(*train, 1, "-tr", "STUNetTrainer_tiny_ft", "-device", "cpu", *weights)
    assert f"come from {TINY}" in tuned.stdout
    assert "no pretrained weights were given" not in tuned.stdout
