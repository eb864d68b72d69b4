"""SAMMed2DTrainer on the phantoms' slices, in this process and through the stock command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.safe_loading import load_checkpoint
from stunet_plugin.weights.sam import read_sam

from conftest import PHANTOM_ID, Workspace
from sam_helpers import ADAPTER, TINY, SAMMed2D
from trainer_helpers import Make, started

NAME = "SAMMed2DTrainer_tiny"
REGIONS = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
}


def batch(**changes: Any) -> dict[str, Any]:
    labels = torch.zeros(2, 1, 32, 32)
    labels[:, :, 4:20, 5:25] = 1
    labels[:, :, 8:14, 8:14] = 2
    images = torch.randn(2, 1, 32, 32) + 5 * labels
    return {"data": images, "target": labels.short(), **changes}


def test_all_but_the_encoder_learns(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(NAME, configuration="2d")
    monkeypatch.setattr(type(trainer), "trains_encoder", False)
    started(trainer)
    before = {name: x.detach().clone() for name, x in trainer.network.named_parameters()}
    for _ in range(3):
        result = trainer.train_step(batch())
    assert 0 < result["loss"] < 100
    # Convolutions of adapters begin to learn once the norm behind them is not 0.
    changed = {x for x, y in trainer.network.named_parameters() if not torch.equal(y, before[x])}
    kept = {x for x in before if x.startswith("vision_encoder.") and ADAPTER not in x}
    assert changed.isdisjoint(kept)
    assert set(before) - kept - changed <= {
        "shared_image_embedding.positional_embedding",
        # Not every mask is once the best, and boxes or points may not have been drawn.
        *(x for x in before if "hypernetworks" in x or "point_embed" in x or "not_a_point" in x),
    }
    assert any("mask_embed" in name for name in changed)


def test_regions_and_ignored_pixels(make: Make) -> None:
    trainer = started(make(NAME, configuration="2d", dataset=REGIONS))
    labels = batch()["target"]
    ignored = torch.zeros_like(labels)
    ignored[..., :4] = 1
    given = batch(target=torch.cat((labels > 0, labels == 2, ignored > 0), 1))
    images, targets = trainer._draw(given, 3)
    assert images.shape == (2, 3, 64, 64)
    assert targets.unique().tolist() == [-1, 0, 1]
    assert (targets == -1).sum() == 6 * 32 * 4
    assert set((targets == 1).flatten(1).sum(1).tolist()) <= {16 * 20, 6 * 6}
    trainer.network.eval()
    with torch.no_grad():
        result = trainer.validation_step(given)
    assert [len(result[f"{x}_hard"]) for x in ("tp", "fp", "fn")] == [4, 4, 4]


def test_wrong_input_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="Train with configuration 2d"):
        make(NAME)
    two = {**REGIONS, "channel_names": {"0": "CT", "1": "PET"}}
    with pytest.raises(PluginError, match="one channel or of three"):
        make(NAME, configuration="2d", dataset=two)
    trainer = make(NAME, configuration="2d")
    plan = trainer.plans_manager, trainer.configuration_manager
    with pytest.raises(PluginError, match="stunet prompt MODEL_FOLDER"):
        trainer.build_network_architecture(*plan, 1, 2, False)


@pytest.mark.slow
def test_stock_command_trains_on_weights_without_adapters(
    phantoms: Workspace, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file = tmp_path / "sam.pth"
    plain = SAMMed2D(TINY, adapters=False).state_dict()
    torch.save({"network_weights": plain, "trainer_name": "SAMMed2DTrainer_tiny"}, file)
    train = ("nnUNetv2_train", PHANTOM_ID, "2d", 0, "-tr", NAME, "-device", "cpu")
    done = phantoms.run(*train, "-pretrained_weights", file)
    assert "Without adapters, which start without effect" in done.stdout
    fold = phantoms.model(NAME, "2d") / "fold_0"
    found = json.loads((fold / "validation" / "interaction.json").read_text())
    assert list(found["mean"]["dice"]) == ["box", "1 point", "3 points", "5 points"]
    assert found["mean"]["masks"] == len(found["objects"]) > 0
    written = fold / "checkpoint_final.pth"
    sam = read_sam(load_checkpoint(written), written)
    assert sam is not None
    assert sam.adapters
    assert not torch.equal(
        sam.tensors["prompt_encoder.mask_embed.conv1.weight"],
        plain["prompt_encoder.mask_embed.conv1.weight"],
    )
    # --val alone scores again.
    (fold / "validation" / "interaction.json").unlink()
    phantoms.run(*train, "--val")
    assert (fold / "validation" / "interaction.json").is_file()
