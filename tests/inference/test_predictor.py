"""Trained models run on images: files as nnU-Net writes them, folds, models that are refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stunet_plugin.cli import main
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Model, trained_folds
from stunet_plugin.utils.image_files import side_files
from stunet_plugin.utils.images import read_label_map

from damage import damaged_json
from dataset_helpers import change_json, write_array
from import_helpers import load_model, make_network, published_weights, write_v1


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    network = make_network(outputs=3)
    source = write_v1(tmp_path / "m.model", published_weights(network))
    assert main(["import", str(source), "--out", str(tmp_path / "model")]) == 0
    return tmp_path / "model"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    arrays = np.random.default_rng(0).normal(size=(2, 12, 20, 16)).astype(np.float32).cumsum(1)
    return [write_array(tmp_path / f"{n}_0000.nii.gz", array) for n, array in enumerate(arrays)]


@pytest.mark.parametrize("ending", [".nii.gz", ".mhd"])
def test_files_are_those_of_nnunet(
    model: Path, images: list[Path], tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = json.loads((model / "plans.json").read_text())
    (model / "plans.json").write_text(json.dumps({**plans, "image_reader_writer": "SimpleITKIO"}))
    folder = tmp_path / "out"
    folder.mkdir()
    cases = {folder / f"case{number}{ending}": [image] for number, image in enumerate(images)}
    loaded = Model(model, step_size=1.0, mirroring=False)
    assert list(loaded.predict_files(cases)) == list(cases)
    assert list(loaded.predict_files(cases)) == list(cases)
    expected = load_model(model, monkeypatch)
    expected.tile_step_size, expected.use_gaussian = 1.0, True
    for target, (image,) in cases.items():
        array, properties = loaded.reader.read_images([str(image)])
        labels = expected.predict_single_npy_array(array, properties, None, None, False)
        assert np.array_equal(sitk.GetArrayFromImage(read_label_map(target)), labels)
        assert np.array_equal(loaded.predict([image]).labels, labels)
    files = {path for target in cases for path in (target, *side_files(target))}
    assert set(folder.iterdir()) == files


def test_all_damaged_images_are_named(model: Path, images: list[Path]) -> None:
    loaded = Model(model)
    loaded.check([[image] for image in images])
    for image in images:
        image.write_bytes(image.read_bytes()[:-20])
    with pytest.raises(PluginError, match="0_0000.nii.gz.*\n.*1_0000.nii.gz"):
        loaded.check([[image] for image in images])
    for image in images:
        write_array(image, np.zeros((9, 9, 9), np.uint8))
    with pytest.raises(PluginError, match="number of channels"):
        loaded.read(images)


def test_folds_and_models_that_cannot_predict(model: Path, images: list[Path]) -> None:
    assert trained_folds(model) == ("0",)
    for fold in ("1", "all"):
        shutil.copytree(model / "fold_0", model / f"fold_{fold}")
    assert Model(model).folds == ("0", "1")
    assert Model(model, ["all"]).folds == ("all",)
    with pytest.raises(PluginError, match="fold_7.*Folds.*0, 1"):
        Model(model, ["7"])
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    broken = {x: torch.full_like(y, torch.nan) for x, y in checkpoint["network_weights"].items()}
    torch.save({**checkpoint, "network_weights": broken}, file)
    with pytest.raises(PluginError, match="predicts NaN"):
        Model(model, ["0"], step_size=1, mirroring=False).predict([images[0]])
    less = dict(list(checkpoint["network_weights"].items())[:-3])
    other = {**checkpoint["init_args"], "configuration": "2d_other"}
    for change, message in (
        ({"network_weights": less}, "do not fit"),
        ({"init_args": other}, "is of configuration 2d_other"),
    ):
        torch.save({**checkpoint, **change}, file)
        with pytest.raises(PluginError, match=message):
            Model(model, ["0"])


@pytest.mark.parametrize("names", [["CT"], {"CT": "0"}])
def test_channel_names_of_another_form_are_refused(model: Path, names: object) -> None:
    change_json(model / "dataset.json", channel_names=names)
    with pytest.raises(PluginError, match="channel_names must be"):
        Model(model)


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_damaged_descriptions_end_in_a_sentence_or_a_model(model: Path, name: str) -> None:
    content = json.loads((model / name).read_text())
    for _, text in damaged_json(content, 200):
        (model / name).write_text(text)
        with contextlib.suppress(PluginError):
            assert Model(model).trainer == "STUNetTrainer_tiny"
