"""Training on simulated prompts inside nnU-Net; test_all_trainers.py trains and resumes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.prompts import curve
from stunet_plugin.prompts.channels import CHANNELS
from stunet_plugin.prompts.simulation import IGNORED

from conftest import PHANTOM_ID, Workspace
from trainer_helpers import DATASET, Make, batch_for, small_plans, started

TINY = "PromptTrainer_STUNet_tiny"
REGIONS = {
    **DATASET,
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2], "ignore": 4},
    "regions_class_order": [1, 2],
}


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_two_outputs_and_prompt_channels_whatever_the_labels(
    make: Make, configuration: str
) -> None:
    trainer = started(make("PromptTrainer", configuration))
    assert trainer.dataset_json["labels"] == {"background": 0, "object": 1}
    assert trainer.dataset_json["prompts"]["labels"] == DATASET["labels"]
    assert len(trainer.classes.foreground_labels) == 5
    assert not trainer.loss.loss.dc.batch_dice
    training, validation = trainer.get_dataloaders()
    batch = next(training)
    simulated = trainer.simulate(batch, 2)
    assert simulated["data"].shape[1] == 1 + CHANNELS
    assert simulated["data"].shape[2:] == batch["data"].shape[2:]
    assert [x.shape for x in simulated["target"]] == [x.shape for x in batch["target"]]
    assert {int(x) for x in simulated["target"][0].unique()} <= {0, 1}
    counts = trainer.validation_step(next(validation))
    assert len(counts["tp_hard"]) == 4
    assert len(set(counts["tp_hard"] + counts["fn_hard"])) == 1, "the object stays the same"


def test_regions_and_the_ignore_label(make: Make) -> None:
    trainer = started(make("PromptTrainer", dataset=REGIONS))
    assert trainer.dataset_json["labels"] == {"background": 0, "object": 1, "ignore": 2}
    batch = batch_for(trainer)
    labels = batch["target"][0][:, 0]
    labels[:, :4] = 4

    # As nnU-Net's transform hands them over: regions, then what is ignored.
    def regions(target: torch.Tensor) -> torch.Tensor:
        parts = [(target >= 1) & (target <= 3), target == 2, target == 4]
        return torch.cat(parts, 1)

    batch["target"] = [regions(target) for target in batch["target"]]
    for _ in range(3):
        target = trainer.simulate(batch, 1)["target"][0][:, 0]
        assert (target[:, :4] == IGNORED).all() or (target == IGNORED).any()
        assert np.isfinite(trainer.train_step(batch)["loss"])


def test_images_alone_are_images_without_prompts(make: Make) -> None:
    trainer = started(make(TINY))
    network = trainer.network.eval()
    network.decoder.deep_supervision = False
    x = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    empty = torch.cat((x, x.new_zeros(1, CHANNELS, *x.shape[2:])), 1)
    with torch.no_grad():
        assert torch.equal(network(x), network(empty))
    assert next(iter(network.state_dict())).startswith("encoder."), "names as in the bare network"


def test_step_0_is_the_pretrained_network(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = started(make("STUNetTrainer_tiny"))
    file = tmp_path / "pretrained.pth"
    source.save_checkpoint(str(file))
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    trainer = make(f"{TINY}_ft")
    trainer.initialize()
    trainer.load_pretrained_weights(str(file))
    trainer.on_train_start()
    data = trainer.simulate(batch_for(trainer), 1)["data"]
    assert data[:, 1:].any()
    for one, other in zip(
        source.network.encoder(data[:, :1]), trainer.network.encoder(data), strict=True
    ):
        assert torch.equal(one, other)
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text()
    assert "Prompt channels start at zero" in log
    assert "Segmentation heads by" not in log
    # A promptable model's weights are taken as they are; others say how many channels they have.
    trainer.save_checkpoint(str(file))
    make(f"{TINY}_ft")
    with pytest.raises(PluginError, match="take 8 input channel.s., this data has 2 and 7 for"):
        make(f"{TINY}_ft", dataset={**DATASET, "channel_names": {"0": "CT", "1": "CT"}})


def test_the_curve_of_the_validation_cases(
    make: Make, nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = nnunet_environment.dataset_folder(nnunet_environment.raw)
    dataset = json.loads((raw / "dataset.json").read_text())
    trainer = started(make("PromptTrainer", dataset=dataset))
    monkeypatch.setattr(curve, "MOST_CASES", 1)
    monkeypatch.setattr(curve, "CLICKS", (1, 2))
    automatic = Path(trainer.output_folder_base).with_name("A__nnUNetPlans__3d_fullres")
    (automatic / "fold_0" / "validation").mkdir(parents=True)
    names = [x for x in dataset["labels"] if x != "background"]
    mean = {str(dataset["labels"][name]): {"Dice": 0.5} for name in names}
    (automatic / "fold_0" / "validation" / "summary.json").write_text(json.dumps({"mean": mean}))
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder, "validation")
    found = json.loads((folder / "interaction_curve.json").read_text())
    assert list(found["mean"]["dice"]) == ["no prompt", "box", "1 click", "2 clicks"]
    assert set(found["classes"]) == {x["class"] for x in found["objects"]} <= set(names)
    assert found["automatic"] == {"A": dict.fromkeys(names, 0.5)}
    assert (folder / "interaction_curve.png").stat().st_size > 5000


@pytest.mark.slow
def test_stock_commands_train_and_predict_without_prompts(
    phantoms: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "MOST_CASES", 1)
    monkeypatch.setattr(curve, "CLICKS", (1,))
    plans = {**small_plans(phantoms.plans(), "PromptTrainer"), "plans_name": "PromptSmall"}
    file = phantoms.dataset_folder(phantoms.preprocessed) / "PromptSmall.json"
    file.write_text(json.dumps(plans))
    what = ("-tr", TINY, "-p", "PromptSmall", "-device", "cpu")
    phantoms.run("nnUNetv2_train", PHANTOM_ID, "3d_fullres", 0, *what)
    model = phantoms.model(TINY, plans="PromptSmall")
    assert (model / "fold_0" / "validation" / "interaction_curve.json").is_file()
    given, made = (phantoms.root / part for part in ("prompt_in", "prompt_out"))
    given.mkdir()
    source = min(phantoms.dataset_folder(phantoms.raw).glob("imagesTr/*"))
    (given / source.name).symlink_to(source)
    where: tuple[Any, ...] = ("-i", given, "-o", made, "-d", PHANTOM_ID, "-c", "3d_fullres")
    phantoms.run("nnUNetv2_predict", *where, "-f", 0, *what, "--disable_tta", "-npp", 0, "-nps", 0)
    assert len(list(made.glob("*.nii.gz"))) == 1


def test_a_cascade_is_refused(make: Make, nnunet_environment: Workspace) -> None:
    plans = nnunet_environment.plans()
    plans["configurations"]["second"] = {"inherits_from": "3d_fullres", "previous_stage": "low"}
    with pytest.raises(PluginError, match=r"second stage of a cascade.*Train 3d_fullres"):
        make("PromptTrainer", "second", plans=plans)
