"""Parts of `stunet crosseval`: what is compared, scoring of files, statistics."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from scipy import stats

from stunet_plugin.crosseval.comparison import Comparison, ScoredClass
from stunet_plugin.crosseval.entries import PAIR
from stunet_plugin.crosseval.inputs import Setup
from stunet_plugin.crosseval.models import Model
from stunet_plugin.crosseval.references import Dataset, read_dataset
from stunet_plugin.crosseval.scoring import CaseScores, CaseTask, score_case
from stunet_plugin.crosseval.statistics import Results, estimate
from stunet_plugin.datasets.raw_dataset import Case
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.label_systems import LabelSystem, load_label_system
from stunet_plugin.utils.measures import ASSD, DSC, MEASURES, NSD, TOLERANCES
from stunet_plugin.utils.paired_tests import holm, wilcoxon

Labels = str | Sequence[str]
"""A published system, or classes of one's own."""


def compared(
    models: dict[str, Labels], datasets: dict[str, Labels], cases: int = 1, **rules: Any
) -> Comparison:
    def system(name: str, labels: Labels) -> LabelSystem:
        own = not isinstance(labels, str)
        return LabelSystem.numbered(name, labels) if own else load_label_system(str(labels))

    files = tuple(Case(f"case{number}", (Path("i"),), Path("r")) for number in range(cases))
    how = (("0",), "checkpoint_final.pth", True, 0.5)
    both = (
        tuple(Model(x, Path(x), *how, system(x, y), ("CT",)) for x, y in models.items()),
        tuple(Dataset(x, system(x, y), ".nii.gz", files) for x, y in datasets.items()),
    )
    return Comparison(Setup(*both, Path("out"), **rules))


# --- which classes


def test_shared_classes_and_those_of_each_pair() -> None:
    both = {"T": "TotalSegmentator-v2"}, {"F": "FLARE22", "A": "AbdomenCT-1K"}
    shared = compared(*both)
    assert set(shared.classes) == {"liver", "kidney", "spleen", "pancreas"}
    first, second = shared.pairs
    assert [x.name for x in first.classes] == [x.name for x in second.classes]
    kidney = next(scored for scored in first.classes if scored.name == "kidney")
    assert (kidney.in_reference, kidney.in_prediction, kidney.tolerance) == ((2, 13), (2, 3), 3)
    assert "aorta" in first.only_in_dataset
    assert second.only_in_dataset == ()
    by_pair = compared(*both, classes=PAIR)
    assert [len(pair.classes) for pair in by_pair.pairs] == [13, 4]
    assert by_pair.describe()[1].startswith("Not scored, as it has no counterpart: model T: ")


def test_misspelt_classes_are_told_from_classes_of_their_own() -> None:
    """Near a class of another system: a slip. A side or a number that differs, or a name that is
    published: none."""
    other = ["liver", "kidney_right", "lesion 1", "spleen", "pancreas"]
    own = ["livr", "kidney_left", "lesion 2", "Spleen", "hepatic veins"]
    found = compared({"M": other}, {"D": own})
    left = "livr (did you mean liver?), kidney_left, lesion_2, hepatic_veins"
    assert found.describe()[1] == f"Not scored, as it has no counterpart: dataset D: {left}."
    assert found.dropped() == f"Dropped, without a counterpart: D: {left}."
    message = r"no class with the models. D has: pancraes \(did you mean pancreas\?\). M has: pa"
    with pytest.raises(PluginError, match=message):
        compared({"M": ["pancreas"]}, {"D": ["pancraes"]})
    assert compared({"M": other}, {"D": other}).dropped() == ""


def test_classes_that_are_named() -> None:
    rules: dict[str, Any] = {
        "classes": ("kidney_left", "inferior_vena_cava"),
        "sliced": True,
        "tolerances": {**TOLERANCES, "kidney": 1},
    }
    found = compared({"T": "TotalSegmentator-v1"}, {"A": "AMOS"}, **rules)
    cava = ScoredClass("inferior_vena_cava", (9,), (8,), 2.0, True)
    assert found.pairs[0].classes == (ScoredClass("kidney_left", (3,), (3,), 1.0, False), cava)
    with pytest.raises(PluginError, match="dataset W has no class inferior_vena_cava; it has liv"):
        compared({"T": "TotalSegmentator-v1"}, {"W": "WORD"}, **rules)


def test_one_case_in_two_formats_is_not_two_channels(tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("images", "references")}
    for file in ("images/a.nii.gz", "images/a.nii", "references/a.nii.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(PluginError, match="the same case twice"):
        read_dataset({"name": "D", "labels": "FLARE22", **folders})


# --- scoring files

SYSTEM = LabelSystem.numbered("test", ["liver", "aorta"], ignore=True)
BOTH = (ScoredClass("liver", (1,), (1,), 2.0, False), ScoredClass("aorta", (2,), (2,), 2.0, False))


def labels(seed: int = 0) -> np.ndarray:
    """Axes (z, y, x)."""
    values = np.zeros((6, 8, 10), np.uint8)
    values[1:5, 2:6, 2:5] = 1
    values[2:5, 3:6, 6:9] = 2
    values[tuple(np.random.default_rng(seed).integers(1, 5, (3, 6)))] = 1
    return values


def image(values: np.ndarray, origin: float = 3.0) -> Any:
    found = sitk.GetImageFromArray(values)
    found.SetSpacing((1.0, 1.5, 2.0))
    found.SetOrigin((origin, -4.0, 5.0))
    return found


Score = Callable[..., CaseScores]


@pytest.fixture
def scored(tmp_path: Path) -> Score:
    def score(
        reference: Any, prediction: Any, *classes: ScoredClass, resample: bool = False
    ) -> CaseScores:
        paths = tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz"
        sitk.WriteImage(reference, str(paths[0]))
        if isinstance(prediction, bytes):
            paths[1].write_bytes(prediction)
        else:
            sitk.WriteImage(prediction, str(paths[1]))
        names = ("m", "d", "c")
        task = CaseTask(names, *paths, classes or BOTH, SYSTEM, SYSTEM, resample)
        return score_case(pickle.loads(pickle.dumps(task)))  # as it comes to a worker process

    return score


def test_storage_order_does_not_matter(scored: Score) -> None:
    """A prediction in RAS against a reference in LPS: the same voxels, so the same numbers, and no
    resampling."""
    reference, prediction = image(labels()), image(labels(seed=1))
    straight = scored(reference, prediction)
    assert 0.5 < straight.values["liver"][DSC] < 1
    assert scored(reference, sitk.DICOMOrient(prediction, "PIR")) == straight
    back = scored(sitk.DICOMOrient(reference, "RAS"), prediction)
    assert back.values["liver"] == pytest.approx(straight.values["liver"])


def test_other_voxels_are_refused_or_resampled(scored: Score) -> None:
    reference = image(labels())
    how = (sitk.Transform(), sitk.sitkNearestNeighbor)
    place = ((3.5, -4, 5), (2, 1.5, 2), np.eye(3).ravel())
    coarse = sitk.Resample(reference, (5, 8, 6), *how, *place)
    found = scored(reference, coarse)
    assert not found.values
    sizes = "reference 10 x 8 x 6 voxels, spacing (1, 1.5, 2)"
    assert f"do not have the same voxels: {sizes}" in found.problem
    found = scored(reference, coarse, resample=True)
    assert found.values["liver"][DSC] > 0.6
    warning = f"The prediction was resampled to the reference's grid: {sizes}"
    assert found.warnings[0].startswith(warning)
    shifted = scored(reference, image(labels(), origin=3.2))
    assert "do not have the same voxels" in shifted.problem


def test_ignored_voxels_and_unknown_labels(scored: Score) -> None:
    reference, prediction = labels(), labels(seed=1)
    reference[(labels() == 1) ^ (prediction == 1)] = 3
    assert scored(image(reference), image(prediction)).values["liver"][DSC] == 1
    prediction[0, 0, 0] = 9
    problem = scored(image(reference), image(prediction)).problem
    assert "prediction.nii.gz: undeclared label values (9 (1 voxels))" in problem
    assert "not gzip" in scored(image(reference), b"nothing").problem


def test_tubular_organs_between_the_ends_of_the_reference(scored: Score) -> None:
    reference, prediction = np.zeros((8, 6, 6), np.uint8), np.zeros((8, 6, 6), np.uint8)
    reference[2:5, 2:4, 2:4] = prediction[0:8, 2:4, 2:4] = 2
    whole, sliced = (ScoredClass("aorta", (2,), (2,), 0.5, sliced) for sliced in (False, True))
    values = scored(image(reference), image(prediction), whole).values["aorta"]
    assert values[DSC] == pytest.approx(2 * 3 / 11)
    turned = sitk.DICOMOrient(image(reference), "SRP")
    values = scored(turned, image(prediction), sliced).values["aorta"]
    assert (values[DSC], values[NSD], values[ASSD]) == (1, 1, 0)


# --- statistics


def test_paired_tests_and_holms_method() -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(0.8, 0.05, 20)
    better = one + rng.normal(0.03, 0.01, 20)
    assert wilcoxon(one - better) == stats.wilcoxon(one - better).pvalue < 0.001
    assert wilcoxon(one - one) == 1
    assert math.isnan(wilcoxon(one[:5] - better[:5]))
    corrected = holm(pd.Series([0.01, math.nan, 0.04, 0.03])).tolist()
    assert corrected == pytest.approx([0.03, math.nan, 0.06, 0.06], nan_ok=True)
    assert holm(pd.Series([0.5, 0.9])).tolist() == [1, 1]


def test_estimates_are_means_of_class_means_with_their_uncertainty() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal((0.9, 0.5), 0.1, (40, 2))
    values[0, 1] = np.nan
    found = estimate(values)
    assert found.mean == pytest.approx((values[:, 0].mean() + values[1:, 1].mean()) / 2)
    # The interval of a mean: about two standard errors to each side.
    error = math.sqrt(sum(np.nanvar(values[:, column]) / 40 for column in range(2))) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert estimate(values) == found
    assert math.isnan(estimate(np.full((3, 2), np.nan)).mean)


def filled(comparison: Comparison, value: Callable[[str, int], float]) -> Results:
    """Results in which every measure of a model and case has this value."""
    records = {}
    for pair in comparison.pairs:
        for number, case in enumerate(pair.dataset.cases):
            measures = {
                x.name: dict.fromkeys(MEASURES, value(pair.model.name, number))
                for x in pair.classes
            }
            records[(*pair.names, case.name)] = {"values": measures, "warnings": []}
    return Results(comparison, records)


def test_each_model_has_its_share_of_the_worst_cases() -> None:
    comparison = compared({"bad": "FLARE22", "good": "FLARE22"}, {"F": "FLARE22"}, cases=8)
    results = filled(comparison, lambda name, case: 0.8 * (name == "good") + 0.01 * case)
    worst = results.worst(4)
    worst_cases = ["badcase0", "badcase1", "goodcase0", "goodcase1"]
    assert (worst["model"] + worst["case"]).tolist() == worst_cases


def test_models_are_tested_on_the_classes_that_both_have() -> None:
    models = {"T": "TotalSegmentator-v2", "C": "CT-ORG"}
    comparison = compared(models, {"F": "FLARE22"}, cases=8, classes=PAIR)
    rng = np.random.default_rng(3)
    results = filled(comparison, lambda *_: rng.random())
    # The first was scored on both kidneys apart, the second on both together.
    first, second = ({x.name for x in pair.classes} for pair in comparison.pairs)
    assert first & second == {"liver"}
    assert results.tests["measure"].tolist() == [DSC, NSD]
    liver = results.table[results.table["class"] == "liver"]
    wide = liver.pivot(index="case", columns="model", values=DSC)
    difference = (wide["T"] - wide["C"]).to_numpy()
    assert results.tests["p"][0] == stats.wilcoxon(difference).pvalue
    assert results.tests["difference"][0] == pytest.approx(difference.mean())


def test_a_model_is_better_only_where_a_test_says_so() -> None:
    values = {
        "two": lambda name, case: 0.5 + 0.02 * case + 0.1 * (name == "two"),
        "": lambda name, case: 0.5 + 0.01 * (-1) ** case * (name == "two"),
    }
    for cases in (9, 5):
        comparison = compared({"one": "FLARE22", "two": "FLARE22"}, {"F": "FLARE22"}, cases=cases)
        for better, value in values.items():
            results = filled(comparison, value)
            wanted = better if cases == 9 else ""  # too few cases for a test
            assert results.tests["better"].tolist() == [wanted, wanted]
            assert results.best(DSC, "F") == (wanted or None)
