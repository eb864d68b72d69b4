"""Self-training inside nnU-Net's loop: arms, what is left out, resuming, wrong input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.self_training import loss as losses
from stunet_plugin.self_training.loss import ARMS, MEAN_TEACHER

from conftest import Workspace
from trainer_helpers import DATASET, Make, batch_for, equal, started, state

TINY = "SelfTrainingTrainer_STUNet_tiny"
TWO = {**DATASET, "pseudo_labelled": ["t_"]}


def batch(trainer: Any, seed: int = 1) -> dict[str, Any]:
    return {**batch_for(trainer, seed), "keys": np.array(["s_1", "t_1"])}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", ["SelfTrainingTrainer", TINY])
def test_every_parameter_gets_a_gradient_whatever_the_batch(
    make: Make, name: str, arm: str
) -> None:
    trainer = started(make(name, dataset=TWO, options={"STUNET_SELF_TRAINING": arm}))
    trainer.teacher = trainer._make_teacher() if arm == MEAN_TEACHER else None
    trainer.num_epochs = 1
    for keys in (["s_1", "t_1"], ["s_1", "s_2"], ["t_1", "t_2"]):
        assert np.isfinite(trainer.train_step({**batch(trainer), "keys": np.array(keys)})["loss"])
        lacking = [x for x, y in trainer.network.named_parameters() if y.grad is None]
        assert lacking == []
    assert len(trainer.loss.weight_factors) == len(trainer._get_deep_supervision_scales())


def stepped(make: Make, arm: str, changes: dict[str, Any]) -> Any:
    """Make one step on a batch that is changed, with the same start; return the trainer."""
    options = {"STUNET_SELF_TRAINING": arm, "STUNET_SEED": 1}
    trainer = started(make(TINY, dataset=TWO, options=options))
    trainer.teacher = trainer._make_teacher() if arm == MEAN_TEACHER else None
    torch.manual_seed(5)
    trainer.train_step({**batch(trainer), **changes})
    return trainer


@pytest.mark.parametrize(("arm", "used"), [("plain", True), ("mean-teacher", False)])
def test_labels_of_the_target_are_used_or_not(make: Make, arm: str, used: bool) -> None:
    first = stepped(make, arm, {})
    targets = [x.clone() for x in batch(first)["target"]]
    for target in targets:
        target[1] = 0  # of the target's sample
    assert equal(state(first), state(stepped(make, arm, {"target": targets}))) != used
    for target in targets:
        target[0] = 1
    assert not equal(state(first), state(stepped(make, arm, {"target": targets})))


def test_the_teacher_is_a_running_mean_and_sees_the_weak_view(make: Make) -> None:
    trainer = started(make(TINY, dataset=TWO, options={"STUNET_SELF_TRAINING": "mean-teacher"}))
    trainer.teacher = trainer._make_teacher()
    before = [x.clone() for x in trainer.teacher.parameters()]
    images, target = batch(trainer)["data"], torch.tensor([False, True])
    data, probabilities = trainer._views(images, target)
    assert torch.equal(data[0], images[0])
    assert not torch.equal(data[1], images[1])
    with torch.no_grad():
        assert torch.equal(probabilities, trainer.teacher(images[1:]).softmax(1))
    trainer.train_step(batch(trainer))
    steps = losses.horizon(trainer.num_epochs * trainer.num_iterations_per_epoch)
    for was, now, student in zip(
        before, trainer.teacher.parameters(), trainer.network.parameters(), strict=True
    ):
        assert torch.allclose(now, was + (student - was) / steps, atol=1e-6)


@pytest.fixture
def two_hospitals(nnunet_environment: Workspace) -> dict[str, Any]:
    """The phantoms' dataset.json, every other case of the target."""
    import json

    raw = nnunet_environment.dataset_folder(nnunet_environment.raw)
    cases = sorted(x.name.removesuffix("_0000.nii.gz") for x in raw.glob("imagesTr/*"))
    description = json.loads((raw / "dataset.json").read_text())
    return {**description, "pseudo_labelled": cases[::2]}


def run(trainer: Any) -> None:
    trainer.perform_actual_validation = lambda save_probabilities: None
    trainer.run_training()


def test_training_resumes_with_its_teacher(make: Make, two_hospitals: dict[str, Any]) -> None:
    options = {"STUNET_SELF_TRAINING": MEAN_TEACHER, "STUNET_EPOCHS": 1, "STUNET_ITERATIONS": 2}
    trainer = make("SelfTrainingTrainer", dataset=two_hospitals, options=options)
    run(trainer)
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text()
    assert "cases of the source" in log
    assert "predictions of a model, are not used" in log
    file = str(Path(trainer.output_folder, "checkpoint_final.pth"))
    resumed = make("SelfTrainingTrainer", dataset=two_hospitals, options={"STUNET_EPOCHS": 2})
    resumed.load_checkpoint(file)
    resumed.on_train_start()
    for one, other in zip(trainer.teacher.parameters(), resumed.teacher.parameters(), strict=True):
        assert torch.equal(one, other)
    other_arm = make(
        "SelfTrainingTrainer", dataset=two_hospitals, options={"STUNET_SELF_TRAINING": "plain"}
    )
    with pytest.raises(
        PluginError, match="=plain from .*: it is of STUNET_SELF_TRAINING=mean-teacher"
    ):
        other_arm.load_checkpoint(file)


def test_half_of_the_samples_are_of_the_target(make: Make, two_hospitals: dict[str, Any]) -> None:
    few = {**two_hospitals, "pseudo_labelled": two_hospitals["pseudo_labelled"][-1:]}
    trainer = started(make(TINY, fold="all", dataset=few))
    training, validation = trainer.get_tr_and_val_datasets()
    target = [trainer.domains.is_target(x) for x in training.identifiers]
    assert sum(target) == len(target) / 2
    assert len(set(training.identifiers)) == len(validation.identifiers)
    absent = {**few, "pseudo_labelled": ["nobody"]}
    with pytest.raises(PluginError, match="None of the .* training cases .* is of the target"):
        started(make(TINY, fold="all", dataset=absent)).get_tr_and_val_datasets()


def test_a_class_that_the_target_lacks_is_said(make: Make, two_hospitals: dict[str, Any]) -> None:
    labels = {**two_hospitals["labels"], "comet": max(two_hospitals["labels"].values()) + 1}
    trainer = make(TINY, fold="all", dataset={**two_hospitals, "labels": labels})
    trainer.initialize()
    trainer.on_train_start()
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text()
    assert "No case of the target is labelled comet: the model" in log


REGIONS = {
    **TWO,
    "labels": {"background": 0, "whole": [1, 2], "core": [2]},
    "regions_class_order": [1, 2],
}


@pytest.mark.parametrize(
    ("dataset", "options", "refusal"),
    [
        (DATASET, {}, "this one has no target. Make one: `stunet pseudo-label"),
        ({**DATASET, "pseudo_labelled": [3]}, {}, "this one has no target"),
        (
            REGIONS,
            {"STUNET_SELF_TRAINING": MEAN_TEACHER},
            "has regions. Set STUNET_SELF_TRAINING=plain",
        ),
        (TWO, {"STUNET_SELF_TRAINING": "teacher"}, "must be one of plain, mean-teacher"),
    ],
)
def test_refusals(
    make: Make, tmp_path: Path, dataset: dict[str, Any], options: dict[str, Any], refusal: str
) -> None:
    with pytest.raises(PluginError, match=refusal):
        make(TINY, dataset=dataset, options=options)
    assert not (tmp_path / "results").exists()


def test_another_plan_than_the_teachers_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "teacher.pth"
    started(make("STUNetTrainer_tiny")).save_checkpoint(str(file))
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    make(TINY, dataset=TWO)
    with pytest.raises(
        PluginError, match="patch_size is 32, 32, 32, of the teacher 16, 32, 32. Its"
    ):
        make(TINY, dataset=TWO, patch_size=[32, 32, 32])
    with pytest.raises(PluginError, match="spacing is 9, 9, 9, of the teacher .*stunet plan-like"):
        make(TINY, dataset=TWO, spacing=[9, 9, 9])
