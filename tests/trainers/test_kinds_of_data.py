"""Plan, preprocess, train and predict through the stock commands on every kind of data that nnU-Net
knows.

With ../shared the cases come from real images (Medical Segmentation Decathlon, hippocampus), else
from phantoms.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, gaussian_gradient_magnitude

from stunet_plugin.demo.phantom import write_dataset

from conftest import SHARED, Workspace

pytestmark = pytest.mark.slow

TRAINER = "STUNetTrainer_tiny"
NUM_CASES = 6
Case = tuple[np.ndarray, np.ndarray]


def source_cases(scratch: Path) -> list[Case]:
    """Images and labels 0, 1, 2 with axes (z, y, x), spacing about 1 (phantoms: 5 mm, other labels
    dropped)."""
    folder = SHARED / "data" / "Dataset004_Hippocampus"
    if not folder.is_dir():
        folder = scratch / "Dataset001_Phantoms"
        write_dataset(folder, NUM_CASES, seed=2)
    cases = []
    for label_file in sorted((folder / "labelsTr").glob("*.nii.gz"))[:NUM_CASES]:
        image_file = folder / "imagesTr" / label_file.name.replace(".nii.gz", "_0000.nii.gz")
        image, labels = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (image_file, label_file)
        )
        cases.append((image.astype(np.float32), np.where(labels <= 2, labels, 0).astype(np.uint8)))
    return cases


def write(
    workspace: Workspace,
    name: str,
    cases: list[tuple[list[np.ndarray], np.ndarray]],
    labels: dict[str, int | list[int]],
    spacing: tuple[float, float, float],
    **more: object,
) -> None:
    """Write a raw dataset; spacing is (x, y, z) in mm."""
    folder = workspace.raw / name
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for index, (channels, segmentation) in enumerate(cases):
        files = [
            (channel, f"imagesTr/c{index}_{number:04d}.nii.gz")
            for number, channel in enumerate(channels)
        ]
        for array, file in [*files, (segmentation, f"labelsTr/c{index}.nii.gz")]:
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(spacing)
            sitk.WriteImage(image, str(folder / file))
    description = {
        "channel_names": {str(number): "MRI" for number in range(len(cases[0][0]))},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def train_and_predict(workspace: Workspace, dataset: str, configuration: str) -> list[np.ndarray]:
    """Train two iterations on fold 0, predict all training images, return the segmentations."""
    workspace.run("nnUNetv2_train", dataset, configuration, 0, "-tr", TRAINER, "-device", "cpu")
    images, output = (
        workspace.dataset_folder(workspace.raw, dataset) / "imagesTr",
        workspace.root / f"{dataset}_{configuration}",
    )
    workspace.run(
        "nnUNetv2_predict",
        "-i",
        images,
        "-o",
        output,
        "-d",
        dataset,
        "-c",
        configuration,
        "-f",
        0,
        "-tr",
        TRAINER,
        "-device",
        "cpu",
        "--disable_tta",
        "-npp",
        0,
        "-nps",
        0,
    )
    return [
        sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in sorted(output.glob("*.nii.gz"))
    ]


def test_four_channels_anisotropic_in_2d_and_3d(
    new_workspace: Callable[[str], Workspace], tmp_path: Path
) -> None:
    workspace = new_workspace("anisotropic")
    rng = np.random.default_rng(0)
    cases = []
    for image, labels in source_cases(tmp_path):
        thick, thick_labels = image[::4], labels[::4]
        noisy = thick + rng.normal(0, thick.std(), thick.shape)
        channels = [thick, gaussian_filter(thick, 1), gaussian_gradient_magnitude(thick, 1), noisy]
        cases.append(([channel.astype(np.float32) for channel in channels], thick_labels))
    write(
        workspace,
        "Dataset021_Anisotropic",
        cases,
        {"background": 0, "a": 1, "b": 2},
        (1.0, 1.0, 4.0),
    )
    workspace.run(
        "nnUNetv2_plan_and_preprocess", "-d", "21", "-c", "2d", "3d_fullres", "-npfp", 1, "-np", 1
    )
    strides = workspace.plans(dataset_id="021")["configurations"]["3d_fullres"]["architecture"][
        "arch_kwargs"
    ]["strides"]
    assert [1, 2, 2] in strides
    for configuration in ("2d", "3d_fullres"):
        predictions = train_and_predict(workspace, "021", configuration)
        assert [prediction.shape for prediction in predictions] == [
            labels.shape for _, labels in cases
        ]
        assert all(np.isin(prediction, (0, 1, 2)).all() for prediction in predictions)


def test_regions_and_ignore_label(
    new_workspace: Callable[[str], Workspace], tmp_path: Path
) -> None:
    workspace = new_workspace("regions")
    cases = []
    for image, labels in source_cases(tmp_path):
        partly = labels.copy()
        partly[::3] = 3
        cases.append(([image], partly))
    labels = {"background": 0, "whole": [1, 2], "part": [2], "ignore": 3}
    write(
        workspace, "Dataset022_Regions", cases, labels, (1.0, 1.0, 1.0), regions_class_order=[1, 2]
    )
    workspace.run(
        "nnUNetv2_plan_and_preprocess", "-d", "22", "-c", "3d_fullres", "-npfp", 1, "-np", 1
    )
    predictions = train_and_predict(workspace, "022", "3d_fullres")
    assert len(predictions) == NUM_CASES
    assert all(np.isin(prediction, (0, 1, 2)).all() for prediction in predictions)


def test_cascade(new_workspace: Callable[[str], Workspace], tmp_path: Path) -> None:
    workspace = new_workspace("cascade")
    cases = [([image], labels) for image, labels in source_cases(tmp_path)]
    write(
        workspace, "Dataset023_Cascade", cases, {"background": 0, "a": 1, "b": 2}, (1.0, 1.0, 1.0)
    )
    workspace.run(
        "nnUNetv2_plan_and_preprocess", "-d", "23", "-c", "3d_fullres", "-npfp", 1, "-np", 1
    )
    # These images are too small for nnU-Net to plan a cascade by itself: add one as its
    # documentation says.
    plans = workspace.plans(dataset_id="023")
    full = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_lowres"] = {
        "inherits_from": "3d_fullres",
        "data_identifier": "nnUNetPlans_3d_lowres",
        "spacing": [2 * step for step in full["spacing"]],
        "patch_size": [max(16, size // 16 * 8) for size in full["patch_size"]],
        "next_stage": "3d_cascade_fullres",
    }
    plans["configurations"]["3d_cascade_fullres"] = {
        "inherits_from": "3d_fullres",
        "previous_stage": "3d_lowres",
    }
    (workspace.dataset_folder(workspace.preprocessed, "023") / "nnUNetPlans.json").write_text(
        json.dumps(plans)
    )
    workspace.run("nnUNetv2_preprocess", "-d", "23", "-c", "3d_lowres", "-np", 1)
    # Fold all, so that the second stage finds a prediction of the first for every case.
    workspace.run("nnUNetv2_train", "23", "3d_lowres", "all", "-tr", TRAINER, "-device", "cpu")
    stage_one = (
        workspace.model(TRAINER, "3d_lowres", dataset_id="023")
        / "predicted_next_stage"
        / "3d_cascade_fullres"
    )
    assert len(list(stage_one.iterdir())) >= NUM_CASES
    workspace.run("nnUNetv2_train", "23", "3d_cascade_fullres", 0, "-tr", TRAINER, "-device", "cpu")
    summary = (
        workspace.model(TRAINER, "3d_cascade_fullres", dataset_id="023")
        / "fold_0"
        / "validation"
        / "summary.json"
    )
    assert 0 <= json.loads(summary.read_text())["foreground_mean"]["Dice"] <= 1
