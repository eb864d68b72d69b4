"""Imported models in use: stock prediction in any orientation, ``stunet inspect``, ``stunet
plan-like``, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from stunet_plugin.cli import main
from stunet_plugin.trainers.stunet_trainers import TRAINERS

from conftest import PHANTOM_ID, Workspace
from import_helpers import (
    make_network,
    published_weights,
    stunet_import,
    v1_plans,
    v2_plans,
    with_changes,
    write_planned_dataset,
    write_v1,
)

EXAMPLE = Path("data", "examples", "example_ct_sm.nii.gz")


@pytest.mark.shared
def test_stock_prediction_agrees_in_every_orientation(
    shared: Path, tmp_path: Path, new_workspace: Callable[[str], Workspace]
) -> None:
    """A piece of a CT as it is, flipped, and with its axes permuted; each file's affine says so."""
    assert (
        stunet_import(shared / "fixtures" / "stunet_v1_tiny.model", "--out", tmp_path / "model")
        == 0
    )
    piece = nibabel.load(shared / EXAMPLE).slicer[40:60, 30:48, 2:24]
    (tmp_path / "images").mkdir()
    for name, orientation in (("as_is", "RAS"), ("flipped", "LPS"), ("permuted", "SLA")):
        turned = piece.as_reoriented(
            ornt_transform(io_orientation(piece.affine), axcodes2ornt(orientation))
        )
        nibabel.save(turned, tmp_path / "images" / f"{name}_0000.nii.gz")
    images, predictions = tmp_path / "images", tmp_path / "predicted"
    options = ["-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta", "--disable_progress_bar"]
    command = "nnUNetv2_predict_from_modelfolder"
    new_workspace("orientation").run(
        command, "-m", tmp_path / "model", "-f", 0, "-i", images, "-o", predictions, *options
    )
    reference = nibabel.load(tmp_path / "predicted" / "as_is.nii.gz")
    assert len(np.unique(reference.dataobj)) > 2
    for name in ("as_is", "flipped", "permuted"):
        image = nibabel.load(tmp_path / "images" / f"{name}_0000.nii.gz")
        predicted = nibabel.load(tmp_path / "predicted" / f"{name}.nii.gz")
        assert predicted.shape == image.shape
        assert np.allclose(predicted.affine, image.affine)
        upright = nibabel.as_closest_canonical(predicted)
        assert np.array_equal(np.asarray(upright.dataobj), np.asarray(reference.dataobj))


# --- inspect


def inspect(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, str]:
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    lines = (line.partition(":") for line in capsys.readouterr().out.splitlines())
    return {name: text.strip() for name, _, text in lines}


def test_inspect_says_what_is_known_and_reads_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = published_weights(make_network())
    # Weights that an import would refuse show that nothing looks at them.
    weights["seg_outputs.0.bias"].fill_(float("nan"))
    found = inspect(capsys, write_v1(tmp_path / "x.model", weights))
    assert "torch file (zip format)" in found["size"]
    assert found["format"] == "nnU-Net v1 checkpoint of the published STU-Net"
    assert found["network"].startswith("STU-Net tiny (widths [4, 8, 16, 32, 64, 64]")
    assert "1 input channel(s), 5 outputs" in found["network"]
    assert found["plan"].startswith("spacing 1.5 x 1.5 x 1.5 mm, patch 32 x 32 x 64")
    assert found["labels"].startswith("5: background, class_1")
    assert found["epochs"] == "4000"
    assert inspect(capsys, tmp_path / "x.model.pkl")["format"] == "plans of nnU-Net v1"
    found = inspect(capsys, write_v1(tmp_path / "y.model", weights, plans={}))
    assert found["plan"].startswith("unknown")


def test_inspect_shows_the_provenance_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_v1(tmp_path / "x.model")
    assert (
        stunet_import(
            source, "--out", tmp_path / "model", "--labels", "background", "a", "b", "c", "d"
        )
        == 0
    )
    found = inspect(capsys, tmp_path / "model")
    assert found == inspect(capsys, tmp_path / "model" / "fold_0")
    assert found["labels"].startswith("5: background, a, b, c, d")
    assert f"from {source} by stunet-plugin" in found["imported"]
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is no model folder" in capsys.readouterr().err


# --- plan-like


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset as nnU-Net leaves it after planning, and a model imported from a v1 checkpoint."""
    folder = write_planned_dataset(tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    assert stunet_import(write_v1(tmp_path / "x.model"), "--out", tmp_path / "model") == 0
    return folder


def plan_like(tmp_path: Path, *arguments: str) -> int:
    return main(["plan-like", str(tmp_path / "model"), "-d", "7", *arguments])


def test_plan_takes_the_images_from_the_model_and_the_rest_from_the_dataset(
    planned: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in planned.iterdir()}
    assert plan_like(tmp_path) == 0
    plans = json.loads((planned / "STUNetPlans_like_tiny.json").read_text())
    model = json.loads((tmp_path / "model" / "plans.json").read_text())
    configuration, pretrained = (
        content["configurations"]["3d_fullres"] for content in (plans, model)
    )
    for key in (
        "spacing",
        "patch_size",
        "batch_size",
        "normalization_schemes",
        "use_mask_for_norm",
        "architecture",
        "resampling_fn_data_kwargs",
    ):
        assert configuration[key] == pretrained[key]
    assert (plans["transpose_forward"], plans["image_reader_writer"]) == (
        [0, 1, 2],
        "NibabelIOWithReorient",
    )
    assert (plans["dataset_name"], plans["plans_name"]) == (
        "Dataset007_Other",
        "STUNetPlans_like_tiny",
    )
    assert configuration["data_identifier"] == "STUNetPlans_like_tiny_3d_fullres"
    assert configuration["batch_dice"] is True, "of the dataset"
    assert plans["foreground_intensity_properties_per_channel"] == {
        "0": {"mean": 10.0, "std": 2.0}
    }, "of the dataset"
    # The dataset's plan moves axis 2 to the front, the model's leaves the axes as they are.
    assert (
        plans["original_median_spacing_after_transp"],
        plans["original_median_shape_after_transp"],
    ) == ([1.0, 0.5, 3.0], [200, 300, 40])
    assert configuration["median_image_size_in_voxels"] == pytest.approx(
        [200 / 1.5, 300 * 0.5 / 1.5, 40 * 3 / 1.5]
    )
    assert {path: path.read_bytes() for path in before} == before


def test_plan_is_never_overwritten_without_force(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_like(tmp_path, "--name", "mine") == 0
    assert plan_like(tmp_path, "--name", "mine") == 2
    assert "Nothing was changed" in capsys.readouterr().err
    (planned / "mine_3d_fullres").mkdir()
    assert plan_like(tmp_path, "--name", "mine", "--force") == 0
    assert "preprocess again" in capsys.readouterr().out
    for name, message in (
        ("nnUNetPlans", "would replace a file of nnU-Net"),
        ("a__b", "single '_'"),
        ("dataset", "would replace"),
    ):
        assert plan_like(tmp_path, "--name", name, "--force") == 2
        assert message in capsys.readouterr().err
    other = with_changes(
        v2_plans(), {"configurations/3d_fullres/data_identifier": "theirs_3d_fullres"}
    )
    (planned / "otherPlans.json").write_text(json.dumps(other))
    assert plan_like(tmp_path, "--name", "theirs") == 2
    assert "would be overwritten" in capsys.readouterr().err


def test_ct_constants_belong_to_the_normalisation(planned: Path, tmp_path: Path) -> None:
    plans = v1_plans()
    constants = {
        "mean": 100.0,
        "sd": 50.0,
        "percentile_00_5": -900.0,
        "percentile_99_5": 800.0,
        "mn": -1000.0,
        "mx": 3000.0,
        "median": 90.0,
    }
    plans["plans"].update(
        normalization_schemes={0: "CT"}, dataset_properties={"intensityproperties": {0: constants}}
    )
    assert (
        stunet_import(
            write_v1(tmp_path / "ct.model", plans=plans), "--out", tmp_path / "model", "--force"
        )
        == 0
    )
    assert plan_like(tmp_path) == 0
    written = json.loads((planned / "STUNetPlans_like_tiny.json").read_text())
    assert written["foreground_intensity_properties_per_channel"]["0"]["std"] == 50.0


def test_reader_of_the_dataset_stays_where_the_models_cannot_read(
    planned: Path, tmp_path: Path
) -> None:
    dataset = json.loads((planned / "dataset.json").read_text())
    (planned / "dataset.json").write_text(json.dumps({**dataset, "file_ending": ".nrrd"}))
    assert plan_like(tmp_path) == 0
    assert (
        json.loads((planned / "STUNetPlans_like_tiny.json").read_text())["image_reader_writer"]
        == "SimpleITKIO"
    )


def test_other_channel_counts_ask_for_another_stem(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = json.loads((planned / "dataset.json").read_text())
    (planned / "dataset.json").write_text(
        json.dumps({**dataset, "channel_names": {"0": "T1", "1": "T2"}})
    )
    assert plan_like(tmp_path) == 0
    assert "--in-channels 2" in capsys.readouterr().out
    written: dict[str, Any] = json.loads((planned / "STUNetPlans_like_tiny.json").read_text())
    assert (
        written["configurations"]["3d_fullres"]["normalization_schemes"]
        == ["ZScoreNormalization"] * 2
    )


def test_plan_like_names_what_is_missing(
    planned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_v1(tmp_path / "bare.model", plans={})
    for arguments, message in (
        ([str(tmp_path / "model"), "-d", "8"], "Expected one Dataset008_*"),
        ([str(tmp_path / "bare.model"), "-d", "7"], "has no plan"),
        ([str(tmp_path), "-d", "7"], "is no model folder"),
    ):
        assert main(["plan-like", *arguments]) == 2
        assert message in capsys.readouterr().err
    (planned / "nnUNetPlans.json").unlink()
    assert plan_like(tmp_path) == 2
    assert "nnUNetv2_plan_experiment -d 7" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_preprocessed")
    assert plan_like(tmp_path) == 2
    assert "nnUNet_preprocessed is not set" in capsys.readouterr().err


def test_nnunet_takes_the_plan_and_the_weights(
    nnunet_environment: Workspace, tmp_path: Path
) -> None:
    """What nnUNetv2_preprocess and nnUNetv2_train -pretrained_weights call, on a dataset with other
    classes."""
    network = published_weights(make_network())
    source = write_v1(tmp_path / "x.model", network, plans={})
    options = [
        "--spacing",
        4,
        4,
        4,
        "--patch-size",
        32,
        32,
        64,
        "--strides",
        *["2,2,2"] * 4,
        "1,1,2",
    ]
    assert stunet_import(source, "--out", tmp_path / "model", *options) == 0
    assert (
        main(["plan-like", str(tmp_path / "model"), "-d", PHANTOM_ID, "--name", "likeImported"])
        == 0
    )
    preprocess_dataset(int(PHANTOM_ID), "likeImported", ("3d_fullres",), (1,))
    preprocessed = nnunet_environment.dataset_folder(nnunet_environment.preprocessed)
    assert any((preprocessed / "likeImported_3d_fullres").iterdir())

    plans, dataset = (
        json.loads((preprocessed / f"{name}.json").read_text())
        for name in ("likeImported", "dataset")
    )
    plans["continue_training"] = False
    trainer = TRAINERS["STUNetTrainer_tiny_ft"](
        plans, "3d_fullres", 0, dataset, torch.device("cpu")
    )
    trainer.initialize()
    load_pretrained_weights(
        trainer.network, str(tmp_path / "model" / "fold_0" / "checkpoint_final.pth")
    )
    loaded = published_weights(trainer.network)
    assert loaded["seg_outputs.4.weight"].shape != network["seg_outputs.4.weight"].shape
    assert all(
        torch.equal(loaded[name], network[name])
        for name in network
        if not name.startswith("seg_outputs")
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, stunet_plugin.cli as cli; cli.build_parser(); print({'torch', 'numpy',"
        " 'nnunetv2'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
