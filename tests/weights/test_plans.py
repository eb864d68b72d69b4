"""Plans: what imported weights bring, what is refused, that v2 prepares images as v1 did, and
``stunet plan-like``."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import binary_fill_holes
from skimage.transform import resize

import import_helpers as helpers
from conftest import Stunet

LABELS = {name: value for value, name in enumerate(("background", *"abcd"))}
DATASET = {"channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending": ".nrrd"}
INTENSITIES = "foreground_intensity_properties_per_channel"
V1, STAGE, V2 = "plans", "plans/plans_per_stage/0", "configurations/3d_fullres"
"""Where in the plans of either version their values are."""


def strides_of(model: Path) -> list[list[int]]:
    return helpers.configuration(model)["architecture"]["arch_kwargs"]["strides"]


def with_v1_plans(tiny: Path, changes: dict[str, Any]) -> Path:
    return helpers.write_v1(tiny, plans=helpers.with_changes(helpers.v1_plans(), changes))


def test_ct_keeps_its_intensities(stunet: Stunet, tiny: Path, planned: Path) -> None:
    """They belong to the normalisation, so `stunet plan-like` takes them too."""
    given = {"mean": 100.0, "percentile_00_5": -900.0, "percentile_99_5": 800.0, "median": 90.0}
    statistics = {0: {**given, "sd": 50.0, "mn": -1000.0, "mx": 3000.0, "local_props": {"a": 1}}}
    changes = {
        f"{V1}/normalization_schemes": {0: "CT"},
        f"{V1}/dataset_properties": {"intensityproperties": statistics},
    }
    model = stunet.model(with_v1_plans(tiny, changes))
    stunet("plan-like", model, "-d 7")
    expected = {**given, "std": 50.0, "min": -1000.0, "max": 3000.0}
    for folder, name in ((model, "plans"), (planned, NAME)):
        written = helpers.configuration(folder, name)
        assert written["normalization_schemes"] == ["CTNormalization"]
        assert helpers.read(folder, name)[INTENSITIES] == {"0": expected}


def test_v1_stage_and_batch_dice_come_from_the_trainer(stunet: Stunet, tiny: Path) -> None:
    content = helpers.v1_plans()
    stages = content["plans"]["plans_per_stage"]
    stages[1] = {**stages[0], "current_spacing": [0.7, 0.7, 0.7]}
    second = {**content, "init": ("", 0, "", "", True, 1, True, False, True)}
    # Without a trainer the last stage is the finest.
    for given, spacing, batch_dice in (
        (content, 1.5, False),
        (second, 0.7, True),
        (content["plans"], 0.7, False),
    ):
        written = helpers.configuration(stunet.model(helpers.write_v1(tiny, plans=given)))
        assert (written["spacing"], written["batch_dice"]) == ([spacing] * 3, batch_dice)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{V1}/normalization_schemes": {0: "CT2"}}, "CT2"),
        ({f"{V1}/normalization_schemes": {0: "CT"}}, "'mx'"),
        ({f"{V1}/normalization_schemes": {0: "nonCT", 1: "nonCT"}}, "2 normalisation schemes"),
        ({f"{V1}/normalization_schemes": {1: "nonCT"}}, "channels 0, 1"),
        ({f"{V1}/transpose_forward": [0, 0, 2]}, "transpose_forward"),
        ({f"{STAGE}/current_spacing": [1.5, 0, 1.5]}, "3 positive numbers"),
        ({f"{STAGE}/patch_size": [32, 32]}, "3 positive whole numbers"),
        ({f"{STAGE}/patch_size": [32, 32, 63]}, "divisible by [16, 16, 32]"),
        ({f"{STAGE}/patch_size": [16, 16, 32]}, "single voxel"),
        ({f"{STAGE}/batch_size": 0}, "at least 1"),
        ({f"{STAGE}/pool_op_kernel_sizes": [[2, 2, 2]] * 20_000}, "pool_op_kernel_sizes"),
        ({f"{V1}/plans_per_stage": {0: 5}}, "not a table"),
        ({V1: helpers.v1_plans(channels=2)["plans"]}, "but the plan (tiny.model.pkl) has 2"),
        ({V1: {"num_classes": 4}}, "'plans_per_stage'"),
    ],
)
def test_v1_plans_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, stunet: Stunet, tiny: Path
) -> None:
    assert message in stunet.refuse_import(with_v1_plans(tiny, changes))


@pytest.mark.parametrize("poolings", [3, 7])
def test_poolings_are_cut_or_padded_to_the_published_five(
    poolings: int, stunet: Stunet, tiny: Path
) -> None:
    pooled = {f"{STAGE}/pool_op_kernel_sizes": [[1, 2, 2]] * poolings}
    model = stunet.model(with_v1_plans(tiny, {**pooled, f"{STAGE}/patch_size": [32, 128, 128]}))
    padding = [[1, 1, 1]] * max(0, 5 - poolings)
    assert strides_of(model) == [[1, 1, 1]] + [[1, 2, 2]] * min(poolings, 5) + padding


def port_checkpoint(path: Path, plans: Any = None, dataset: Any = None, **more: Any) -> Path:
    """A checkpoint of the published v2 port, with changes of its plans and dataset."""
    arguments = {
        "plans": helpers.with_changes(helpers.v2_plans(), plans or {}),
        "dataset_json": {**DATASET, **(dataset or {})},
    }
    content = {
        "network_weights": helpers.published_weights(helpers.make_network()),
        "init_args": {"configuration": "3d_fullres", "fold": 0, **arguments},
        "trainer_name": "STUNetTrainer_base_ft",
    }
    torch.save({**content, **more}, path)
    return path


def test_port_brings_its_plan_and_labels_but_not_its_network(
    stunet: Stunet, tmp_path: Path
) -> None:
    """nnU-Net imports the class that a plan names, so an imported plan always names ours."""
    evil = {f"{V2}/architecture/network_class_name": "os.system", "label_manager": "Evil"}
    model = stunet.model(port_checkpoint(tmp_path / "x.pth", evil), "--dataset-id 4 --name Heart")
    given, plans = helpers.v2_plans()["configurations"]["3d_fullres"], helpers.read(model)
    (written,) = plans["configurations"].values()
    taken = ("spacing", "patch_size", "batch_size", "normalization_schemes", "batch_dice")
    for key in (*taken, "use_mask_for_norm"):
        assert written[key] == given[key]
    assert written["architecture"]["network_class_name"] == "stunet_plugin.networks.stunet.STUNet"
    assert plans["image_reader_writer"] == "SimpleITKIO", "as in its training"
    assert plans[INTENSITIES] == {"0": {"mean": 10.0, "std": 2.0}}
    dataset = helpers.read(model, "dataset")
    assert {key: dataset[key] for key in DATASET} == DATASET
    checkpoint = helpers.checkpoint_in(model)
    assert checkpoint["trainer_name"] == "STUNetTrainer_tiny", "the weights' size, not the name's"
    text = json.dumps(plans) + json.dumps(checkpoint["init_args"])
    assert "os.system" not in text
    assert "Evil" not in text


def test_plans_before_2_3_and_inherited_configurations_are_read(stunet: Stunet, tiny: Path) -> None:
    plans = helpers.v2_plans()
    base = plans["configurations"].pop("3d_fullres")
    strides = base.pop("architecture")["arch_kwargs"]["strides"]
    base.update(UNet_class_name="PlainConvUNet", pool_op_kernel_sizes=strides)
    inherited = {"inherits_from": "base", "batch_size": 4}
    plans["configurations"] |= {"base": base, "3d_fullres": inherited}
    (stunet.folder / "plans.json").write_text(json.dumps(plans))
    model = stunet.model(tiny, "--plans", stunet.folder / "plans.json")
    assert helpers.configuration(model)["batch_size"] == 4
    assert strides_of(model) == strides


FLAT = {"arch_kwargs": {"strides": [[2, 2, 2]] * 6}}


@pytest.mark.parametrize(
    ("plans", "dataset", "message"),
    [
        ({f"{V2}/normalization_schemes": ["os.system"]}, {}, "ZScoreNormalization"),
        ({f"{V2}/normalization_schemes": ["CTNormalization"]}, {}, "'max'"),
        ({f"{V2}/resampling_fn_data": "evil"}, {}, "resample_data_or_seg_to_shape"),
        ({f"{V2}/resampling_fn_data_kwargs": {"order": [1]}}, {}, "order must be"),
        ({"image_reader_writer": "EvilIO"}, {}, "NibabelIOWithReorient"),
        ({f"{V2}/previous_stage": "3d_lowres"}, {}, "cascade"),
        ({f"{V2}/inherits_from": "3d_fullres"}, {}, "inherits without end"),
        ({f"{V2}/architecture": FLAT}, {}, "all ones"),
        ({f"{V2}/use_mask_for_norm": [True, True]}, {}, "2 masks"),
        ({"configurations": {"2d": {}}}, {}, "'3d_fullres'"),
        ({}, {"more": torch.ones(1)}, "it holds a Tensor"),
        ({}, {"file_ending": "/etc"}, "file_ending"),
        ({}, {"axes": [[0]]}, "mirroring"),
        ({}, {"axes": (0, 7)}, "mirroring"),
    ],
)
def test_plans_of_the_port_that_make_no_sense_are_refused(
    plans: Any, dataset: Any, message: str, stunet: Stunet, tmp_path: Path
) -> None:
    more = {"inference_allowed_mirroring_axes": dataset["axes"]} if "axes" in dataset else {}
    source = port_checkpoint(tmp_path / "x.pth", plans, dataset, **more)
    assert message in stunet.refuse_import(source)


def test_user_names_a_plans_file_or_options(stunet: Stunet, tiny: Path, tmp_path: Path) -> None:
    source = helpers.write_v1(tmp_path / "x.model", plans={})
    message = stunet.refuse_import(source)
    assert "x.model.pkl" in message
    assert "--plans FILE" in message
    (tmp_path / "plans.json").write_text(json.dumps(helpers.v2_plans()))
    (tmp_path / "plans_3D.pkl").write_bytes(pickle.dumps(helpers.v1_plans()["plans"]))
    v2 = stunet.model(source, "--plans", tmp_path / "plans.json", "--spacing 2 2 2")
    assert helpers.configuration(v2)["spacing"] == [2, 2, 2]
    options = "--mask-for-norm --reader NibabelIO"
    v1 = stunet.model(source, "--plans", tmp_path / "plans_3D.pkl", options)
    assert helpers.read(v1)["image_reader_writer"] == "NibabelIO"
    assert helpers.configuration(v1)["use_mask_for_norm"] == [True]
    strides = "--strides 1,1,1 1,2,2 2,2,2 2,2,2 2,2,2 2,2,2"
    given = stunet.model(source, "--spacing 3 1 1 --patch-size 32 64 64", strides)
    assert strides_of(given) == [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--strides 2,2,x", "--strides must be"),
        ("--spacing 1 -1 1", "3 positive numbers"),
        ("--dataset-id 1000", "1 to 999"),
        ("--name a/b", "--name may hold"),
        ("--fold one", "--fold must be"),
        ("--mode 1", "--mode"),
        ("--in-channels 0", "at least 1"),
        ("--plans none.json", "none.json"),
        ("--labels background a", "5 outputs"),
        ("--labels a b c d e", "'background'"),
        ("--labels background a a b c", "'a'"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str, stunet: Stunet, tiny: Path) -> None:
    assert message in stunet.refuse_import(tiny, options)


WHOLE = {"labels": LABELS | {"whole": [1, 2]}}
ORDER: dict[str, Any] = {"regions_class_order": [1, 2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("content", "fits"),
    [
        ({str(number): name for number, name in enumerate(LABELS)}, True),
        (LABELS, True),
        ({"labels": LABELS, "numTraining": 3}, True),
        ({"labels": LABELS | {"ignore": 5}}, True),
        (WHOLE | ORDER, True),
        (WHOLE, False),
        ({"labels": LABELS, "regions_class_order": "x"}, False),
        *(({"labels": LABELS | {"a": value}}, False) for value in ("x", -1, 70_000)),
        *(({"labels": labels}, False) for labels in ([], {})),
        ({"labels": {"background": 0, "a": 1, "b": 2, "c": 3, "d": 5}}, False),
        ({"labels": {"x": 0, "a": 1, "b": 2, "c": 3, "d": 4}}, False),
        ({"labels": LABELS | {"ignore": 1}}, False),
        ({"0": "background", "1": "a", "3": "b"}, False),
    ],
)
def test_label_files_are_those_that_nnunet_takes(
    content: dict[str, Any], fits: bool, stunet: Stunet, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(content))
    option = ("--labels", tmp_path / "labels.json")
    if not fits:
        assert "labels.json" in stunet.refuse_import(tiny, *option)
        return
    dataset = helpers.read(stunet.model(tiny, *option), "dataset")
    assert dataset["labels"] == content.get("labels", LABELS)
    assert dataset.get("regions_class_order") == content.get("regions_class_order")


def prepared_by_v1(image: np.ndarray, spacing: list[float], target: list[float]) -> np.ndarray:
    """What nnU-Net v1 makes of a nonCT channel: crop to nonzero, resample, then z-score."""
    where = np.where(binary_fill_holes(image != 0))
    cropped = image[tuple(slice(axis.min(), axis.max() + 1) for axis in where)].astype(np.float64)
    shape = np.round(np.array(spacing) / np.array(target) * np.array(cropped.shape)).astype(int)
    resampled = resize(cropped, shape, 3, cval=0, mode="edge", anti_aliasing=False)
    resampled = resampled.astype(np.float32)
    return (resampled - resampled.mean()) / (resampled.std() + 1e-8)


@pytest.mark.shared
@pytest.mark.parametrize("file", ["example_ct_sm.nii.gz", "example_mr_sm.nii.gz"])
def test_images_are_prepared_as_in_v1(file: str, shared: Path, stunet: Stunet, tiny: Path) -> None:
    """Equal up to one factor near 1: v1 takes the standard deviation after resampling, v2 before
    (see the decisions)."""
    manager = PlansManager(helpers.read(stunet.model(tiny)))
    path = shared / "data" / "examples" / file
    image, properties = NibabelIOWithReorient().read_images([str(path)])
    image = np.ascontiguousarray(image[:, :, 30:80, 30:80])
    expected = prepared_by_v1(image[0], properties["spacing"], [1.5] * 3)
    chosen = manager.get_configuration("3d_fullres")
    prepared, _, _ = DefaultPreprocessor(verbose=False).run_case_npy(
        image, None, copy.deepcopy(properties), manager, chosen, {}
    )
    assert prepared[0].shape == expected.shape
    values = prepared[0].astype(np.float64)
    factor, offset = np.polyfit(expected.ravel().astype(np.float64), values.ravel(), 1)
    assert np.abs(factor * expected + offset - values).max() < 1e-5
    assert factor == pytest.approx(1, abs=0.03)
    assert offset == pytest.approx(0, abs=1e-3)


NAME = "STUNetPlans_like_tiny"


@pytest.fixture
def model(stunet: Stunet, tiny: Path) -> Path:
    return stunet.model(tiny)


def test_plan_takes_the_images_from_the_model_and_the_rest_from_the_dataset(
    stunet: Stunet, model: Path, planned: Path
) -> None:
    before = {path: path.read_bytes() for path in planned.iterdir()}
    stunet("plan-like", model, "-d 7")
    plans, given = helpers.read(planned, NAME), helpers.configuration(model)
    written = plans["configurations"]["3d_fullres"]
    taken = ("spacing", "patch_size", "batch_size", "normalization_schemes", "architecture")
    for key in (*taken, "use_mask_for_norm", "resampling_fn_data_kwargs"):
        assert written[key] == given[key]
    expected = {
        "transpose_forward": [0, 1, 2],
        "image_reader_writer": "NibabelIOWithReorient",
        "dataset_name": "Dataset007_Other",
        "plans_name": NAME,
        INTENSITIES: {"0": {"mean": 10.0, "std": 2.0}},
        # The dataset's plan moves axis 2 to the front, the model's leaves the axes as they are.
        "original_median_spacing_after_transp": [1.0, 0.5, 3.0],
        "original_median_shape_after_transp": [200, 300, 40],
    }
    assert {key: plans[key] for key in expected} == expected
    assert written["data_identifier"] == f"{NAME}_3d_fullres"
    assert written["batch_dice"] is True, "of the dataset"
    assert written["median_image_size_in_voxels"] == pytest.approx([200 / 1.5, 100, 80])
    assert {path: path.read_bytes() for path in before} == before


def test_plan_is_never_overwritten_without_force(
    stunet: Stunet, model: Path, planned: Path
) -> None:
    command = ("plan-like", model, "-d 7 --name")
    stunet(*command, "mine")
    assert "--force" in stunet.refuse(*command, "mine")
    (planned / "mine_3d_fullres").mkdir()
    assert "preprocess again" in stunet(*command, "mine", "--force")
    (planned / "notes.json").write_text("[")
    change = {f"{V2}/data_identifier": "theirs_3d_fullres"}
    other = helpers.with_changes(helpers.v2_plans(), change)
    (planned / "otherPlans.json").write_text(json.dumps(other))
    for name, message in (
        ("nnUNetPlans", "file of nnU-Net"),
        ("a__b", "single '_'"),
        ("theirs", "otherPlans.json"),
    ):
        assert message in stunet.refuse(*command, name, "--force")


def test_plan_for_other_readers_and_channels(
    stunet: Stunet, tiny: Path, model: Path, planned: Path
) -> None:
    """The dataset's reader stays where the model's cannot read; other channels need another stem;
    channels that are normalised in different ways cannot be told apart."""
    changes = {"file_ending": ".nrrd", "channel_names": {"0": "T1", "1": "T2"}}
    dataset = helpers.read(planned, "dataset") | changes
    (planned / "dataset.json").write_text(json.dumps(dataset))
    assert "--in-channels 2" in stunet("plan-like", model, "-d 7")
    assert helpers.read(planned, NAME)["image_reader_writer"] == "SimpleITKIO"
    written = helpers.configuration(planned, NAME)
    assert written["normalization_schemes"] == ["ZScoreNormalization"] * 2
    plans = helpers.v1_plans(channels=3)
    plans["plans"]["normalization_schemes"] = {0: "nonCT", 1: "noNorm", 2: "nonCT"}
    weights = helpers.published_weights(helpers.make_network(channels=3))
    mixed = stunet.model(helpers.write_v1(tiny, weights, plans))
    assert "different ways" in stunet.refuse("plan-like", mixed, "-d 7 --force")


def test_plan_like_names_what_is_missing(stunet: Stunet, model: Path, planned: Path) -> None:
    bare = helpers.write_v1(stunet.folder / "bare.model", plans={})
    for given, options, message in (
        (model, "-d 8", "Dataset008_*"),
        (bare, "-d 7", "has no plan"),
        (stunet.folder, "-d 7", "no model folder"),
    ):
        assert message in stunet.refuse("plan-like", given, options)
    (planned / "nnUNetPlans.json").unlink()
    assert "nnUNetv2_plan_experiment -d 7" in stunet.refuse("plan-like", model, "-d 7")
    stunet.patch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in stunet.refuse("plan-like", model, "-d 7")
