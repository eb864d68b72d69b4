"""``stunet segment`` with a 2D model: pictures in colour, which have no volume."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image

from stunet_plugin.cli import main
from stunet_plugin.inference.build_network import build_network
from stunet_plugin.inference.predictor import Model
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import PRESETS

from import_helpers import v2_plans


def test_pictures_have_no_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three channels in one file, labels as nnU-Net's."""
    monkeypatch.setenv("STUNET_CPU", "torch")
    model = write_picture_model(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    words = ["segment", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--quiet"]
    assert main([*map(str, words)]) in (0, 1)
    labels = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    loaded = Model(model, mirroring=False)
    data, _ = loaded.preprocess(*loaded.read([tmp_path / "in" / "a.png"]))
    logits = loaded.predictor.predict_logits_from_preprocessed_data(data)
    assert np.array_equal(labels, logits.argmax(0)[0])
    with (tmp_path / "out" / "statistics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["volume_ml"] for row in rows] == ["", ""]
    assert int(rows[0]["voxels"]) == (labels == 1).sum()


def write_picture_model(folder: Path) -> Path:
    """A model of nnU-Net for .png files in colour, with random weights."""
    network = stunet_architecture(PRESETS["tiny"], [[1, 1], *([[2, 2]] * 5)])
    configuration = {
        "patch_size": [64, 64],
        "spacing": [1.0, 1.0],
        "normalization_schemes": ["RGBTo01Normalization"] * 3,
        "use_mask_for_norm": [False] * 3,
        "preprocessor_name": "DefaultPreprocessor",
        "architecture": network,
        "batch_size": 2,
    }
    for name, order, is_seg in (("data", 3, False), ("seg", 1, True), ("probabilities", 1, False)):
        settings = {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}
        configuration[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{name}_kwargs"] = settings
    plans = v2_plans() | {"image_reader_writer": "NaturalImage2DIO", "plans_name": "nnUNetPlans"}
    plans["configurations"] = {"2d": configuration}
    plans["foreground_intensity_properties_per_channel"] = {x: {} for x in "012"}
    labels = {"background": 0, "cell": 1, "wall": 2}
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    content = {"channel_names": dict(zip("012", "RGB", strict=True)), "labels": labels}
    (folder / "dataset.json").write_text(json.dumps(content | {"file_ending": ".png"}))
    manager = PlansManager(plans)
    torch.manual_seed(1)
    trained = build_network(
        "STUNetTrainer_tiny", manager, manager.get_configuration("2d"), 3, 3, False
    )
    checkpoint = {
        "network_weights": trained.state_dict(),
        "trainer_name": "STUNetTrainer_tiny",
        "init_args": {"configuration": "2d"},
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder
