"""Imported weights compute what the published code computes; the four published files; memory;
other input channels; stock prediction and fine-tuning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from stunet_plugin.commands.import_ import Import
from stunet_plugin.networks.from_plan import resolve
from stunet_plugin.networks.presets import get_preset
from stunet_plugin.trainers.stunet_trainers import TRAINERS
from stunet_plugin.weights.identify import Origin
from stunet_plugin.weights.locate import Source, published_facts
from stunet_plugin.weights.safe_loading import load_plans_pickle
from stunet_plugin.weights.source_plan import choose_plan
from stunet_plugin.weights.stunet import read_stunet

import import_helpers as helpers
from conftest import PHANTOM_ID, Stunet, Workspace

TOLERANCE = 1e-5
"""Relative to the largest output: the fixtures' own float32 rounding is of that size."""
PORT_OPTIONS = (
    "--spacing 1 1 1 --patch-size 8 64 64 --labels background a b"
    " --strides 1,2,2 1,2,2 2,2,2 2,2,2 1,2,2"
)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "options", "trainer"),
    [
        ("stunet_v1_tiny.model", "", "STUNetTrainer_tiny"),
        ("stunet_v2_tiny.pth", PORT_OPTIONS, "STUNetTrainer"),
    ],
)
def test_fixtures_give_their_recorded_outputs(
    file: str, options: str, trainer: str, shared: Path, stunet: Stunet
) -> None:
    source = shared / "fixtures" / file
    recorded = np.load(source.with_suffix(".npz"))
    image = torch.from_numpy(recorded["input"])
    predictor = helpers.load_model(stunet.model(source, options), stunet.patch)
    assert predictor.trainer_name == trainer
    assert predictor.allowed_mirroring_axes == (0, 1, 2)
    with torch.inference_mode():
        windows = predictor.predict_sliding_window_return_logits(image[0]).float().numpy()
        predictor.network.decoder.deep_supervision = True
        outputs = predictor.network(image)
    assert len(outputs) == sum(key.startswith("output_") for key in recorded)
    for index, output in enumerate(outputs):
        expected = recorded[f"output_{index}"]
        largest = max(1.0, np.abs(expected).max())
        assert np.abs(output.numpy() - expected).max() <= TOLERANCE * largest
    # nnU-Net adds windows up in half precision.
    expected = recorded["output_0"]
    assert np.abs(windows - expected[0]).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.shared
def test_facts_are_those_of_the_published_pickles(shared: Path) -> None:
    facts = published_facts()
    order = json.loads((shared / "fixtures" / "official" / "label_orders.json").read_text())
    assert facts["labels"] == [order[str(value)] for value in range(105)]
    for name in facts["checkpoints"]:
        published = load_plans_pickle(shared / "fixtures" / "official" / f"{name}.pkl")["plans"]
        as_json = json.loads(json.dumps(published))
        assert {key: as_json[key] for key in facts["plans"]} == facts["plans"]


@pytest.mark.shared
def test_published_small_imports_with_and_without_its_pickle(shared: Path, stunet: Stunet) -> None:
    weights = helpers.published_weights(helpers.make_network("small", 1, 105))
    source = helpers.write_v1(stunet.folder / "small_ep4k.model", weights, plans={})
    without = stunet.model(source)
    official = shared / "fixtures" / "official" / "small_ep4k.model.pkl"
    shutil.copy(official, source.parent)
    assert helpers.read(stunet.model(source)) == helpers.read(without)
    assert "small_ep4k.model" in helpers.read(without, "provenance")["plan"]
    architecture = helpers.configuration(without)["architecture"]
    assert architecture["arch_kwargs"]["strides"] == helpers.STRIDES
    assert helpers.read(without)["dataset_name"] == "Dataset101_TotalSegmentator"
    labels = helpers.read(without, "dataset")["labels"]
    assert (labels["spleen"], len(labels)) == (77, 105)
    predictor = helpers.load_model(without, stunet.patch)
    assert predictor.trainer_name == "STUNetTrainer_small"
    parameters = sum(value.numel() for value in predictor.network.parameters())
    assert parameters == get_preset("small").parameters


@pytest.mark.parametrize("size", ["large", "huge"])
def test_published_large_and_huge_are_recognised(size: str) -> None:
    """Without the writing: 1.8 and 5.8 GB are too much. Tensors are reserved, not touched."""
    with torch.device("meta"):
        weights = helpers.published_weights(helpers.make_network(size, 1, 105))
    reserved = {name: torch.empty(x.shape) for name, x in weights.items()}
    file = Path(f"{size}_ep4k.model")
    read = read_stunet(Origin.V1, helpers.v1_checkpoint(reserved), reserved)
    read.check_shapes()
    assert read.trainer == f"STUNetTrainer_{size}"
    assert f"{get_preset(size).parameters:,} parameters" in read.description
    plan = choose_plan(Source(file), read, Import(str(file)))
    assert plan.published
    chosen = plan.to_plans(read, "Dataset101_TotalSegmentator")["configurations"]["3d_fullres"]
    resolved = resolve(chosen, get_preset(size), f"STUNetTrainer_{size}")
    assert resolved.architecture == chosen["architecture"]


IMPORT_AND_MEASURE = """
import resource, sys
from stunet_plugin.cli import main
tiny, small, out = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
main(["import", tiny, "--out", out + "/tiny"])
before = peak()
main(["import", small, "--out", out + "/small"])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_import_takes_little_more_memory_than_the_weights(tiny: Path, tmp_path: Path) -> None:
    """In a process of its own, with an optimizer state of the same size beside the weights;
    libraries do not count."""
    weights = helpers.published_weights(helpers.make_network("small", 1, 105))
    content = helpers.v1_checkpoint(weights)
    content["optimizer_state_dict"] = [torch.ones_like(value) for value in weights.values()]
    path = tmp_path / "small_ep4k.model"
    torch.save(content, path)
    size = sum(value.numel() * 4 for value in weights.values())
    assert path.stat().st_size > 2 * size
    command = [sys.executable, "-c", IMPORT_AND_MEASURE, tiny, path, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(said.stdout.splitlines()[-1]) <= 1.3 * size
    assert size < helpers.checkpoint_of(tmp_path / "small").stat().st_size < 1.01 * size


@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 3), (3, 1), (2, 2)])
def test_stem_for_other_channels(old: int, new: int, stunet: Stunet, tiny: Path) -> None:
    """With the same image in all channels: `mean` keeps the response, `repeat` multiplies it by new
    / old."""
    network = helpers.make_network(channels=old).eval()
    helpers.write_v1(tiny, helpers.published_weights(network), helpers.v1_plans(channels=old))
    image = torch.randn(1, 1, 32, 32, 64)
    images = {channels: image.expand(-1, channels, -1, -1, -1) for channels in (old, new)}
    for stem, factor in (("mean", 1.0), ("repeat", new / old)):
        model = stunet.model(tiny, "--in-channels", new, "--stem", stem)
        assert len(helpers.read(model, "dataset")["channel_names"]) == new
        assert len(helpers.configuration(model)["normalization_schemes"]) == new
        adapted = helpers.make_network(channels=new).eval()
        adapted.load_state_dict(helpers.checkpoint_in(model)["network_weights"])
        with torch.inference_mode():
            for name in network.keys_to_in_proj:
                layer, original = (module.get_submodule(name) for module in (adapted, network))
                bias = original.bias[:, None, None, None]
                expected = factor * (original(images[old]) - bias) + bias
                torch.testing.assert_close(layer(images[new]), expected, rtol=1e-4, atol=1e-5)
                assert old != new or torch.equal(layer.weight, original.weight)


@pytest.mark.shared
def test_prediction_agrees_in_every_orientation(shared: Path, stunet: Stunet) -> None:
    """A piece of a CT as it is, flipped, and with its axes permuted; each file's affine says so."""
    model = stunet.model(shared / "fixtures" / "stunet_v1_tiny.model")
    example = shared / "data" / "examples" / "example_ct_sm.nii.gz"
    piece = nibabel.load(example).slicer[40:60, 30:48, 2:24]
    files = {axes: stunet.folder / f"{axes}_0000.nii.gz" for axes in ("RAS", "LPS", "SLA")}
    for axes, file in files.items():
        turn = ornt_transform(io_orientation(piece.affine), axcodes2ornt(axes))
        nibabel.save(piece.as_reoriented(turn), file)
    targets = [str(stunet.folder / axes) for axes in files]
    predictor = helpers.load_model(model, stunet.patch)
    predictor.predict_from_files_sequential(
        [[str(file)] for file in files.values()], targets, False, True
    )
    upright = []
    for axes, file in files.items():
        image, predicted = nibabel.load(file), nibabel.load(stunet.folder / f"{axes}.nii.gz")
        assert predicted.shape == image.shape
        assert np.allclose(predicted.affine, image.affine)
        upright.append(np.asarray(nibabel.as_closest_canonical(predicted).dataobj))
    assert len(np.unique(upright[0])) > 2
    assert all(np.array_equal(labels, upright[0]) for labels in upright)


@pytest.mark.slow
def test_nnunet_takes_the_plan_and_the_weights(
    nnunet_environment: Workspace, stunet: Stunet, tmp_path: Path
) -> None:
    """What nnUNetv2_preprocess and nnUNetv2_train -pretrained_weights call, on a dataset with other
    classes."""
    network = helpers.published_weights(helpers.make_network())
    source = helpers.write_v1(tmp_path / "x.model", network)
    model = stunet.model(source, "--spacing 4 4 4")
    stunet("plan-like", model, "-d", PHANTOM_ID, "--name likeImported")
    preprocess_dataset(int(PHANTOM_ID), "likeImported", ("3d_fullres",), (1,))
    preprocessed = nnunet_environment.dataset_folder(nnunet_environment.preprocessed)
    assert any((preprocessed / "likeImported_3d_fullres").iterdir())

    plans = helpers.read(preprocessed, "likeImported") | {"continue_training": False}
    arguments = ("3d_fullres", 0, helpers.read(preprocessed, "dataset"), torch.device("cpu"))
    trainer = TRAINERS["STUNetTrainer_tiny_ft"](plans, *arguments)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(helpers.checkpoint_of(model)))
    loaded = helpers.published_weights(trainer.network)
    assert loaded["seg_outputs.4.weight"].shape != network["seg_outputs.4.weight"].shape
    shared = [name for name in network if not name.startswith("seg_outputs")]
    assert all(torch.equal(loaded[name], network[name]) for name in shared)
