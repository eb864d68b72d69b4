"""PlannedTrainer: the plan's own network with this project's options; test_all_trainers.py asks it
what it asks of every trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stunet_plugin.errors import PluginError

from trainer_helpers import RESIDUAL, Make, batch_for, started


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
