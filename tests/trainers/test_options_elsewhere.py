"""Network options with what was not made for them: Volume Fusion, activation checkpointing, shards,
``stunet segment`` and ``stunet rank``, or a sentence that says it does not work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import torch
from torch import distributed

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import options_of
from stunet_plugin.networks.presets import UNETR_PRESETS
from stunet_plugin.trainers import PlannedTrainer
from stunet_plugin.weights.pretrained import describe_mismatches

from conftest import PHANTOM_ID, Stunet, Workspace
from trainer_helpers import PATCH, RESIDUAL, Make, batch_for, equal, started, with_options
from trainer_helpers import stunet as stunet_entry

TOKENS = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
(TINY,) = (one for one in UNETR_PRESETS if one.name == "UNETR_tiny_STP")
ARCHITECTURES = {"options": with_options(RESIDUAL), "pruned": TINY.architecture(TOKENS, PATCH)}


@pytest.fixture
def group_of_one() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


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


def steps(trainer: Any) -> list[float]:
    return [float(trainer.train_step(batch_for(trainer, seed))["loss"]) for seed in (1, 2)]


def test_checkpointing_and_sharding_change_nothing(make: Make, group_of_one: None) -> None:
    settings = {"plain": ("off", 0), "checkpointed": ("block", 0), "sharded": ("block", 1)}
    losses, states = {}, {}
    for name, (checkpointing, shard) in settings.items():
        options = {"STUNET_SEED": 1, "STUNET_CHECKPOINTING": checkpointing, "STUNET_SHARD": shard}
        trainer = started(make(options=options, architecture=with_options(stunet_entry())))
        assert set(options_of(trainer.configuration_manager.configuration)) == {"grc", "spm"}
        losses[name] = steps(trainer)
        states[name] = {key: x.clone() for key, x in trainer.whole_weights().items()}
    assert equal(states["plain"], states["checkpointed"])
    assert losses["sharded"] == pytest.approx(losses["plain"], rel=1e-4)
    for key, value in states["sharded"].items():
        torch.testing.assert_close(value, states["plain"][key], rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_segment_and_rank_take_a_trained_model(
    make: Make,
    nnunet_environment: Workspace,
    tmp_path: Path,
    stunet: Stunet,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setenv("STUNET_CPU", "torch")
    trainer = started(make("PlannedTrainer", architecture=ARCHITECTURES[kind]))
    fold = Path(trainer.output_folder)
    trainer.save_checkpoint(str(fold / "checkpoint_final.pth"))
    for name, content in (
        ("plans", trainer.my_init_kwargs["plans"]),
        ("dataset", trainer.dataset_json),
    ):
        (fold.parent / f"{name}.json").write_text(json.dumps(content))
    scan = min(nnunet_environment.dataset_folder(nnunet_environment.raw).glob("imagesTr/*"))
    out = tmp_path / "out"
    stunet("segment", scan, "-o", out, "--model", fold.parent, "--quiet")
    (labels,) = out.glob("*.nii.gz")
    sizes = [sitk.ReadImage(str(file)).GetSize() for file in (scan, labels)]
    assert sizes[0] == sizes[1]
    table = tmp_path / "ranking.json"
    words = f"rank -d {PHANTOM_ID} --device cpu --cases 2 --levels 1 --step-size 1 --json {table}"
    stunet(words, f"mine={fold.parent}", "random")
    entries = json.loads(table.read_text())["candidates"]
    assert len(entries) == 2
    assert all(entry["score"] is not None for entry in entries)
