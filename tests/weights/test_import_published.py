"""Imported weights compute what the published code computes; what is known of the published files;
other input channels; stock prediction and fine-tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from stunet_plugin.trainers.stunet_trainers import TRAINERS
from stunet_plugin.weights.locate import published_facts
from stunet_plugin.weights.safe_loading import load_plans_pickle

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
    strides = helpers.configuration(without)["architecture"]["arch_kwargs"]["strides"]
    assert strides == helpers.STRIDES
    labels = helpers.read(without, "dataset")["labels"]
    assert (labels["spleen"], len(labels)) == (77, 105)
    assert helpers.checkpoint_in(without)["trainer_name"] == "STUNetTrainer_small"


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 1), (2, 2)])
def test_stem_for_other_channels(old: int, new: int, stunet: Stunet, tiny: Path) -> None:
    """The response to the same image in all channels is that of the summed kernels: `mean` keeps
    it, `repeat` multiplies it by new / old."""
    network = helpers.make_network(channels=old)
    helpers.write_v1(tiny, helpers.published_weights(network), helpers.v1_plans(channels=old))
    for stem, factor in (("mean", 1.0), ("repeat", new / old)):
        model = stunet.model(tiny, "--in-channels", new, "--stem", stem)
        assert len(helpers.read(model, "dataset")["channel_names"]) == new
        assert len(helpers.configuration(model)["normalization_schemes"]) == new
        weights = helpers.checkpoint_in(model)["network_weights"]
        for name in network.keys_to_in_proj:
            given, adapted = network.get_submodule(name).weight, weights[f"{name}.weight"]
            assert adapted.shape[1] == new
            torch.testing.assert_close(adapted.sum(1), factor * given.sum(1).detach())
            assert old != new or torch.equal(adapted, given)


def test_prediction_agrees_in_every_orientation(stunet: Stunet, tiny: Path) -> None:
    """An image as it is, flipped, and with its axes permuted; each file's affine says so."""
    noise = np.random.default_rng(0).normal(size=(20, 18, 22)).astype(np.float32)
    image = nibabel.Nifti1Image(noise, np.diag([1.5, 1.5, 2, 1]))
    files = [stunet.folder / f"{axes}_0000.nii.gz" for axes in ("RAS", "LPS", "SAR")]
    for file in files:
        nibabel.save(image.as_reoriented(axcodes2ornt(file.name[:3])), file)
    targets = [str(file).removesuffix("_0000.nii.gz") for file in files]
    predictor = helpers.load_model(stunet.model(tiny), stunet.patch)
    predictor.predict_from_files_sequential([[str(x)] for x in files], targets, False, True)
    predicted = [nibabel.load(f"{target}.nii.gz") for target in targets]
    upright = [np.asarray(nibabel.as_closest_canonical(x).dataobj) for x in predicted]
    assert len(np.unique(upright[0])) > 1
    assert all(np.array_equal(labels, upright[0]) for labels in upright)


@pytest.mark.slow
def test_nnunet_takes_the_plan_and_the_weights(
    nnunet_environment: Workspace, stunet: Stunet, tiny: Path
) -> None:
    """What nnUNetv2_preprocess and nnUNetv2_train -pretrained_weights call, on a dataset with other
    classes."""
    model = stunet.model(tiny, "--spacing 4 4 4")
    stunet("plan-like", model, "-d", PHANTOM_ID, "--name likeImported")
    preprocess_dataset(int(PHANTOM_ID), "likeImported", ("3d_fullres",), (1,))
    preprocessed = nnunet_environment.dataset_folder(nnunet_environment.preprocessed)
    plans = helpers.read(preprocessed, "likeImported") | {"continue_training": False}
    arguments = ("3d_fullres", 0, helpers.read(preprocessed, "dataset"), torch.device("cpu"))
    trainer = TRAINERS["STUNetTrainer_tiny_ft"](plans, *arguments)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(helpers.checkpoint_of(model)))
    given, loaded = helpers.checkpoint_in(model)["network_weights"], trainer.network.state_dict()
    assert all(torch.equal(loaded[x], given[x]) for x in given if ".seg_layers." not in x)
    assert len(loaded["decoder.seg_layers.4.bias"]) != len(given["decoder.seg_layers.4.bias"])
