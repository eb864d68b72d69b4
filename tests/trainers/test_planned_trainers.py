"""PlannedTrainer: the plan's own network with this project's options; test_all_trainers.py asks it
what it asks of every trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin.errors import PluginError

from import_helpers import make_unet, nnssl_checkpoint, unet_checkpoint, unet_entry
from trainer_helpers import DATASET, RESIDUAL, Make, batch_for, started


def test_a_step_is_that_of_nnunets_trainer(make: Make) -> None:
    """But for the deepest output, which counts a millionth here and nothing there."""
    ours = started(make("PlannedTrainer", options={"STUNET_SEED": 1}, architecture=RESIDUAL))
    arguments = {**ours.my_init_kwargs, "plans": {**ours.my_init_kwargs["plans"]}}
    arguments["plans"]["continue_training"] = False
    stock = started(nnUNetTrainer(**arguments))
    stock.network.load_state_dict(ours.network.state_dict())
    for seed in (1, 2):
        losses = [trainer.train_step(batch_for(trainer, seed))["loss"] for trainer in (ours, stock)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_stem_is_a_part_of_the_encoder(make: Make) -> None:
    """In a ResidualEncoderUNet it lies beside the stages."""
    frozen = {"STUNET_FROZEN_ENCODER_EPOCHS": 1}
    trainer = started(make("PlannedTrainer_ft", options=frozen, architecture=RESIDUAL))
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.train_step(batch_for(trainer))
    changed = [x for x, y in trainer.network.state_dict().items() if not torch.equal(y, before[x])]
    assert changed
    assert all(name.startswith("decoder.") and "encoder." not in name for name in changed)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"STUNET_CHECKPOINTING": "block"}, "no activation checkpointing. Unset it"),
        ({}, {"STUNET_SHARD": 1}, "shards an STU-Net; ResidualEncoderUNet is small"),
        ({"patch_size": [16, 32, 36]}, {}, "divisible by [4, 8, 8], not [16, 32, 36]"),
        ({"architecture": {"arch_kwargs": {}}}, {}, "strides under arch_kwargs"),
    ],
)
def test_what_it_cannot_do_is_refused(
    make: Make, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluginError) as caught:
        make("PlannedTrainer", options=options, **{"architecture": RESIDUAL, **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("part", ["", "encoder."], ids=["whole", "encoder"])
@pytest.mark.parametrize("prefix", [None, "net."], ids=["nnunet", "nnssl"])
def test_takes_weights_through_the_stock_loader(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    part: str,
    prefix: str | None,
) -> None:
    entry, file = unet_entry(kind), tmp_path / "weights.pth"
    given = make_unet(entry, outputs=1).state_dict()
    if prefix is None:
        kept = {name: value for name, value in given.items() if name.startswith(part)}
        unet_checkpoint(file, entry, network_weights=kept)
    else:
        nnssl_checkpoint(file, entry, part, prefix)
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    random = {"STUNET_HEADS": "random"}
    trainer = make("PlannedTrainer_ft", architecture=entry, options=random)
    trainer.initialize()
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    maybe_load_checkpoint(trainer, False, False, str(file))
    trainer.save_debug_information = trainer.plot_network_architecture = lambda: None
    trainer.on_train_start()
    for name, value in trainer.network.named_parameters():
        loaded = "seg_layers" not in name and (part == "" or name.startswith("encoder."))
        assert torch.equal(value, given[name] if loaded else before[name]), name
    log = Path(trainer.log_file).read_text()
    assert ("the decoder starts at random" in log) == (part != "")
    assert np.isfinite(trainer.train_step(batch_for(trainer))["loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_per_stage": [4, 8, 24, 24]}, "in encoder.stages.2, encoder.stages.3, decoder"),
        ({"kernel_sizes": [[3, 3, 3]] * 4}, "other kernels or strides than the plan's network"),
        ({"n_blocks_per_stage": [1, 2, 2, 1]}, "missing (for example encoder.stages.2.blocks.1"),
        ({"channel_names": {"0": "T1", "1": "T2"}}, "stunet import --in-channels 2"),
        ({"n_blocks_per_stage": [1, 1, 1, 1]}, "this network lacks (for example encoder.stages.1"),
    ],
)
def test_stages_that_do_not_fit_are_named(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    file = unet_checkpoint(tmp_path / "weights.pth", unet_entry())
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    channels = changes.get("channel_names", DATASET["channel_names"])
    entry = unet_entry(**{key: x for key, x in changes.items() if key != "channel_names"})
    with pytest.raises(PluginError) as caught:
        make(
            "PlannedTrainer_ft", dataset={**DATASET, "channel_names": channels}, architecture=entry
        )
    assert message in str(caught.value)
