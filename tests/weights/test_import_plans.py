"""Plans of imported weights: what is taken over, what is refused, and that v2 prepares images as v1
did."""

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

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.read_plans import plan_from_v2, read_plans_file
from stunet_plugin.weights.source_plan import RESAMPLING, SourcePlan

from import_helpers import (
    checkpoint_in,
    make_network,
    published_weights,
    refuse,
    stunet_import,
    v1_plans,
    v2_plans,
    with_changes,
    write_v1,
)

CT_V1 = {
    "mean": 100.0,
    "sd": 50.0,
    "percentile_00_5": -900.0,
    "percentile_99_5": 800.0,
    "mn": -1000.0,
    "mx": 3000.0,
    "median": 90.0,
}
CT_V2 = {
    "mean": 100.0,
    "std": 50.0,
    "percentile_00_5": -900.0,
    "percentile_99_5": 800.0,
    "min": -1000.0,
    "max": 3000.0,
    "median": 90.0,
}
STAGE = "plans/plans_per_stage/0"
FULLRES = "configurations/3d_fullres"


def plans_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "plans.json").read_text())
    return content


# --- nnU-Net v1


def read_v1(folder: Path, content: dict[str, Any]) -> SourcePlan:
    """The plan of a pickle with this content."""
    path = folder / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    return read_plans_file(path)


def test_v1_ct_keeps_its_intensities(tmp_path: Path) -> None:
    plans = v1_plans()["plans"]
    plans["normalization_schemes"] = {0: "CT"}
    plans["dataset_properties"] = {
        "intensityproperties": {0: {**CT_V1, "local_props": {"case": 1}}}
    }
    plan = read_v1(tmp_path, plans)
    assert plan.normalization == ("CTNormalization",)
    assert plan.intensities == (CT_V2,)


def test_v1_stage_and_batch_dice_come_from_the_trainer(tmp_path: Path) -> None:
    content = v1_plans()
    stages = content["plans"]["plans_per_stage"]
    stages[1] = {**stages[0], "current_spacing": [0.7, 0.7, 0.7]}
    assert read_v1(tmp_path, content).spacing == (1.5, 1.5, 1.5)
    content["init"] = ("", 0, "", "", True, 1, True, False, True)
    chosen = read_v1(tmp_path, content)
    assert (chosen.spacing, chosen.batch_dice) == ((0.7, 0.7, 0.7), True)
    assert read_v1(tmp_path, content["plans"]).spacing == (0.7, 0.7, 0.7), (
        "without a trainer the last stage is the finest"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plans/normalization_schemes": {0: "CT2"}}, "CT2"),
        ({"plans/normalization_schemes": {0: "CT"}}, "has no 'mx'"),
        ({"plans/normalization_schemes": {0: "nonCT", 1: "nonCT"}}, "2 normalisation schemes"),
        ({"plans/normalization_schemes": {1: "nonCT"}}, "channels 0, 1"),
        ({"plans/transpose_forward": [0, 0, 2]}, "an order of the axes"),
        ({f"{STAGE}/current_spacing": [1.5, 0, 1.5]}, "3 positive numbers"),
        ({f"{STAGE}/current_spacing": [1.5, float("nan"), 1.5]}, "3 positive numbers"),
        ({f"{STAGE}/patch_size": [32, 32]}, "3 positive whole numbers"),
        ({f"{STAGE}/patch_size": "128"}, "3 positive whole numbers"),
        ({f"{STAGE}/patch_size": [32, 32, 63]}, "must be divisible by [16, 16, 32]"),
        ({f"{STAGE}/patch_size": [16, 16, 32]}, "leaves a single voxel"),
        ({f"{STAGE}/batch_size": 0}, "at least 1"),
        ({f"{STAGE}/pool_op_kernel_sizes": []}, "3 whole numbers for each pooling"),
        (
            {f"{STAGE}/pool_op_kernel_sizes": [[2, 2, 2]] * 20_000},
            "3 whole numbers for each pooling",
        ),
        ({"plans/plans_per_stage": {0: 5}}, "not a table"),
        ({"plans": {"num_classes": 4}}, "has no 'plans_per_stage'"),
    ],
)
def test_v1_plans_that_make_no_sense_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_v1(tmp_path / "x.model", plans=with_changes(v1_plans(), change))
    assert message in refuse(capsys, source, tmp_path / "out" / "model")


@pytest.mark.shared
def test_published_plans_pkl_lacks_what_is_needed(shared: Path) -> None:
    with pytest.raises(PluginError, match="published plans.pkl lacks them too"):
        read_plans_file(shared / "fixtures" / "official" / "plans.pkl")


@pytest.mark.parametrize("poolings", [3, 7])
def test_poolings_are_cut_or_padded_to_the_published_five(poolings: int, tmp_path: Path) -> None:
    change = {
        f"{STAGE}/pool_op_kernel_sizes": [[1, 2, 2]] * poolings,
        f"{STAGE}/patch_size": [32, 128, 128],
    }
    source = write_v1(tmp_path / "x.model", plans=with_changes(v1_plans(), change))
    assert stunet_import(source, "--out", tmp_path / "model") == 0
    strides = plans_of(tmp_path / "model")["configurations"]["3d_fullres"]["architecture"][
        "arch_kwargs"
    ]["strides"]
    assert strides == [[1, 1, 1]] + [[1, 2, 2]] * min(poolings, 5) + [[1, 1, 1]] * (
        5 - min(poolings, 5)
    )


# --- nnU-Net v2


def port_checkpoint(path: Path, plans: dict[str, Any], dataset: dict[str, Any]) -> Path:
    """A checkpoint of the published v2 port."""
    arguments = {
        "plans": plans,
        "configuration": "3d_fullres",
        "fold": 0,
        "dataset_json": dataset,
        "unpack_dataset": True,
    }
    weights = published_weights(make_network())
    content = {
        "network_weights": weights,
        "init_args": arguments,
        "trainer_name": "STUNetTrainer_base_ft",
        "_best_ema": np.float64(0.8),
    }
    torch.save(content, path)
    return path


DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4},
    "file_ending": ".nrrd",
}


def test_port_brings_its_plan_and_labels(tmp_path: Path) -> None:
    source = port_checkpoint(tmp_path / "port.pth", v2_plans(), DATASET)
    assert (
        stunet_import(
            source, "--out", tmp_path / "model", "--dataset-id", "4", "--name", "Hippocampus"
        )
        == 0
    )
    plans = plans_of(tmp_path / "model")
    configuration, given = (
        plans["configurations"]["3d_fullres"],
        v2_plans()["configurations"]["3d_fullres"],
    )
    for key in (
        "spacing",
        "patch_size",
        "batch_size",
        "normalization_schemes",
        "use_mask_for_norm",
        "batch_dice",
    ):
        assert configuration[key] == given[key]
    assert {key: configuration[key] for key in RESAMPLING} == RESAMPLING
    assert (
        configuration["architecture"]["network_class_name"]
        == "stunet_plugin.networks.stunet.STUNet"
    )
    assert list(plans["configurations"]) == ["3d_fullres"]
    assert plans["image_reader_writer"] == "SimpleITKIO", (
        "it was trained with that reader, so it keeps it"
    )
    assert plans["foreground_intensity_properties_per_channel"] == {"0": {"mean": 10.0, "std": 2.0}}
    dataset = json.loads((tmp_path / "model" / "dataset.json").read_text())
    assert {key: dataset[key] for key in DATASET} == DATASET
    assert checkpoint_in(tmp_path / "model")["trainer_name"] == "STUNetTrainer_tiny", (
        "size from the weights, not from the name"
    )


def test_plans_before_2_3_and_inherited_configurations_are_read() -> None:
    plans = v2_plans()
    configuration = plans["configurations"]["3d_fullres"]
    strides = configuration.pop("architecture")["arch_kwargs"]["strides"]
    configuration.update(UNet_class_name="PlainConvUNet", pool_op_kernel_sizes=strides)
    plans["configurations"]["larger"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    plan = plan_from_v2(plans, "larger", "x")
    assert (plan.batch_size, [list(stage) for stage in plan.poolings]) == (4, strides[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{FULLRES}/normalization_schemes": ["os.system"]}, "must be one of ZScoreNormalization"),
        ({f"{FULLRES}/normalization_schemes": ["CTNormalization"]}, "has no 'max'"),
        ({f"{FULLRES}/resampling_fn_data": "evil"}, "must be one of resample_data_or_seg_to_shape"),
        ({f"{FULLRES}/resampling_fn_data_kwargs": {"order": [1]}}, "a number, text"),
        ({"image_reader_writer": "EvilIO"}, "must be one of NibabelIOWithReorient"),
        ({f"{FULLRES}/previous_stage": "3d_lowres"}, "second stage of a cascade"),
        ({f"{FULLRES}/inherits_from": "3d_fullres"}, "inherits without end"),
        (
            {f"{FULLRES}/architecture": {"arch_kwargs": {"strides": [[2, 2, 2]] * 6}}},
            "must be all ones",
        ),
        ({"configurations": {"2d": {}}}, "has no '3d_fullres'"),
    ],
)
def test_v2_plans_that_make_no_sense_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = port_checkpoint(tmp_path / "port.pth", with_changes(v2_plans(), change), DATASET)
    assert message in refuse(capsys, source, tmp_path / "out" / "model")


def bomb() -> list[Any]:
    """A few hundred bytes in a file, 2**60 values when written out."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("plans", "dataset", "more", "message"),
    [
        ({"more": bomb()}, {}, {}, "nested without end"),
        ({}, {"channel_names": {"0": bomb()}}, {}, "nested without end"),
        ({}, {"more": torch.ones(1)}, {}, "it holds a Tensor"),
        ({}, {}, {"inference_allowed_mirroring_axes": [[0]]}, "allows mirroring on"),
        ({}, {}, {"inference_allowed_mirroring_axes": (0, 7)}, "allows mirroring on (0, 7)"),
    ],
    ids=["endless plans", "endless names", "a tensor", "a nested axis", "an axis too many"],
)
def test_what_lies_beside_the_weights_is_checked(
    plans: dict[str, Any],
    dataset: dict[str, Any],
    more: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = port_checkpoint(tmp_path / "port.pth", {**v2_plans(), **plans}, {**DATASET, **dataset})
    content = torch.load(source, weights_only=False)
    torch.save({**content, **more}, source)
    assert message in refuse(capsys, source, tmp_path / "out" / "model")


def test_no_plan_can_name_a_network(tmp_path: Path) -> None:
    """nnU-Net imports the class that a plan names, so an imported plan always names ours."""
    plans = with_changes(
        v2_plans(),
        {f"{FULLRES}/architecture/network_class_name": "os.system", "label_manager": "Evil"},
    )
    assert (
        stunet_import(
            port_checkpoint(tmp_path / "port.pth", plans, DATASET), "--out", tmp_path / "model"
        )
        == 0
    )
    written = json.dumps(plans_of(tmp_path / "model")) + json.dumps(
        checkpoint_in(tmp_path / "model")["init_args"]
    )
    assert "os.system" not in written
    assert "Evil" not in written


def test_user_names_a_plans_file_or_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_v1(tmp_path / "x.model", plans={})
    message = refuse(capsys, source, tmp_path / "out" / "model")
    assert "x.model.pkl" in message
    assert "--plans FILE" in message
    v2_file, v1_file = tmp_path / "plans.json", tmp_path / "plans_3D.pkl"
    v2_file.write_text(json.dumps(v2_plans()))
    v1_file.write_bytes(pickle.dumps(v1_plans()["plans"]))
    assert (
        stunet_import(source, "--out", tmp_path / "v2", "--plans", v2_file, "--spacing", 2, 2, 2)
        == 0
    )
    assert (
        stunet_import(
            source,
            "--out",
            tmp_path / "v1",
            "--plans",
            v1_file,
            "--mask-for-norm",
            "--reader",
            "NibabelIO",
        )
        == 0
    )
    options = [
        "--spacing",
        3,
        1,
        1,
        "--patch-size",
        32,
        64,
        64,
        "--strides",
        "1,1,1",
        "1,2,2",
        *["2,2,2"] * 4,
    ]
    assert stunet_import(source, "--out", tmp_path / "options", *options) == 0
    assert plans_of(tmp_path / "v2")["configurations"]["3d_fullres"]["spacing"] == [2, 2, 2]
    v1 = plans_of(tmp_path / "v1")
    assert (v1["image_reader_writer"], v1["configurations"]["3d_fullres"]["use_mask_for_norm"]) == (
        "NibabelIO",
        [True],
    )
    configuration = plans_of(tmp_path / "options")["configurations"]["3d_fullres"]
    assert configuration["architecture"]["arch_kwargs"]["strides"] == [
        [1, 1, 1],
        [1, 2, 2],
        *[[2, 2, 2]] * 4,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strides", "2,2"], "not '2,2'"),
        (["--strides", "2,2,x"], "not '2,2,x'"),
        (["--spacing", "1", "-1", "1"], "3 positive numbers"),
        (["--dataset-id", "1000"], "from 1 to 999"),
        (["--name", "a/b"], "--name may hold"),
        (["--fold", "one"], "--fold must be"),
        (["--plans", "none.json"], "cannot be read as JSON"),
        (
            ["--labels", "background", "a"],
            "have 5 outputs, background included, but the labels (--labels) are 2",
        ),
        (["--labels", "a", "b", "c", "d", "e"], "must start with output 0, 'background'"),
        (["--labels", "background", "a", "a", "b", "c"], "'a' stands twice"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refuse(
        capsys, write_v1(tmp_path / "x.model"), tmp_path / "out" / "model", *arguments
    )


def test_channels_of_plan_and_weights_must_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_v1(tmp_path / "x.model", plans=v1_plans(channels=2))
    assert "take 1 image channels, but the plan (x.model.pkl) has 2" in refuse(
        capsys, source, tmp_path / "out" / "model"
    )


# --- preprocessing


def prepared_by_v1(image: np.ndarray, spacing: list[float], target: list[float]) -> np.ndarray:
    """What nnU-Net v1's GenericPreprocessor makes of a nonCT channel: crop to nonzero, resample,
    then z-score."""
    where = np.where(binary_fill_holes(image != 0))
    cropped = image[tuple(slice(axis.min(), axis.max() + 1) for axis in where)].astype(np.float64)
    shape = np.round(np.array(spacing) / np.array(target) * np.array(cropped.shape)).astype(int)
    resampled = resize(cropped, shape, 3, cval=0, mode="edge", anti_aliasing=False).astype(
        np.float32
    )
    result: np.ndarray = (resampled - resampled.mean()) / (resampled.std() + 1e-8)
    return result


@pytest.mark.shared
@pytest.mark.parametrize("file", ["example_ct_sm.nii.gz", "example_mr_sm.nii.gz"])
def test_images_are_prepared_as_in_v1(file: str, shared: Path, tmp_path: Path) -> None:
    """Equal up to one factor near 1: v1 takes the standard deviation after resampling, v2 before
    (see the decisions)."""
    assert stunet_import(write_v1(tmp_path / "x.model"), "--out", tmp_path / "model") == 0
    manager = PlansManager(plans_of(tmp_path / "model"))
    image, properties = NibabelIOWithReorient().read_images(
        [str(shared / "data" / "examples" / file)]
    )
    image = np.ascontiguousarray(image[:, :, 30:80, 30:80])
    expected = prepared_by_v1(image[0], properties["spacing"], [1.5] * 3)
    prepared, _, _ = DefaultPreprocessor(verbose=False).run_case_npy(
        image, None, copy.deepcopy(properties), manager, manager.get_configuration("3d_fullres"), {}
    )
    assert prepared[0].shape == expected.shape
    factor, offset = np.polyfit(
        expected.ravel().astype(np.float64), prepared[0].ravel().astype(np.float64), 1
    )
    assert np.abs(factor * expected + offset - prepared[0]).max() < 1e-5
    assert factor == pytest.approx(1, abs=0.03)
    assert offset == pytest.approx(0, abs=1e-3)
