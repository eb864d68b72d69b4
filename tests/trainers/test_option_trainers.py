"""Trainers of networks with options: what they record, weights of plain networks, prediction, and
commands that would lose an option; test_all_trainers.py asks them what it asks of every trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin.networks.from_plan import options_of
from stunet_plugin.trainers.map_pictures import read_maps

from conftest import Stunet
from trainer_helpers import Make, batch_for, started

OPTIONS = ("GRC", "SPM")


def save(trainer: Any, file: Path) -> Path:
    trainer.save_checkpoint(str(file))
    return file


@pytest.mark.parametrize("option", OPTIONS)
def test_the_plan_records_the_option_for_stock_training_and_prediction(
    make: Make, option: str, capsys: Any
) -> None:
    trainer = started(make(f"STUNetTrainer_tiny_{option}"))
    assert f"{option}: " in capsys.readouterr().out
    for plans in (trainer.plans_manager.plans, trainer.my_init_kwargs["plans"]):
        chosen = plans["configurations"]["3d_fullres"]
        assert list(options_of(chosen)) == [option.lower()]
    arguments = json.loads(json.dumps({"plans": {**plans, "continue_training": False}}))
    stock = nnUNetTrainer(**{**trainer.my_init_kwargs, **arguments})
    started(stock).network.load_state_dict(trainer.network.state_dict())
    x = batch_for(trainer)["data"]
    with torch.no_grad():
        torch.testing.assert_close(stock.network(x), trainer.network(x))
    assert np.isfinite(stock.train_step(batch_for(trainer))["loss"])
    fold = Path(trainer.output_folder)
    save(trainer, fold / "checkpoint_final.pth")
    for name, content in (("plans", plans), ("dataset", trainer.dataset_json)):
        (fold.parent / f"{name}.json").write_text(json.dumps(content))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(fold.parent), (0,))
    x = torch.randn(1, 1, 16, 32, 32)
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        expected = trainer.network.eval()(x)
        torch.testing.assert_close(predictor.network.eval()(x), expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_weights_of_the_plain_network_load(
    make: Make, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = started(make("STUNetTrainer_tiny"))
    file = save(plain, tmp_path / "plain.pth")
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    trainer = make(f"STUNetTrainer_tiny_{option}_ft", options={"STUNET_HEADS": "random"})
    trainer.initialize()
    maybe_load_checkpoint(trainer, False, False, str(file))
    trainer.save_debug_information = trainer.plot_network_architecture = lambda: None
    trainer.on_train_start()
    own = trainer.network.state_dict()
    for name, value in plain.network.state_dict().items():
        assert torch.equal(own[name], value) or ".seg_layers." in name
    log = Path(trainer.log_file).read_text()
    assert f"Network options: {option.lower()}; of those weights: none" in log


def test_commands_that_would_lose_an_option_refuse(
    make: Make, tmp_path: Path, stunet: Stunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = started(make("STUNetTrainer_tiny_GRC"))
    file = save(trainer, tmp_path / "grc.pth")
    lost = "trained with network options (grc), which this command would lose"
    assert lost in stunet.refuse(f"import {file} --out {tmp_path / 'out'}")
    assert lost in stunet.refuse(f"plan-like {file} -d 1")
    assert "grc" in stunet(f"inspect {file}")


@pytest.mark.parametrize(
    ("name", "configuration", "titles"),
    [
        ("STUNetTrainer_tiny_SPM", "2d", {f"prior of output {number}" for number in range(5)}),
        ("UNETRTrainer_tiny_STP", "3d_fullres", {"cuts that a token survived"}),
    ],
)
def test_maps_of_what_an_option_does(
    make: Make, tmp_path: Path, name: str, configuration: str, titles: set[str]
) -> None:
    trainer = started(make(name, configuration))
    images = batch_for(trainer)["data"]
    maps = read_maps(trainer.network.eval(), images)
    assert set(maps) == titles
    assert all(one.shape == (2, *images.shape[2:]) for one in maps.values())
    trainer._samples = images
    trainer._save_maps()
    assert [file.name for file in Path(trainer.output_folder).glob("maps_*.png")]
