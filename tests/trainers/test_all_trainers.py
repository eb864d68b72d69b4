"""What is asked of every trainer: names, gradients, training, resuming, prediction, commands."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin import trainers
from stunet_plugin.errors import PluginError
from stunet_plugin.trainers.misfm_trainers import MISFMOptimizer
from stunet_plugin.trainers.stunet_trainers import SCHEDULES
from stunet_plugin.weights.pretrained import describe_mismatches

from conftest import PHANTOM_ID, Workspace
from dataset_helpers import change_json, write_dataset
from trainer_helpers import RESIDUAL, Make, batch_for, misfm, small_plans, started, with_options

DATA = Path(__file__).resolve().parents[1] / "data" / "earlier_models"


def test_names_and_signatures() -> None:
    sizes = ("", "_tiny", "_small", "_base", "_large", "_huge")
    expected = {f"STUNetTrainer{size}{one.suffix}" for size in sizes for one in SCHEDULES}
    expected |= {
        f"{net}Trainer{suffix}" for net in ("PCTNet", "FMUNet", "Planned") for suffix in ("", "_ft")
    }
    sized = [f"STUNetTrainer{size}" for size in sizes if size]
    expected |= {
        f"{network}_{option}{suffix}"
        for network in (*sized, "PlannedTrainer")
        for option in ("GRC", "SPM")
        for suffix in ("", "_ft")
    }
    expected |= {
        f"UNETRTrainer{size}{kept}" for size in ("", "_tiny", "_small") for kept in ("", "_STP")
    }
    expected |= {f"VolumeFusionTrainer_STUNet{size}" for size in sizes if size}
    expected |= {f"VolumeFusionTrainer{net}" for net in ("", "_PCTNet", "_FMUNet")}
    networks = ("", *(f"_STUNet{size}" for size in sizes if size))
    expected |= {f"PromptTrainer{net}{end}" for net in networks for end in ("", "_ft")}
    # Of another recipe, which is fine-tuning whatever its name.
    others = {"SAMMed2DTrainer", "SAMMed2DTrainer_tiny"}
    others |= {f"SelfTrainingTrainer{net}" for net in networks}
    assert set(trainers.__all__) == expected | others
    stock = list(inspect.signature(nnUNetTrainer.__init__).parameters)
    for name in expected:
        trainer: Any = getattr(trainers, name)
        assert (trainer.__name__, trainer.fine_tuning) == (name, name.endswith("_ft"))
        epochs = {"ep1": 1, "ep5": 5, "ep2k": 2000, "ep4k": 4000}
        assert trainer.epochs == epochs.get(name.rpartition("_")[2], 1000)
        assert getattr(trainer, "segmentation_trainer", name) in expected
    for name in expected | others:
        # nnU-Net reads them off the signature.
        assert list(inspect.signature(getattr(trainers, name).__init__).parameters) == stock


def test_mistyped_names_get_a_hint(capsys: Any) -> None:
    for module in (trainers, trainers.volume_fusion_trainers):  # nnUNet_extTrainer asks the second
        for given, meant in (("STUnetTrainer_smal", "STUNetTrainer_small"), ("nnUNetTrainer", "")):
            assert not hasattr(module, given)
            hint = capsys.readouterr().err
            assert f"Did you mean {meant}?" in hint if meant else hint == ""


SEVEN_POOLINGS = {
    "patch_size": [16, 128, 128],
    "strides": [[1, 1, 1], *[[1, 2, 2]] * 2, *[[2, 2, 2]] * 3, *[[1, 2, 2]] * 2],
}


@pytest.mark.parametrize(
    ("name", "configuration", "changes", "outputs"),
    [
        ("STUNetTrainer", "3d_fullres", {}, 3),
        ("STUNetTrainer", "2d", {}, 3),
        ("STUNetTrainer_tiny_ft", "3d_fullres", {}, 5),
        # STU-Net's own sizes have five outputs, whatever the plan's poolings.
        ("STUNetTrainer_tiny", "2d", {"strides": [[1, 1], [2, 2], [2, 1]]}, 5),
        ("STUNetTrainer_tiny", "3d_fullres", SEVEN_POOLINGS, 5),
        ("PCTNetTrainer", "3d_fullres", {}, 4),
        ("FMUNetTrainer", "3d_fullres", {}, 4),
        ("PlannedTrainer", "3d_fullres", {"architecture": RESIDUAL}, 3),
        ("PlannedTrainer_ft", "2d", {}, 3),
        ("STUNetTrainer_tiny_GRC", "3d_fullres", {}, 5),
        ("STUNetTrainer_tiny_SPM_ft", "2d", {}, 5),
        ("UNETRTrainer_tiny", "2d", {}, 4),
        ("UNETRTrainer_tiny_STP", "3d_fullres", {"patch_size": [18, 36, 32]}, 4),
        ("PlannedTrainer_SPM", "3d_fullres", {"architecture": RESIDUAL}, 3),
        ("PlannedTrainer_GRC_ft", "3d_fullres", {"architecture": RESIDUAL}, 3),
        ("VolumeFusionTrainer", "3d_fullres", {}, 3),
        ("VolumeFusionTrainer", "2d", {}, 3),
        ("VolumeFusionTrainer_PCTNet", "3d_fullres", {}, 4),
        ("PromptTrainer", "3d_fullres", {"architecture": RESIDUAL}, 3),
        ("PromptTrainer_STUNet_tiny_ft", "2d", {}, 5),
    ],
)
def test_outputs_and_targets_pair_and_every_parameter_gets_a_gradient(
    make: Make, name: str, configuration: str, changes: dict[str, Any], outputs: int
) -> None:
    trainer = started(make(name, configuration, **changes))
    batch = batch_for(trainer)
    fused = trainer._fuse(batch) if hasattr(trainer, "fusion") else batch
    found = trainer.network(fused["data"])
    assert [one.shape[2:] for one in found] == [one.shape[2:] for one in fused["target"]]
    assert len(found) == len(trainer.loss.weight_factors) == outputs
    assert np.isfinite(trainer.train_step(batch)["loss"])
    published: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-5}
    if not isinstance(trainer, MISFMOptimizer):
        published = {"weight_decay": 3e-5, "momentum": 0.99, "nesterov": True}
        published["lr"] = 1e-3 if trainer.fine_tuning else 1e-2
    if name.startswith("UNETR"):
        published = {"lr": 1.3e-4, "weight_decay": 0.05, "betas": (0.9, 0.95)}
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.05, 0.0]
    assert trainer.optimizer.defaults.items() >= published.items()
    assert [key for key, value in trainer.network.named_parameters() if value.grad is None] == []


def train(trainer: Any) -> None:
    """Train as nnUNetv2_train does; the final validation of segmentations, which makes processes,
    is left to the stock command."""
    if not hasattr(trainer, "fusion"):
        trainer.perform_actual_validation = lambda save_probabilities: None
    trainer.run_training()


def predict(model: Path, channels: int = 1, spacing: tuple[float, ...] | None = None) -> np.ndarray:
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    image = np.random.default_rng(0).normal(0, 300, (channels, 20, 36, 40)).astype(np.float32)
    spacing = spacing or predictor.configuration_manager.spacing
    properties = {"spacing": [4.0, *spacing] if len(spacing) == 2 else spacing}
    return predictor.predict_single_npy_array(image, properties)


@pytest.fixture(scope="session")
def regions(new_workspace: Any) -> Workspace:
    """Four channels, with regions and an ignore label."""
    workspace: Workspace = new_workspace("regions")
    labels = {"background": 0, "whole": [1, 2], "part": [2], "ignore": 3}
    folder = workspace.raw / "Dataset902_Regions"
    write_dataset(folder, labels, 6, regions_class_order=[1, 2])
    for image in list(folder.glob("imagesTr/*")):
        for channel in ("_0001", "_0002", "_0003"):
            shutil.copy(image, str(image).replace("_0000", channel))
    change_json(folder / "dataset.json", channel_names=dict.fromkeys("0123", "MRI"))
    what = ("-d", "902", "-c", "2d", "3d_fullres", "-npfp", 1, "-np", 1)
    workspace.run("nnUNetv2_plan_and_preprocess", *what)
    return workspace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        ("STUNetTrainer", "2d"),
        ("PCTNetTrainer", "3d_fullres"),
        ("FMUNetTrainer", "3d_fullres"),
        ("VolumeFusionTrainer", "3d_fullres"),
        ("PromptTrainer", "2d"),
        ("UNETRTrainer_tiny_STP", "2d"),
    ],
)
def test_trains_resumes_and_predicts_with_four_channels_regions_and_ignore_label(
    make: Make, regions: Workspace, monkeypatch: Any, name: str, configuration: str
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(regions.preprocessed))
    dataset = json.loads((regions.raw / "Dataset902_Regions" / "dataset.json").read_text())
    how = {"plans": regions.plans(dataset_id="902"), "dataset": dataset}
    train(make(name, configuration, **how))
    resumed = make(name, configuration, options={"STUNET_EPOCHS": 2}, **how)
    maybe_load_checkpoint(resumed, True, False)
    assert resumed.current_epoch == 1
    train(resumed)
    fold = Path(resumed.output_folder)
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert (checkpoint["current_epoch"], checkpoint["trainer_name"]) == (2, name)
    if hasattr(resumed, "fusion"):
        with pytest.raises(PluginError, match="pretrained with Volume Fusion.*Fine-tune it"):
            predict(fold.parent, 4)
    else:
        assert predict(fold.parent, 4).max() < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "backend"),
    [
        ("STUNetTrainer", None, "inductor"),
        # Tracing alone: for PCT-Net on the CPU inductor takes minutes.
        ("PCTNetTrainer", misfm("PCTNet", dropout_per_stage=[0.0] * 5, drop_path=0.0), "aot_eager"),
        ("FMUNetTrainer", misfm("FMUNet", dropout_per_stage=[0.0] * 5), "aot_eager"),
        ("PromptTrainer", None, "aot_eager"),
    ],
)
def test_a_compiled_step_is_the_same(
    make: Make, monkeypatch: Any, name: str, architecture: Any, backend: str
) -> None:
    """On the CPU nnU-Net compiles only if told so, as here."""
    stock, losses = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *given: stock(*given, backend=backend))
    changes = {"architecture": architecture} if architecture else {}
    for compiles in (False, True):
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self, on=compiles: on)
        trainer = started(make(name, options={"STUNET_SEED": 1, "nnUNet_compile": "t"}, **changes))
        assert isinstance(trainer.network, torch._dynamo.OptimizedModule) == compiles
        losses.append(trainer.train_step(batch_for(trainer))["loss"])
        assert all(value.grad is not None for value in trainer.network.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def write_plans(workspace: Workspace, name: str, trainer: str, **configurations: Any) -> None:
    plans = {**small_plans(workspace.plans(), trainer), "plans_name": name}
    plans["configurations"].update(configurations)
    file = workspace.dataset_folder(workspace.preprocessed) / f"{name}.json"
    file.write_text(json.dumps(plans))


@pytest.mark.slow
def test_stock_commands_train_resume_and_predict(phantoms: Workspace) -> None:
    # With network options, which are no business of the commands.
    plans = small_plans(phantoms.plans(), "STUNetTrainer")
    chosen = plans["configurations"]["3d_fullres"]
    chosen["architecture"] = with_options(chosen["architecture"])
    write_plans(phantoms, "SmallPlans", "STUNetTrainer", **{"3d_fullres": chosen})
    what = ("-tr", "STUNetTrainer", "-p", "SmallPlans", "-device", "cpu")
    started_with = phantoms.run("nnUNetv2_train", PHANTOM_ID, "3d_fullres", 0, *what).stdout
    assert "GRC: 0.5 of the channels" in started_with
    assert "SPM: priors of" in started_with
    command = (PHANTOM_ID, "3d_fullres", 0, *what, "--c")
    resumed = phantoms.run("nnUNetv2_train", *command, STUNET_EPOCHS="2").stdout
    assert "Epoch 1" in resumed
    assert "Epoch 0" not in resumed
    model = phantoms.model("STUNetTrainer", plans="SmallPlans")
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    given, made = (phantoms.root / part for part in ("in", "out"))
    given.mkdir()
    source = min(phantoms.dataset_folder(phantoms.raw).glob("imagesTr/*"))
    (given / source.name).symlink_to(source)
    where = ("-i", given, "-o", made, "-d", PHANTOM_ID, "-c", "3d_fullres", "-f", 0)
    phantoms.run("nnUNetv2_predict", *where, *what, "--disable_tta", "-npp", 0, "-nps", 0)
    assert len(list(made.glob("*.nii.gz"))) == 1


@pytest.mark.slow
def test_cascade(phantoms: Workspace) -> None:
    """The phantoms are too small for nnU-Net to plan one: added as its documentation says."""
    spacing = phantoms.plans()["configurations"]["3d_fullres"]["spacing"]
    lowres = {
        "inherits_from": "3d_fullres",
        "data_identifier": "CascadePlans_3d_lowres",
        "spacing": [2 * step for step in spacing],
        "next_stage": "3d_cascade_fullres",
    }
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    stages = {"3d_lowres": lowres, "3d_cascade_fullres": cascade}
    write_plans(phantoms, "CascadePlans", "STUNetTrainer", **stages)
    preprocess = ("-d", PHANTOM_ID, "-plans_name", "CascadePlans", "-c", "3d_lowres", "-np", 1)
    phantoms.run("nnUNetv2_preprocess", *preprocess)
    what = ("-tr", "STUNetTrainer", "-p", "CascadePlans", "-device", "cpu")
    # Fold all, so that the second stage finds a prediction of the first for every case.
    phantoms.run("nnUNetv2_train", PHANTOM_ID, "3d_lowres", "all", *what)
    phantoms.run("nnUNetv2_train", PHANTOM_ID, "3d_cascade_fullres", 0, *what)
    model = phantoms.model("STUNetTrainer", "3d_cascade_fullres", "CascadePlans")
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1


def test_models_of_the_version_before_predict_the_same(nnunet_environment: Workspace) -> None:
    model = DATA / "STUNetTrainer__EarlierPlans__3d_fullres"
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(model / "prediction.nii.gz")))
    found = predict(model, spacing=(5.0, 5.0, 5.0))
    assert (found == expected).mean() > 0.999
    assert len(np.unique(found)) == len(np.unique(expected)) > 3


@pytest.mark.parametrize("name", ["STUNetTrainer", "VolumeFusionTrainer"])
def test_checkpoints_of_the_version_before_resume(
    make: Make, nnunet_environment: Workspace, name: str
) -> None:
    file = str(DATA / f"{name}__EarlierPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth")
    checkpoint = torch.load(file, weights_only=False)
    chosen = checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]
    raw = nnunet_environment.dataset_folder(nnunet_environment.raw)
    dataset = json.loads((raw / "dataset.json").read_text())
    trainer = make(name, dataset=dataset, options={"STUNET_EPOCHS": 2}, **chosen)
    trainer.load_checkpoint(file)
    assert trainer.current_epoch == 1
    for key, value in checkpoint["network_weights"].items():
        assert torch.equal(trainer.network.state_dict()[key], value)
    train(trainer)
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()
    network = started(make("STUNetTrainer", dataset=dataset, **chosen)).network
    assert not describe_mismatches(network, checkpoint["network_weights"], heads_too=False)
