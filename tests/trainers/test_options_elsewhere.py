"""Network options with what was not made for them: Volume Fusion, and activation checkpointing and
sharding, which UNETR refuses in a sentence."""

from __future__ import annotations


import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import UNETR_PRESETS
from stunet_plugin.trainers import PlannedTrainer
from stunet_plugin.weights.pretrained import describe_mismatches

from trainer_helpers import PATCH, RESIDUAL, Make, batch_for, equal, started, state, with_options

TOKENS = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
(TINY,) = (one for one in UNETR_PRESETS if one.name == "UNETR_tiny_STP")
ARCHITECTURES = {"options": with_options(RESIDUAL), "pruned": TINY.architecture(TOKENS, PATCH)}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_volume_fusion_pretrains_the_network_of_the_plan(make: Make, kind: str) -> None:
    trainer = started(make("VolumeFusionTrainer", architecture=ARCHITECTURES[kind]))
    assert torch.isfinite(torch.as_tensor(trainer.train_step(batch_for(trainer))["loss"]))
    assert [key for key, x in trainer.network.named_parameters() if x.grad is None] == []
    plan = trainer.plans_manager, trainer.configuration_manager
    with torch.device("meta"):
        segmentation = PlannedTrainer.build_network_architecture(*plan, 1, 3)
    weights = trainer.network.state_dict()
    assert describe_mismatches(segmentation, weights, heads_too=False) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"STUNET_CHECKPOINTING": "block"}, "has no activation checkpointing. Unset it"),
        ({"STUNET_SHARD": 1}, "shards an STU-Net; UNETR is small enough"),
    ],
)
def test_unetr_has_neither(make: Make, options: dict[str, object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        make("UNETRTrainer_tiny_STP", options=options)
