"""Heads before epoch 0: by name, by fit, in every kind of training; a resumed one keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed

from stunet_plugin.demo.phantom import LABELS
from stunet_plugin.errors import PluginError
from stunet_plugin.heads import patches
from stunet_plugin.trainers import TRAINERS

from trainer_helpers import DATASET, Make, started

Log = pytest.CaptureFixture[str]
NAMED = {**DATASET, "labels": LABELS}
OTHERS = {**DATASET, "labels": {"background": 0, "spleen": 3, "x": 1, "y": 2, "z": 4, "w": 5}}
REGIONS = {
    **DATASET,
    "labels": {"background": 0, "organs": [1, 2, 3], "spleen": [3], "ignore": 4},
    "regions_class_order": [1, 3],
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    monkeypatch.setattr(patches, "PATCHES", 4)


@pytest.fixture
def fine_tune(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a model of the phantoms' labels; return what fine-tunes it with other labels."""

    def fine_tune(name: str, dataset: dict[str, Any], heads: str = "auto", **how: Any) -> Any:
        file = tmp_path / "source" / "fold_0" / "checkpoint_final.pth"
        if not file.is_file():
            file.parent.mkdir(parents=True)
            source = started(make(name, dataset=NAMED, **how))
            source.save_checkpoint(str(file))
            source.on_train_start()
        monkeypatch.setattr("sys.argv", ["train", "-pretrained_weights", str(file)])
        options = {"STUNET_HEADS": heads, "STUNET_SEED": 5, **how.pop("options", {})}
        trainer = make(name, dataset=dataset, options=options, **how)
        trainer.load_pretrained_weights(str(file))
        trainer.set_deep_supervision_enabled(True)
        given = torch.load(file, weights_only=False)["network_weights"]
        return trainer, {x: y for x, y in given.items() if ".seg_layers." in x}

    return fine_tune


@pytest.mark.parametrize(
    ("name", "configuration"),
    [("STUNetTrainer", "2d"), ("PCTNetTrainer", "3d_fullres"), ("PlannedTrainer", "3d_fullres")],
)
def test_same_labels_in_another_order_give_the_models_own_output(
    fine_tune: Any, name: str, configuration: str, capsys: Log
) -> None:
    again = {**DATASET, "labels": {x: (6 - value) % 6 for x, value in LABELS.items()}}
    trainer, given = fine_tune(name, again, configuration=configuration)
    trainer.on_train_start()
    order, found = [0, 5, 4, 3, 2, 1], trainer.network.state_dict()
    for key, value in given.items():
        per_class = value.ndim > 0 and len(value) == 6
        assert torch.equal(found[key], value[order] if per_class else value)
    log = capsys.readouterr().out
    assert "by name: background, vertebrae" in log
    assert "by fit" not in log


@pytest.mark.parametrize(
    "name", ["STUNetTrainer", "PCTNetTrainer", "FMUNetTrainer", "PlannedTrainer"]
)
def test_other_labels_are_fitted_around_those_known_by_name(
    fine_tune: Any, name: str, capsys: Log
) -> None:
    trainer, given = fine_tune(name, OTHERS)
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.on_train_start()
    log = capsys.readouterr().out
    assert "by name: background, spleen (from" in log
    assert "by fit: background, x, y, z, w (4 patches of 4 cases" in log
    for key, value in trainer.network.state_dict().items():
        if key in given and value.ndim and len(value) == 6:
            # Labels 1 to 5 keep their order in the outputs.
            assert torch.equal(value[3], given[key][3])
            assert not torch.equal(value[1], before[key][1])
        elif ".seg_layers." not in key:
            assert torch.equal(value, before[key])


def test_regions_and_options(fine_tune: Any, capsys: Log) -> None:
    trainer, given = fine_tune("STUNetTrainer", REGIONS)
    trainer.on_train_start()
    assert "by fit: organs (4" in capsys.readouterr().out
    bias = trainer.network.state_dict()["decoder.seg_layers.2.bias"]
    assert bias[1] == given["decoder.seg_layers.2.bias"][3] - given["decoder.seg_layers.2.bias"][0]
    for heads, expected in (("name", "by name: background, sp"), ("fit", "by fit: background, x")):
        trainer, _ = fine_tune("STUNetTrainer", OTHERS, heads)
        trainer.on_train_start()
        log = capsys.readouterr().out
        assert expected in log
        assert ("by fit" in log, "by name" in log) == (heads == "fit", heads == "name")
    trainer, _ = fine_tune("STUNetTrainer", OTHERS, "random")
    trainer.on_train_start()
    assert "heads by" not in capsys.readouterr().out


def test_fine_tuning_trainers_do_it_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STUNET_HEADS", raising=False)
    names = ("STUNetTrainer_tiny", "STUNetTrainer_tiny_ft", "PlannedTrainer_ft")
    assert [TRAINERS[name].heads_wanted() for name in names] == ["random", "auto", "auto"]
    for word in ("fit", "random"):
        monkeypatch.setenv("STUNET_HEADS", word)
        assert [TRAINERS[name].heads_wanted() for name in names] == [word] * 3
        assert TRAINERS["VolumeFusionTrainer"].heads_wanted() == "random"


def test_a_resumed_training_keeps_its_heads(fine_tune: Any, tmp_path: Path, capsys: Log) -> None:
    trainer, _ = fine_tune("STUNetTrainer", OTHERS)
    latest = str(tmp_path / "checkpoint_latest.pth")
    trainer.save_checkpoint(latest)
    trainer.load_checkpoint(latest)
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.on_train_start()
    after = trainer.network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert "heads by" not in capsys.readouterr().out


def test_sharded_and_plain_trainings_start_alike(fine_tune: Any, tmp_path: Path) -> None:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        weights = []
        for shard in (0, 1):
            options = {"STUNET_SHARD": shard, "STUNET_CHECKPOINTING": "off"}
            trainer, _ = fine_tune("STUNetTrainer", OTHERS, options=options)
            trainer.on_train_start()
            weights.append(trainer.whole_weights())
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)
    finally:
        distributed.destroy_process_group()


def test_a_class_that_stands_twice_is_refused(fine_tune: Any, tmp_path: Path) -> None:
    twice = {**DATASET, "labels": {"background": 0, "left x": 1, "x_left": 2, "b": 3}}
    message = "new dataset: the class 'x_left' is 'x_left', which stands twice.*STUNET_HEADS=random"
    with pytest.raises(PluginError, match=message):
        fine_tune("STUNetTrainer", twice)
