"""Base trainer: strides of any plan, options, and every refusal with what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet_plugin import trainers
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import PRESETS, get_preset
from stunet_plugin.weights.pretrained import pretrained_weights_on_command_line

from conftest import PHANTOM_ID, Workspace
from trainer_helpers import Make, batch_for, build, misfm, small_plans, started, stunet

TINY = "STUNetTrainer_tiny"
ISOTROPIC = [[1, 1, 1], *[[2, 2, 2]] * 5]
HOST_PLANS: dict[str, dict[str, Any]] = {
    "three poolings": {"patch_size": [16, 32, 32], "strides": ISOTROPIC[:4]},
    "five poolings": {"patch_size": [32, 32, 64], "strides": ISOTROPIC},
    "seven poolings": {
        "patch_size": [16, 128, 128],
        "strides": [[1, 1, 1], *[[1, 2, 2]] * 2, *[[2, 2, 2]] * 3, *[[1, 2, 2]] * 2],
    },
    "2d": {"patch_size": [128, 64], "strides": [[1, 1], *[[2, 2]] * 5, [2, 1]]},
}


@pytest.mark.parametrize("case", ["three poolings", "seven poolings", "2d"])
def test_any_plan_gives_five_outputs_that_pair(make: Make, case: str) -> None:
    configuration = "2d" if case == "2d" else "3d_fullres"
    trainer = started(make(TINY, configuration, **HOST_PLANS[case]))
    batch = batch_for(trainer)
    outputs = trainer.network(batch["data"])
    assert [one.shape[2:] for one in outputs] == [one.shape[2:] for one in batch["target"]]
    assert len(outputs) == len(trainer.loss.weight_factors) == 5
    trainer.train_step(batch)
    assert [key for key, value in trainer.network.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("size", PRESETS)
def test_the_same_weights_fit_whatever_the_plan(nnunet_environment: Workspace, size: str) -> None:
    shapes = set()
    for case in ("three poolings", "five poolings", "seven poolings"):
        plans = small_plans(nnunet_environment.plans(), TINY)
        chosen = plans["configurations"]["3d_fullres"]
        chosen["architecture"]["arch_kwargs"]["strides"] = HOST_PLANS[case]["strides"]
        chosen["patch_size"] = HOST_PLANS[case]["patch_size"]
        manager = PlansManager(plans)
        with torch.device("meta"):
            network = trainers.TRAINERS[f"STUNetTrainer_{size}"].build_network_architecture(
                manager, manager.get_configuration("3d_fullres"), 1, 105, True
            )
        shapes.add(tuple((key, tuple(value.shape)) for key, value in network.state_dict().items()))
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count == get_preset(size).parameters
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("poolings", "expected"),
    [
        (5, (8, 4, 2, 1, 0)),
        (3, (2, 1, 0, 0, 0)),
        (2, (1, 0, 0, 0, 0)),
        (1, (1, 0, 0, 0, 0)),
        (6, (8, 4, 2, 1, 0)),
    ],
)
def test_deep_supervision_weighs_as_nnunet_does_for_the_plans_poolings(
    make: Make, poolings: int, expected: tuple[int, ...]
) -> None:
    """As in the published training: halved over the plan's own poolings, the deepest left out."""
    strides = [[1, 1, 1], *[[2, 2, 2]] * poolings]
    trainer = make(TINY, strides=strides, patch_size=[128, 128, 128])
    weights = trainer._build_loss().weight_factors
    assert weights == pytest.approx([value / sum(expected) for value in expected], abs=2e-6)
    assert min(weights) > 0


def test_trainer_without_size_takes_the_plans_or_base(make: Make) -> None:
    trainer = started(make("STUNetTrainer"))
    assert trainer.network.encoder.output_channels == (2, 4, 8, 8)
    host = make(TINY).configuration_manager.configuration
    resolved = trainers.TRAINERS["STUNetTrainer"].resolve_architecture(host)
    assert resolved["arch_kwargs"]["features_per_stage"] == list(PRESETS["base"].features_per_stage)


@pytest.mark.parametrize(
    ("spacing", "patch", "mode"),
    [
        ([1.0, 1.0, 1.0], [96, 96, 96], 0),
        ([2.0, 1.0, 1.0], [64, 128, 128], 1),
        ([4.0, 1.0, 1.0], [32, 128, 128], 2),
    ],
)
def test_mode_follows_from_the_plan_and_is_recorded(
    make: Make, capsys: Any, spacing: list[float], patch: list[int], mode: int
) -> None:
    host = make(TINY).configuration_manager.configuration["architecture"]
    changes = {"spacing": spacing, "patch_size": patch, "architecture": host}
    trainer = make("PCTNetTrainer", batch_size=1, **changes)
    for plans in (trainer.plans_manager.plans, trainer.my_init_kwargs["plans"]):
        recorded = plans["configurations"]["3d_fullres"]["architecture"]
        assert recorded["arch_kwargs"]["mode"] == mode
    planned = {**changes, "architecture": recorded}
    assert trainers.TRAINERS["PCTNetTrainer"].resolve_architecture(planned) == recorded
    printed = capsys.readouterr().out
    assert f"PCTNet: Mode {mode}, because the spacing on axis 0 is {spacing[0]:.2f}" in printed
    assert "A batch of 2 or more is safer" in printed


# --- options


def test_options_are_applied_and_checked(make: Make) -> None:
    first, second = (make(options={"STUNET_EPOCHS": 7, "STUNET_SEED": 3}) for _ in range(2))
    first.initialize()
    torch.manual_seed(3)
    second.initialize()
    assert first.num_epochs == 7
    weights = [one.network.encoder.stages[0][0].conv1.weight for one in (first, second)]
    assert torch.equal(*weights)
    with pytest.raises(PluginError, match="STUNET_EPOCHS='many' must be an integer"):
        make(options={"STUNET_EPOCHS": "many"})


def test_mirroring_is_left_out_of_augmentation_and_prediction(make: Make) -> None:
    for options, expected in (({}, (0, 1, 2)), ({"STUNET_MIRRORING": 0}, None)):
        trainer = make(options=options)
        *_, augmented = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert augmented == trainer.inference_allowed_mirroring_axes == expected


def test_frozen_encoder_is_not_trained_in_its_epochs(make: Make) -> None:
    options = {"STUNET_FROZEN_ENCODER_EPOCHS": 1, "STUNET_ENCODER_RATE": 0.5}
    trainer = started(make("STUNetTrainer_tiny_ft", options=options))
    weight = trainer.network.encoder.stages[0][0].conv2.weight
    start = weight.detach().clone()
    trainer.train_step(batch_for(trainer))
    assert torch.equal(weight, start)
    trainer.current_epoch = 1
    trainer.train_step(batch_for(trainer))
    assert not torch.equal(weight, start)


def test_fine_tuning_without_weights_says_so_loudly(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer = started(make("STUNetTrainer_tiny_ft"))
    trainer.on_train_start()
    assert "no pretrained weights were given" in capsys.readouterr().out
    trainer.network.load_state_dict(trainer.network.state_dict())
    trainer.on_train_start()
    assert "no pretrained weights" not in capsys.readouterr().out


# --- refusals, before anything is written

OTHER = {"network_class_name": "other.Net", "arch_kwargs": {"strides": [[1, 1, 1]]}}
MODE_7 = {**misfm("PCTNet"), "arch_kwargs": {**misfm("PCTNet")["arch_kwargs"], "mode": 7}}
SMALL = stunet_architecture(PRESETS["small"], ISOTROPIC)


def test_wrong_plans_and_folders(
    nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans = small_plans(nnunet_environment.plans(), TINY)
    with pytest.raises(PluginError, match="no configuration '3d_lowres'. Available: 2d, 3d_full"):
        build(TINY, plans, "3d_lowres")
    with pytest.raises(PluginError, match="lacks plans_name"):
        build(TINY, {**plans, "plans_name": ""})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file" / "results"))
    with pytest.raises(PluginError, match="Cannot write results .*Set nnUNet_results"):
        build(TINY, plans)
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, "")
        with pytest.raises(PluginError, match=f"export {variable}=/path/to/{variable}"):
            build(TINY, plans)
        monkeypatch.setenv(variable, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "STUNetTrainer_large_ft",
            {"architecture": SMALL},
            "trains STU-Net large.*plan is for STU-Net small.*-tr STUNetTrainer_small_ft.*-p"
            " STUNetPlans_large",
        ),
        (TINY, {"architecture": OTHER}, "'other.Net'.*STUNetPlans_<size>"),
        (TINY, {"patch_size": [40, 48, 60]}, r"\[40, 48, 56\] and \[40, 48, 64\].*plans file"),
        (TINY, {"patch_size": [4, 8, 8]}, "single voxel at the deepest stage"),
        (TINY, {"data_identifier": "nowhere"}, f"nnUNetv2_preprocess -d {PHANTOM_ID} -plans_name"),
        (TINY, {"batch_size": None}, "has no batch_size. Fix the plans"),
        ("PCTNetTrainer", {"architecture": OTHER}, "'other.Net'.*-p PCTNetPlans"),
        ("PCTNetTrainer", {"architecture": MODE_7}, "Unknown anisotropy mode 7. Modes: 0 "),
        ("PCTNetTrainer", {"architecture": None}, "has no architecture with arch_kwargs"),
        ("PCTNetTrainer", {"patch_size": "big"}, "patch_size in the plan .* not 'big'"),
        ("PCTNetTrainer", {"patch_size": [16, 40, 40]}, "divisible by .*-pl PCTNetPlanner"),
        ("VolumeFusionTrainer", {"architecture": {"arch_kwargs": {}}}, "one output per resolution"),
    ],
)
def test_wrong_plans(
    make: Make, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        make(name, **changes)
    assert not (tmp_path / "results").exists()


def test_what_cannot_be_resumed_says_why(make: Make, tmp_path: Path) -> None:
    final, latest, best = (tmp_path / f"checkpoint_{x}.pth" for x in ("final", "latest", "best"))
    trainer = started(make())
    trainer.save_checkpoint(str(final))
    with pytest.raises(PluginError, match=r"Cannot resume STUNetTrainer from.*another shape"):
        make(architecture=stunet(width=3)).load_checkpoint(str(final))
    with pytest.raises(PluginError, match=r"started without STUNET_ENCODER_RATE"):
        make(options={"STUNET_ENCODER_RATE": 0.5}).load_checkpoint(str(final))
    again = make(options={"STUNET_ENCODER_RATE": 1})
    whole = final.read_bytes()
    content = torch.load(final, weights_only=False)
    torch.save({**content, "optimizer_state": None}, final)
    with pytest.raises(PluginError, match=r"-tr STUNetTrainer_ft -pretrained_weights"):
        again.load_checkpoint(str(final))
    final.write_bytes(whole[:1000])
    with pytest.raises(PluginError, match=r"damaged .*, and there is no other.*without --c"):
        again.load_checkpoint(str(final))
    latest.write_bytes(whole[:-9])
    best.write_bytes(whole)
    with pytest.raises(PluginError, match=r"checkpoint_best.pth beside it is whole: move"):
        again.load_checkpoint(str(final))


def test_pretrained_weights_that_do_not_fit(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    with pytest.raises(PluginError, match="there is no such file"):
        make()
    trainer = trainers.TRAINERS["STUNetTrainer"]
    torch.save({"network_weights": {}, "trainer_name": "Other"}, file)
    with pytest.raises(PluginError, match=f"does not fit {trainer.__name__}: it was .* Other and"):
        make()


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_pretrained_weights_with_a_prefix(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, prefix: str
) -> None:
    file = tmp_path / "weights.pth"
    pretrained = started(make("PCTNetTrainer"))
    own = {name: value.clone() for name, value in pretrained.network.state_dict().items()}
    pretrained.save_checkpoint(str(file))
    content = torch.load(file, weights_only=False)
    content["network_weights"] = {f"{prefix}{name}": value for name, value in own.items()}
    torch.save(content, file)
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer = make("PCTNetTrainer_ft")
    maybe_load_checkpoint(trainer, False, False, str(file))
    trainer.on_train_start()
    weights = trainer.network.state_dict()
    assert weights.keys() == own.keys()
    heads = {name for name in own if ".seg_layers." in name}
    assert all(torch.equal(weights[name], own[name]) for name in own if name not in heads)
    log = capsys.readouterr().out
    assert re.search(r"come from PCTNetTrainer; (\d+) start at random: \1 of the seg", log)
    assert (f"Prefix {prefix!r} stripped from all names" in log) == bool(prefix)


def test_pretrained_weights_are_read_off_the_command_line() -> None:
    for given, expected in (
        (["nnUNetv2_train", "4", "-pretrained_weights", "a.pth", "--c"], "a.pth"),
        (["nnUNetv2_train", "-pretrained_weights=b.pth"], "b.pth"),
        (["nnUNetv2_train", "4", "-pretrained_weights"], None),
        ([], None),
    ):
        assert pretrained_weights_on_command_line(given) == expected
