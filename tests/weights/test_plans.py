"""Plans: what imported weights bring, what is refused, and ``stunet plan-like``."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)

from stunet_plugin.weights.source_plan import RESAMPLING

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
        ({f"{V1}/normalization_schemes": {0: "nonCT", 1: "nonCT"}}, "2 normalisation schemes"),
        ({f"{V1}/transpose_forward": [0, 0, 2]}, "transpose_forward"),
        ({f"{STAGE}/current_spacing": [1.5, 0, 1.5]}, "3 positive numbers"),
        ({f"{STAGE}/patch_size": [32, 32, 63]}, "divisible by [16, 16, 32]"),
        ({V1: helpers.v1_plans(channels=2)["plans"]}, "but the plan (tiny.model.pkl) has 2"),
    ],
)
def test_v1_plans_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, stunet: Stunet, tiny: Path
) -> None:
    assert message in stunet.refuse_import(with_v1_plans(tiny, changes))


def port_checkpoint(path: Path, plans: Any = None, dataset: Any = None) -> Path:
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
    torch.save(content, path)
    return path


def test_port_brings_its_plan_and_labels_but_not_its_network(
    stunet: Stunet, tmp_path: Path
) -> None:
    """nnU-Net imports the class that a plan names, so an imported plan always names ours."""
    evil = {f"{V2}/architecture/network_class_name": "os.system", "label_manager": "Evil"}
    model = stunet.model(port_checkpoint(tmp_path / "x.pth", evil), "--dataset-id 4 --name Heart")
    given, plans = helpers.v2_plans()["configurations"]["3d_fullres"], helpers.read(model)
    (written,) = plans["configurations"].values()
    differing = {key for key in given if written[key] != given[key]}
    assert differing == {"architecture"}
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
        ({f"{V2}/resampling_fn_data": "evil"}, {}, "resample_data_or_seg_to_shape"),
        ({"image_reader_writer": "EvilIO"}, {}, "NibabelIOWithReorient"),
        ({f"{V2}/previous_stage": "3d_lowres"}, {}, "cascade"),
        ({f"{V2}/architecture": FLAT}, {}, "all ones"),
        ({}, {"more": torch.ones(1)}, "it holds a Tensor"),
    ],
)
def test_plans_of_the_port_that_make_no_sense_are_refused(
    plans: Any, dataset: Any, message: str, stunet: Stunet, tmp_path: Path
) -> None:
    assert message in stunet.refuse_import(port_checkpoint(tmp_path / "x.pth", plans, dataset))


def test_user_names_a_plans_file_or_options(stunet: Stunet, tiny: Path, tmp_path: Path) -> None:
    source = helpers.write_v1(tmp_path / "x.model", plans={})
    assert "--plans FILE" in stunet.refuse_import(source)
    (tmp_path / "plans_3D.pkl").write_bytes(pickle.dumps(helpers.v1_plans()["plans"]))
    options = "--spacing 2 2 2 --mask-for-norm --reader NibabelIO"
    model = stunet.model(source, "--plans", tmp_path / "plans_3D.pkl", options)
    assert helpers.read(model)["image_reader_writer"] == "NibabelIO"
    written = helpers.configuration(model)
    assert (written["spacing"], written["use_mask_for_norm"]) == ([2, 2, 2], [True])
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
        ({"labels": LABELS | {"ignore": 5}}, True),
        (WHOLE | ORDER, True),
        (WHOLE, False),
        ({"labels": LABELS | {"a": -1}}, False),
        ({"labels": {"background": 0, "a": 1, "b": 2, "c": 3, "d": 5}}, False),
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


def test_resampling_is_that_of_nnunet() -> None:
    """v1 and v2 share these defaults; a v1 plan does not name them."""
    data, data_kwargs, seg, seg_kwargs = ExperimentPlanner.determine_resampling(None)
    export, export_kwargs = ExperimentPlanner.determine_segmentation_softmax_export_fn(None)
    expected = {
        "resampling_fn_data": data.__name__,
        "resampling_fn_data_kwargs": data_kwargs,
        "resampling_fn_seg": seg.__name__,
        "resampling_fn_seg_kwargs": seg_kwargs,
        "resampling_fn_probabilities": export.__name__,
        "resampling_fn_probabilities_kwargs": export_kwargs,
    }
    assert expected == RESAMPLING


NAME = "STUNetPlans_like_tiny"


@pytest.fixture
def model(stunet: Stunet, tiny: Path) -> Path:
    return stunet.model(tiny)


def test_plan_takes_the_images_from_the_model_and_the_rest_from_the_dataset(
    stunet: Stunet, model: Path, planned: Path
) -> None:
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


def test_plan_is_never_overwritten_without_force(
    stunet: Stunet, model: Path, planned: Path
) -> None:
    command = ("plan-like", model, "-d 7 --name")
    stunet(*command, "mine")
    assert "--force" in stunet.refuse(*command, "mine")
    stunet(*command, "mine", "--force")
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
    assert "has no plan" in stunet.refuse("plan-like", bare, "-d 7")
    assert "nnUNetv2_plan_experiment -d 8" in stunet.refuse("plan-like", model, "-d 8")
