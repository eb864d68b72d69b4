"""``stunet plan-like`` and ``stunet inspect`` on imported models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Stunet
from import_helpers import (
    CONFIGURATION,
    CT_V1,
    configuration,
    make_network,
    published_weights,
    read,
    v1_plans,
    v2_plans,
    with_changes,
    write_planned_dataset,
    write_v1,
)

NAME = "STUNetPlans_like_tiny"


def test_inspect_says_what_is_known_and_reads_no_weights(stunet: Stunet, tiny: Path) -> None:
    weights = published_weights(make_network())
    # Weights that an import would refuse show that nothing looks at them.
    weights["seg_outputs.0.bias"].fill_(float("nan"))
    said = stunet("inspect", write_v1(tiny, weights))
    for words in (
        "torch file (zip format)",
        "nnU-Net v1 checkpoint of the published STU-Net",
        "STU-Net tiny (widths [4, 8, 16, 32, 64, 64]",
        "1 input channel(s), 5 outputs",
        "spacing 1.5 x 1.5 x 1.5 mm, patch 32 x 32 x 64",
        "5: background, class_1",
        "4000",
    ):
        assert words in said
    pickled = tiny.with_name("tiny.model.pkl")
    assert "plans of nnU-Net v1" in stunet("inspect", pickled)
    pickled.unlink()
    assert "unknown" in stunet("inspect", tiny)


def test_inspect_shows_the_provenance_of_a_folder(stunet: Stunet, tiny: Path) -> None:
    model = stunet.model(tiny, "--labels background a b c d")
    said = stunet("inspect", model)
    assert said == stunet("inspect", model / "fold_0")
    assert "5: background, a, b, c, d" in said
    assert f"from {tiny} by stunet-plugin" in said
    assert "no model folder" in stunet.refuse("inspect", stunet.folder)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_planned_dataset(tmp_path, monkeypatch)


@pytest.fixture
def model(stunet: Stunet, tiny: Path) -> Path:
    return stunet.model(tiny)


def test_plan_takes_the_images_from_the_model_and_the_rest_from_the_dataset(
    stunet: Stunet, model: Path, planned: Path
) -> None:
    before = {path: path.read_bytes() for path in planned.iterdir()}
    stunet("plan-like", model, "-d 7")
    plans, written, given = read(planned, NAME), configuration(planned, NAME), configuration(model)
    taken = ("spacing", "patch_size", "batch_size", "normalization_schemes", "architecture")
    for key in (*taken, "use_mask_for_norm", "resampling_fn_data_kwargs"):
        assert written[key] == given[key]
    expected = {
        "transpose_forward": [0, 1, 2],
        "image_reader_writer": "NibabelIOWithReorient",
        "dataset_name": "Dataset007_Other",
        "plans_name": NAME,
        "foreground_intensity_properties_per_channel": {"0": {"mean": 10.0, "std": 2.0}},
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
    other = with_changes(v2_plans(), {f"{CONFIGURATION}/data_identifier": "theirs_3d_fullres"})
    (planned / "otherPlans.json").write_text(json.dumps(other))
    for name, message in (
        ("nnUNetPlans", "file of nnU-Net"),
        ("a__b", "single '_'"),
        ("dataset", "file of nnU-Net"),
        ("theirs", "otherPlans.json"),
    ):
        assert message in stunet.refuse(*command, name, "--force")


def test_ct_constants_belong_to_the_normalisation(
    stunet: Stunet, tiny: Path, planned: Path
) -> None:
    plans = v1_plans()
    statistics = {"intensityproperties": {0: CT_V1}}
    plans["plans"].update(normalization_schemes={0: "CT"}, dataset_properties=statistics)
    stunet("plan-like", stunet.model(write_v1(tiny, plans=plans)), "-d 7")
    written = read(planned, NAME)["foreground_intensity_properties_per_channel"]
    assert written["0"]["std"] == 50.0


def change_dataset(folder: Path, **changes: Any) -> None:
    (folder / "dataset.json").write_text(json.dumps({**read(folder, "dataset"), **changes}))


def test_reader_of_the_dataset_stays_where_the_models_cannot_read(
    stunet: Stunet, model: Path, planned: Path
) -> None:
    change_dataset(planned, file_ending=".nrrd")
    stunet("plan-like", model, "-d 7")
    assert read(planned, NAME)["image_reader_writer"] == "SimpleITKIO"


def test_other_channel_counts_ask_for_another_stem(
    stunet: Stunet, tiny: Path, model: Path, planned: Path
) -> None:
    change_dataset(planned, channel_names={"0": "T1", "1": "T2"})
    assert "--in-channels 2" in stunet("plan-like", model, "-d 7")
    assert configuration(planned, NAME)["normalization_schemes"] == ["ZScoreNormalization"] * 2
    # Channels that are normalised in different ways cannot be told apart.
    plans = v1_plans(channels=3)
    plans["plans"]["normalization_schemes"] = {0: "nonCT", 1: "noNorm", 2: "nonCT"}
    weights = published_weights(make_network(channels=3))
    mixed = stunet.model(write_v1(tiny, weights, plans))
    assert "different ways" in stunet.refuse("plan-like", mixed, "-d 7 --force")


def test_plan_like_names_what_is_missing(stunet: Stunet, model: Path, planned: Path) -> None:
    bare = write_v1(stunet.folder / "bare.model", plans={})
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
