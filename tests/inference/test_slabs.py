"""Prediction slab by slab: the labels and the confidence of nnU-Net's own predictor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape as convert,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from stunet_plugin.cli import main
from stunet_plugin.inference.predictor import Model
from stunet_plugin.inference.slabs import NotFiniteError, SlabPredictor

from dataset_helpers import change_json
from import_helpers import make_network, published_weights, read, v1_plans, write_v1

SPACING = 1.5
Change = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with random weights, patch 32 x 32 x 64."""
    monkeypatch.setenv("STUNET_CPU", "torch")
    return model_folder(tmp_path / "model", 5)


def model_folder(folder: Path, outputs: int) -> Path:
    torch.manual_seed(0)
    weights = published_weights(make_network(outputs=outputs))
    source = write_v1(folder.with_suffix(".model"), weights, v1_plans())
    names = ["background", *(f"c{number}" for number in range(1, outputs))]
    assert main(["import", str(source), "--out", str(folder), "--labels", *names]) == 0
    return folder


def configuration(folder: Path, **changes: Any) -> None:
    configurations = read(folder)["configurations"]
    configurations["3d_fullres"].update(changes)
    change_json(folder / "plans.json", configurations=configurations)


def thick_target(folder: Path) -> None:
    configuration(folder, spacing=[6, 1.2, 1.2])


def other_axes(folder: Path) -> None:
    change_json(folder / "plans.json", transpose_forward=[1, 0, 2], transpose_backward=[1, 0, 2])


def regions(folder: Path) -> None:
    labels = {"background": 0, "all": [1, 2, 3], "core": [2, 3], "c": 3, "d": [1, 3], "e": [1, 2]}
    change_json(folder / "dataset.json", labels=labels, regions_class_order=[1, 2, 3, 4, 5])


def torch_resampling(folder: Path) -> None:
    for kind in ("data", "seg", "probabilities"):
        how = {"is_seg": kind == "seg", "force_separate_z": False}
        name = f"resampling_fn_{kind}"
        configuration(folder, **{name: "resample_torch_fornnunet", f"{name}_kwargs": how})


def cubic(folder: Path) -> None:
    how = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration(folder, resampling_fn_probabilities_kwargs=how)


def many_outputs(folder: Path) -> None:
    """More than twice as many as channels before them, which are summed up instead."""
    shutil.rmtree(folder)
    model_folder(folder, 24)


@pytest.mark.parametrize(
    ("change", "shape", "spacing", "folds", "mirroring"),
    [
        (many_outputs, (60, 50, 40), (1, 1, 1), 1, False),
        (many_outputs, (40, 12, 90), (0.7, 1.4, 1.1), 2, False),
        (None, (60, 50, 40), (1, 1, 1), 1, False),
        (None, (36, 30, 50), (1.3, 1.3, 1.3), 1, True),
        (None, (40, 34, 30), (0.7, 1.4, 1.1), 2, False),
        (None, (10, 12, 90), (1.2, 1.2, 1.2), 1, False),  # along the last axis; padded
        (other_axes, (60, 20, 60), (1, 5, 1.1), 1, False),  # thick slices
        (thick_target, (60, 50, 40), (1, 1, 1), 1, False),
        (regions, (60, 50, 40), (1.3, 1.3, 1.3), 1, False),
        (torch_resampling, (60, 50, 40), (1.3, 1.3, 1.3), 1, False),
        (cubic, (40, 34, 30), (1.3, 1.3, 1.3), 1, False),
    ],
)
def test_labels_are_those_of_nnunet(
    folder: Path,
    change: Change | None,
    shape: tuple[int, ...],
    spacing: Sequence[float],
    folds: int,
    mirroring: bool,
) -> None:
    if change:
        change(folder)
    ours = Model(folder, mirroring=mirroring).predictor
    generator = torch.Generator().manual_seed(1)
    ours.list_of_parameters = [
        {k: v + 0.002 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
        for weights in ours.list_of_parameters * folds
    ]
    stock = nnUNetPredictor(0.5, True, mirroring, False, torch.device("cpu"), allow_tqdm=False)
    stock.manual_initialization(
        ours.network, ours.plans_manager, ours.configuration_manager, ours.list_of_parameters,
        ours.dataset_json, ours.trainer_name, ours.allowed_mirroring_axes,
    )  # fmt: skip
    image = gaussian_filter(np.random.default_rng(0).normal(size=shape), 2)[None].astype("float32")
    managers = (ours.plans_manager, ours.configuration_manager)
    preprocessor = managers[1].preprocessor_class(verbose=False)
    image[:, :2] = 0
    data, _, properties = preprocessor.run_case_npy(
        image, None, {"spacing": [SPACING * x for x in spacing]}, *managers, ours.dataset_json
    )
    x = torch.from_numpy(data)
    logits = stock.predict_logits_from_preprocessed_data(x.clone())
    labels, probabilities = convert(logits, *managers, ours.label_manager, properties, True)
    found = ours.segment(x, properties, confidence=True)
    assert found.labels.dtype == labels.dtype
    assert found.labels.shape == shape
    assert len(np.unique(labels)) > 2
    # nnU-Net's sums are rounded to half precision; of several folds in another order.
    exact = folds == 1 and change is not many_outputs
    assert (found.labels != labels).mean() <= (1e-4 if exact else 2e-3)
    sure = probabilities.max(0)
    if ours.label_manager.has_regions:
        sure = np.maximum(probabilities, 1 - probabilities).min(0)
    assert found.confidence is not None
    # Some of nnU-Net's Gaussian weights at the sides of a patch are subnormal in half precision.
    assert (np.abs(found.confidence - sure) > 0.01).mean() <= (0 if exact else 1e-3)
    assert (ours.segment(x, properties).labels == found.labels).all()
    assert found.windows.total > 1 or change is cubic


def test_some_outputs_left_out_windows_and_rubbish(folder: Path) -> None:
    predictor = Model(folder, mirroring=False).predictor
    image = gaussian_filter(np.random.default_rng(0).normal(size=(1, 60, 50, 40)), (0, 2, 2, 2))
    managers = (predictor.plans_manager, predictor.configuration_manager)
    data, _, properties = (
        managers[1]
        .preprocessor_class(verbose=False)
        .run_case_npy(
            image.astype("float32"), None, {"spacing": [2.0] * 3}, *managers, predictor.dataset_json
        )
    )
    x = torch.from_numpy(data)
    everything = predictor.segment(x, properties).labels
    chosen = [value for value in np.unique(everything) if value][:2]
    predictor.outputs = tuple(map(int, chosen))
    some = predictor.segment(x, properties).labels
    assert set(np.unique(some)) == {0, *chosen}
    # Only where windows disagree on what is greatest of the others.
    expected = np.where(np.isin(everything, chosen), everything, 0)
    assert (some != expected).mean() < 0.02
    predictor.outputs = None
    none = predictor.segment(x, properties, leave_out=lambda window: True)
    assert not none.labels.any()
    assert none.windows.left_out == none.windows.total
    half = predictor.segment(x, properties, leave_out=lambda window: window[0].start > 0)
    assert 0 < half.windows.left_out < half.windows.total
    assert np.array_equal(half.labels[:5], everything[:5])
    broken = {k: torch.full_like(v, torch.nan) for k, v in predictor.list_of_parameters[0].items()}
    predictor.list_of_parameters = [broken]
    with pytest.raises(NotFiniteError):
        predictor.segment(x, properties)


class Threshold(nn.Module):
    """Sees a bright voxel and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv3d(1, 2, 1)
        self.last.weight.data = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
        self.last.bias.data = torch.tensor([0.5, -0.5])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


@pytest.mark.parametrize(
    ("bright", "why"),
    [
        ([np.s_[30:50, 70:90, 60:80]], ""),
        ([], "nothing"),
        # The line is too thin for the coarse look.
        ([np.s_[30:50, 70:90, 60:80], np.s_[40, 80, 60:126]], "more"),
    ],
)
def test_cropping_changes_no_label(folder: Path, bright: Any, why: str) -> None:
    predictor = Model(model_folder(folder.with_name("two"), 2), mirroring=False).predictor
    predictor.network = Threshold()
    predictor.list_of_parameters = [predictor.network.state_dict()]
    x = torch.zeros(1, 128, 128, 128)
    for place in bright:
        x[0][place] = 1
    properties = {
        "spacing": [SPACING] * 3,
        "shape_after_cropping_and_before_resampling": (128,) * 3,
        "shape_before_cropping": (128,) * 3,
        "bbox_used_for_cropping": [[0, 128]] * 3,
    }
    whole = predictor.segment(x, properties)
    cropped = predictor.segment(x, properties, crop=True)
    assert np.array_equal(cropped.labels, whole.labels)
    assert whole.labels.any() == bool(bright)
    assert why in cropped.uncropped
    assert bool(cropped.uncropped) == bool(why)
    assert (cropped.windows.total < whole.windows.total / 3) == (not why)


def test_predictor_is_nnunets() -> None:
    assert issubclass(SlabPredictor, nnUNetPredictor)
