"""Base trainer: what follows from a plan, options, fine-tuning, refusals with what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from stunet_plugin import trainers
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.options import Options
from stunet_plugin.trainers.fine_tuning import FineTuningScheduler, parameter_groups

from conftest import PHANTOM_ID
from trainer_helpers import Make, batch_for, started, stunet

TINY = "STUNetTrainer_tiny"
ISOTROPIC = [[1, 1, 1], *[[2, 2, 2]] * 5]


@pytest.mark.parametrize("size", PRESETS)
def test_the_same_weights_fit_whatever_the_plan(make: Make, size: str) -> None:
    shapes = set()
    for poolings in (3, 5, 7):
        strides = [*ISOTROPIC, *[[1, 2, 2]] * 2][: poolings + 1]
        trainer = make(f"STUNetTrainer_{size}", strides=strides, patch_size=[32, 128, 128])
        plan = trainer.plans_manager, trainer.configuration_manager
        with torch.device("meta"):
            network = trainer.build_network_architecture(*plan, 1, 105, True)
        shapes.add(tuple((key, tuple(value.shape)) for key, value in network.state_dict().items()))
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count == PRESETS[size].parameters
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("poolings", "expected"),
    [(5, (8, 4, 2, 1, 0)), (3, (2, 1, 0, 0, 0)), (1, (1, 0, 0, 0, 0)), (6, (8, 4, 2, 1, 0))],
)
def test_deep_supervision_weighs_as_nnunet_does_for_the_plans_poolings(
    make: Make, poolings: int, expected: tuple[int, ...]
) -> None:
    """As in the published training: halved over the plan's own poolings, the deepest left out."""
    strides = [[1, 1, 1], *[[2, 2, 2]] * poolings]
    weights = make(TINY, strides=strides, patch_size=[128] * 3)._build_loss().weight_factors
    assert weights == pytest.approx([value / sum(expected) for value in expected], abs=2e-6)
    assert min(weights) > 0


@pytest.mark.parametrize(
    ("spacing", "patch", "mode"),
    [(1.0, [96, 96, 96], 0), (2.0, [64, 128, 128], 1), (4.0, [32, 128, 128], 2)],
)
def test_mode_follows_from_the_plan_and_is_recorded(
    make: Make, capsys: Any, spacing: float, patch: list[int], mode: int
) -> None:
    planned = make(TINY).configuration_manager.configuration
    base = trainers.TRAINERS["STUNetTrainer"].resolve_architecture(planned)
    assert base == stunet_architecture(
        PRESETS["base"], planned["architecture"]["arch_kwargs"]["strides"]
    )
    host = planned["architecture"]
    changes = {"spacing": [spacing, 1.0, 1.0], "patch_size": patch, "architecture": host}
    trainer = make("PCTNetTrainer", batch_size=1, **changes)
    for plans in (trainer.plans_manager.plans, trainer.my_init_kwargs["plans"]):
        recorded = plans["configurations"]["3d_fullres"]["architecture"]
        assert recorded["arch_kwargs"]["mode"] == mode
    planned = {**changes, "architecture": recorded}
    assert trainers.TRAINERS["PCTNetTrainer"].resolve_architecture(planned) == recorded
    printed = capsys.readouterr().out
    assert f"PCTNet: Mode {mode}, because the spacing on axis 0 is {spacing:.2f}" in printed
    assert "A batch of 2 or more is safer" in printed


# --- options and fine-tuning


def test_wrong_options_are_refused() -> None:
    for variable, text, message in (
        ("STUNET_EPOCHS", "0", "must be an integer from 1 to 1000000"),
        ("STUNET_ENCODER_RATE", "nan", "must be a number from 0 to 1"),
        ("STUNET_VF_SCHEME", "2024", "must be one of 2023, 2025"),
        ("STUNET_EPOCH", "3", "there is no such option. Did you mean STUNET_EPOCHS"),
    ):
        with pytest.raises(PluginError, match=f"{variable}.*{message}"):
            Options({variable: text})


def test_epochs_seed_and_mirroring(make: Make) -> None:
    first, second = (make(options={"STUNET_EPOCHS": 7, "STUNET_SEED": 3}) for _ in range(2))
    first.initialize()
    torch.manual_seed(3)
    second.initialize()
    assert first.num_epochs == 7
    assert torch.equal(*(next(one.network.parameters()) for one in (first, second)))
    for options, expected in (({}, (0, 1, 2)), ({"STUNET_MIRRORING": 0}, None)):
        trainer = make(options=options)
        *_, augmented = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert augmented == trainer.inference_allowed_mirroring_axes == expected


def test_frozen_encoder_is_not_trained_in_its_epochs(make: Make) -> None:
    options = {"STUNET_FROZEN_ENCODER_EPOCHS": 1, "STUNET_ENCODER_RATE": 0.5}
    trainer = started(make("STUNetTrainer_tiny_ft", options=options))
    weight = trainer.network.encoder.stages[0][0].conv2.weight
    start = weight.detach().clone()
    for trainer.current_epoch in (0, 1):
        trainer.train_step(batch_for(trainer))
        assert torch.equal(weight, start) == (trainer.current_epoch == 0)


def test_warmup_and_the_encoders_rate_follow_nnunets_schedule() -> None:
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    network = STUNet(1, 2, 3, [2, 4, 8], nn.Conv3d, 3, strides, 1, 1)
    groups = parameter_groups(network, 0.1)
    numbers = [len(group["params"]) for group in groups]
    assert numbers[1] == len(list(network.encoder.parameters()))
    assert sum(numbers) == len(list(network.parameters()))
    assert len(parameter_groups(network, 1.0)) == 1
    ours, stock = torch.optim.SGD(groups, 0.1), torch.optim.SGD(network.parameters(), 0.1)
    schedules = FineTuningScheduler(ours, 0.1, 10, warmup_epochs=3), PolyLRScheduler(stock, 0.1, 10)
    factors = []
    for epoch in range(10):
        for schedule in schedules:
            schedule.step(epoch)
        (poly,) = (group["lr"] for group in stock.param_groups)
        factors.append([group["lr"] / poly for group in ours.param_groups])
    rest, encoder = np.transpose(factors)
    assert rest == pytest.approx([0.25, 0.5, 0.75, *[1] * 7])
    assert encoder == pytest.approx(0.1 * rest)


def test_fine_tuning_takes_weights_with_a_prefix_and_says_loudly_if_there_are_none(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    file, prefix = tmp_path / "weights.pth", "module._orig_mod."
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    pretrained = started(make("PCTNetTrainer_ft"))
    pretrained.on_train_start()
    assert "no pretrained weights were given" in capsys.readouterr().out
    own = {name: value.clone() for name, value in pretrained.network.state_dict().items()}
    pretrained.save_checkpoint(str(file))
    content = torch.load(file, weights_only=False)
    content["network_weights"] = {f"{prefix}{name}": value for name, value in own.items()}
    torch.save(content, file)
    monkeypatch.setattr("sys.argv", ["train", f"-pretrained_weights={file}"])
    trainer = make("PCTNetTrainer_ft")
    maybe_load_checkpoint(trainer, False, False, str(file))
    trainer.on_train_start()
    weights = trainer.network.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[x], own[x]) for x in own if ".seg_layers." not in x)
    log = capsys.readouterr().out
    assert "no pretrained weights" not in log
    assert re.search(r"come from PCTNetTrainer_ft; (\d+) do not: \1 of the seg", log)
    assert f"Prefix {prefix!r} stripped from all names" in log


# --- refusals, before anything is written


def test_wrong_plans_and_folders(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    options = {"nnUNet_results": tmp_path / "file" / "results"}
    with pytest.raises(PluginError, match="Cannot write results .*Set nnUNet_results"):
        make(TINY, options=options)
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        with pytest.raises(PluginError, match=f"export {variable}=/path/to/{variable}"):
            make(TINY, options={variable: ""})
        monkeypatch.setenv(variable, str(tmp_path))


def blocks(smallest: float, largest: float) -> dict[str, Any]:
    return {"options": {"STUNET_VF_SMALLEST": smallest, "STUNET_VF_LARGEST": largest}}


OTHER = {"network_class_name": "other.Net", "arch_kwargs": {"strides": [[1, 1, 1]]}}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "STUNetTrainer_large_ft",
            {"architecture": stunet_architecture(PRESETS["small"], ISOTROPIC)},
            "trains STU-Net large.*plan is for STU-Net small.*-tr STUNetTrainer_small_ft.*-p"
            " STUNetPlans_large",
        ),
        (TINY, {"configuration": "3d_lowres"}, "no configuration '3d_lowres'. Available: 2d, 3d_f"),
        (TINY, {"architecture": OTHER}, "'other.Net'.*STUNetPlans_<size>"),
        (TINY, {"patch_size": [40, 48, 60]}, r"\[40, 48, 56\] and \[40, 48, 64\].*plans file"),
        (TINY, {"patch_size": [4, 8, 8]}, "single voxel at the deepest stage"),
        (TINY, {"data_identifier": "nowhere"}, f"nnUNetv2_preprocess -d {PHANTOM_ID} -plans_name"),
        ("PCTNetTrainer", {"architecture": None}, "has no architecture with arch_kwargs"),
        ("FMUNetTrainer", {"patch_size": [32, 32]}, "use a 3D configuration .*STUNetTrainer for 2"),
        ("VolumeFusionTrainer", {"architecture": {"arch_kwargs": {}}}, "one output per resolution"),
        ("VolumeFusionTrainer", {"previous_stage": "3d_lowres"}, "cascade.*Pretrain 3d_lowres or"),
        ("VolumeFusionTrainer", blocks(0.5, 0.2), "smallest 0.5 and largest 0.2"),
        ("VolumeFusionTrainer", blocks(0.01, 0.05), r"\[16, 32, 32\] .*too small"),
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

    def refused(message: str, again: Any = trainer) -> None:
        with pytest.raises(PluginError, match=message):
            again.load_checkpoint(str(final))

    wider = make(architecture=stunet(width=3))
    refused(r"Cannot resume STUNetTrainer from.*another shape", wider)
    slower = make(options={"STUNET_ENCODER_RATE": 0.5})
    refused(r"started without STUNET_ENCODER_RATE", slower)
    whole = final.read_bytes()
    torch.save({**torch.load(final, weights_only=False), "optimizer_state": None}, final)
    refused(r"-tr STUNetTrainer_ft -pretrained_weights")
    final.write_bytes(whole[:1000])
    refused(r"damaged .*, and there is no other.*without --c")
    latest.write_bytes(whole[:-9])
    best.write_bytes(whole)
    refused(r"checkpoint_best.pth beside it is whole: move")


def test_pretrained_weights_that_do_not_fit(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    with pytest.raises(PluginError, match="there is no such file"):
        make()
    torch.save({"network_weights": {}, "trainer_name": "Other"}, file)
    with pytest.raises(PluginError, match="does not fit STUNetTrainer: it was .* Other and"):
        make()
