"""Parts of `stunet crosseval`: what is compared, scoring of files, statistics."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import stats

from stunet_plugin.crosseval.comparison import Pair, ScoredClass, describe, dropped, pair_up
from stunet_plugin.crosseval.inputs import PAIR, Case, Dataset, Model, Setup, read_dataset
from stunet_plugin.crosseval.measures import ASSD, DSC, MEASURES, NSD
from stunet_plugin.crosseval.results import Results, estimate, holm, wilcoxon
from stunet_plugin.crosseval.scoring import CaseScores, CaseTask, score_case
from stunet_plugin.datasets.label_systems import LabelSystem, load_label_system
from stunet_plugin.errors import PluginError

# --- which classes


def model(name: str, labels: str | LabelSystem) -> Model:
    system = load_label_system(labels) if isinstance(labels, str) else labels
    return Model(name, Path(name), ("0",), "checkpoint_final.pth", True, 0.5, system, ("CT",))


def dataset(name: str, labels: str | LabelSystem, cases: int = 1) -> Dataset:
    files = tuple(Case(f"case{number}", (Path("i"),), Path("r")) for number in range(cases))
    system = load_label_system(labels) if isinstance(labels, str) else labels
    return Dataset(name, system, ".nii.gz", files)


def paired(models: list[Model], datasets: list[Dataset], **rules: Any) -> list[Pair]:
    return pair_up(Setup(tuple(models), tuple(datasets), Path("out"), **rules))


def test_shared_classes_and_those_of_each_pair() -> None:
    models = [model("T", "TotalSegmentator-v2")]
    datasets = [dataset("F", "FLARE22"), dataset("A", "AbdomenCT-1K")]
    shared = paired(models, datasets)
    assert [{scored.name for scored in pair.classes} for pair in shared] == [
        {"liver", "kidney", "spleen", "pancreas"}
    ] * 2
    kidney = next(scored for scored in shared[0].classes if scored.name == "kidney")
    assert (kidney.in_reference, kidney.in_prediction, kidney.tolerance) == ((2, 13), (2, 3), 3)
    assert "aorta" in shared[0].only_in_dataset
    assert shared[1].only_in_dataset == ()
    by_pair = paired(models, datasets, classes=PAIR)
    assert [len(pair.classes) for pair in by_pair] == [13, 4]
    assert any(
        line.startswith("Not scored, as it has no counterpart: model T: ")
        for line in describe(by_pair)
    )


def test_misspelt_classes_are_told_from_classes_of_their_own() -> None:
    """Near a class of another subject: a slip. A side or a number that differs, or a name that is
    published: none."""
    own = LabelSystem.numbered(
        "own", ["livr", "kidney_left", "lesion 2", "Spleen", "hepatic veins"]
    )
    other = LabelSystem.numbered(
        "other", ["liver", "kidney_right", "lesion 1", "spleen", "pancreas"]
    )
    pairs = paired([model("M", other)], [dataset("D", own)])
    left = "livr (did you mean liver?), kidney_left, lesion_2, hepatic_veins"
    assert describe(pairs)[1] == f"Not scored, as it has no counterpart: dataset D: {left}."
    assert dropped(pairs) == f"Dropped, without a counterpart: D: {left}."
    # The same slip in the labels of two datasets, which a model does not share.
    both = [dataset(name, LabelSystem.numbered(name, ["livr", "spleen"])) for name in "DE"]
    assert "D: livr (did you mean liver?); E: livr (did you mean" in dropped(
        paired([model("M", other)], both)
    )
    alone = [LabelSystem.numbered(name, [name]) for name in ("pancraes", "pancreas")]
    with pytest.raises(
        PluginError,
        match=r"share no class. D has: pancraes \(did you mean pancreas\?\). M has: pancreas",
    ):
        paired([model("M", alone[1])], [dataset("D", alone[0])])
    assert dropped(paired([model("M", other)], [dataset("D", other)])) == ""


def test_classes_that_are_named() -> None:
    rules: dict[str, Any] = {
        "classes": ("kidney_left", "inferior_vena_cava"),
        "sliced": True,
        "tolerances": {"kidney": 1},
    }
    pair = paired([model("T", "TotalSegmentator-v1")], [dataset("A", "AMOS")], **rules)[0]
    kidney, cava = (
        ScoredClass("kidney_left", (3,), (3,), 1.0, False),
        ScoredClass("inferior_vena_cava", (9,), (8,), 2.0, True),
    )
    assert pair.classes == (kidney, cava)
    with pytest.raises(
        PluginError, match=r"The dataset W has no class inferior_vena_cava; it has liver"
    ):
        paired([model("T", "TotalSegmentator-v1")], [dataset("W", "WORD")], **rules)


def test_datasets_by_name_and_with_files_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / "Dataset007_Listed"
    folder.mkdir()
    for name in ("image.nii.gz", "label.nii.gz"):
        (folder / name).touch()
    files = {"one": {"images": ["image.nii.gz"], "label": "label.nii.gz"}}
    description: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        "labels": {"liver": 1},
        "dataset": files,
    }
    description["file_ending"] = ".nii.gz"
    (folder / "dataset.json").write_text(json.dumps(description))
    for given in (7, folder.name, str(folder)):
        found = read_dataset({"name": "D", "folder": given})
        assert found.cases == (Case("one", (folder / "image.nii.gz",), folder / "label.nii.gz"),)
    with pytest.raises(PluginError, match=r"Expected one Dataset008_\* in nnUNet_raw"):
        read_dataset({"name": "D", "folder": 8})


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


def image(values: np.ndarray) -> Any:
    found = sitk.GetImageFromArray(values)
    found.SetSpacing((1.0, 1.5, 2.0))
    found.SetOrigin((3.0, -4.0, 5.0))
    return found


def scored(
    folder: Path,
    reference: Any,
    prediction: Any,
    classes: tuple[ScoredClass, ...] = BOTH,
    resample: bool = False,
) -> CaseScores:
    paths = folder / "reference.nii.gz", folder / "prediction.nii.gz"
    for path, one in zip(paths, (reference, prediction), strict=True):
        sitk.WriteImage(one, str(path))
    # As it is sent to a worker process.
    task = pickle.loads(
        pickle.dumps(CaseTask(("m", "d", "c"), *paths, classes, SYSTEM, SYSTEM, resample))
    )
    return score_case(task)


def test_storage_order_does_not_matter(tmp_path: Path) -> None:
    """A prediction in RAS against a reference in LPS: the same voxels, so the same numbers, and no
    resampling."""
    reference, prediction = image(labels()), image(labels(seed=1))
    straight = scored(tmp_path, reference, prediction)
    assert 0.5 < straight.values["liver"][DSC] < 1
    for orientation in ("RAS", "PIR"):
        turned = scored(tmp_path, reference, sitk.DICOMOrient(prediction, orientation))
        assert turned == straight
    back = scored(tmp_path, sitk.DICOMOrient(reference, "RAS"), prediction)
    for name in straight.values:
        assert [back.values[name][measure] for measure in MEASURES] == pytest.approx(
            list(straight.values[name].values())
        )


def test_other_voxels_are_refused_or_resampled(tmp_path: Path) -> None:
    reference = image(labels())
    how = (sitk.Transform(), sitk.sitkNearestNeighbor)
    place = ((3.5, -4, 5), (2, 1.5, 2), np.eye(3).ravel())
    coarse = sitk.Resample(reference, (5, 8, 6), *how, *place)
    found = scored(tmp_path, reference, coarse)
    assert not found.values
    assert (
        "do not have the same voxels: reference 10 x 8 x 6 voxels, spacing (1, 1.5, 2)"
        in found.problem
    )
    found = scored(tmp_path, reference, coarse, resample=True)
    assert found.values["liver"][DSC] > 0.6
    assert found.warnings[0].startswith(
        "The prediction was resampled to the reference's grid: reference 10 x 8 x 6"
    )
    shifted = image(labels())
    shifted.SetOrigin((3.2, -4.0, 5.0))
    assert "do not have the same voxels" in scored(tmp_path, reference, shifted).problem


def test_ignored_voxels_and_unknown_labels(tmp_path: Path) -> None:
    reference, prediction = labels(), labels(seed=1)
    reference[(labels() == 1) ^ (prediction == 1)] = 3
    found = scored(tmp_path, image(reference), image(prediction))
    assert found.values["liver"][DSC] == 1
    prediction[0, 0, 0] = 9
    problem = scored(tmp_path, image(reference), image(prediction)).problem
    assert "prediction.nii.gz: undeclared label values (9 (1 voxels))" in problem
    (tmp_path / "prediction.nii.gz").write_bytes(b"nothing")
    paths = (tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz")
    task = CaseTask(("m", "d", "c"), *paths, BOTH, SYSTEM, SYSTEM, False)
    assert "not gzip" in score_case(task).problem


def test_tubular_organs_between_the_ends_of_the_reference(tmp_path: Path) -> None:
    reference, prediction = np.zeros((8, 6, 6), np.uint8), np.zeros((8, 6, 6), np.uint8)
    reference[2:5, 2:4, 2:4] = prediction[0:8, 2:4, 2:4] = 2
    whole, sliced = (ScoredClass("aorta", (2,), (2,), 0.5, sliced) for sliced in (False, True))
    assert scored(tmp_path, image(reference), image(prediction), (whole,)).values["aorta"][
        DSC
    ] == pytest.approx(2 * 3 / 11)
    for orientation in ("LPS", "SRP"):
        turned = sitk.DICOMOrient(image(reference), orientation)
        values = scored(tmp_path, turned, image(prediction), (sliced,)).values["aorta"]
        assert (values[DSC], values[NSD], values[ASSD]) == (1, 1, 0)


@pytest.mark.shared
def test_totalsegmentator_labels_of_a_ct_as_the_ten_organs_of_a_eval(
    shared: Path, tmp_path: Path
) -> None:
    """Left and right stay apart whatever the storage order; labels of one system against the same
    ones in another."""
    file = shared / "data" / "examples" / "example_seg.nii.gz"
    totalsegmentator, organs = load_label_system("TotalSegmentator-v2"), load_label_system("AEval")
    source = sitk.ReadImage(str(file))
    values = sitk.GetArrayFromImage(source).astype(np.int32)
    mapped = np.zeros_like(values)
    for name, (value,) in organs.classes.items():
        mapped[totalsegmentator.mask(values, name)] = value
    present = [name for name in organs.classes if (mapped == organs.classes[name][0]).any()]
    assert len(present) >= 3
    for name in organs.classes:
        assert np.array_equal(
            mapped == organs.classes[name][0], values == totalsegmentator.classes[name][0]
        )
    prediction = sitk.GetImageFromArray(mapped)
    prediction.CopyInformation(source)
    path = tmp_path / "lps.nii.gz"
    sitk.WriteImage(sitk.DICOMOrient(prediction, "LPS"), str(path))
    assert (
        sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(source.GetDirection())
        != "LPS"
    )
    classes = tuple(
        ScoredClass(name, totalsegmentator.classes[name], organs.classes[name], 3.0, False)
        for name in present
    )
    found = score_case(
        CaseTask(("m", "d", "c"), file, path, classes, totalsegmentator, organs, False)
    )
    assert not found.problem
    assert {found.values[name][DSC] for name in present} == {1.0}


# --- statistics


def test_holms_method_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    corrected = holm([0.02, math.nan, 0.03])
    assert corrected[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(corrected[1])


def test_paired_tests() -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(0.8, 0.05, 20)
    better = one + rng.normal(0.03, 0.01, 20)
    assert wilcoxon(one - better) == stats.wilcoxon(one - better).pvalue < 0.001
    assert wilcoxon(one - one) == 1
    assert math.isnan(wilcoxon(one[:5] - better[:5]))


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


def filled(pairs: Sequence[Pair], value: Callable[[str, int, str], float]) -> Results:
    """Results in which every measure of a model, case and class has this value."""
    results = Results(pairs)
    for pair in pairs:
        for number, case in enumerate(pair.dataset.cases):
            values = {
                one.name: dict.fromkeys(MEASURES, value(pair.model.name, number, one.name))
                for one in pair.classes
            }
            results.add((pair.model.name, pair.dataset.name, case.name), values)
    return results


def test_each_model_has_its_share_of_the_worst_cases() -> None:
    """A model that fails everywhere takes its share, and what the others have no cases for."""
    models = [model("bad", "FLARE22"), model("good", "FLARE22")]
    pairs = paired(models, [dataset("F", "FLARE22", cases=8)])

    def value(name: str, case: int, _: str) -> float:
        if name == "good" and case > 4:
            return math.nan
        return (0.1 if name == "bad" else 0.8) + 0.01 * case

    results = filled(pairs, value)
    worst = results.worst(4)
    assert list(zip(worst["model"], worst["case"], strict=True)) == [
        ("bad", "case0"),
        ("bad", "case1"),
        ("good", "case0"),
        ("good", "case1"),
    ]
    assert list(results.worst(12)["model"]) == ["bad"] * 7 + ["good"] * 5
    assert list(filled(pairs[:1], value).worst(3)["case"]) == ["case0", "case1", "case2"]
    assert results.undefined(DSC).loc["good", "F"] == 3 * len(pairs[0].classes)


def test_models_are_tested_on_the_classes_that_both_have() -> None:
    models = [model("T", "TotalSegmentator-v2"), model("C", "CT-ORG")]
    pairs = paired(models, [dataset("F", "FLARE22", cases=8)], classes=PAIR)
    rng = np.random.default_rng(3)
    results = filled(pairs, lambda *_: rng.random())
    # The first was scored on both kidneys apart, the second on both together.
    assert {one.name for one in pairs[0].classes} & {one.name for one in pairs[1].classes} == {
        "liver"
    }
    tests = results.tests
    assert [test.measure for test in tests] == [DSC, NSD]
    liver = results.table[results.table["class"] == "liver"]
    wide = liver.pivot(index="case", columns="model", values=DSC)
    difference = (wide["T"] - wide["C"]).to_numpy()
    assert tests[0].p == stats.wilcoxon(difference).pvalue
    assert tests[0].difference == pytest.approx(difference.mean())
    assert results.worst(1)[DSC].iloc[0] == results.by_case()[DSC].min()


def test_a_model_is_better_only_where_a_test_says_so() -> None:
    models = [model("one", "FLARE22"), model("two", "FLARE22")]
    pairs = paired(models, [dataset("F", "FLARE22", cases=9)])
    better = filled(pairs, lambda name, case, _: 0.5 + 0.02 * case + 0.1 * (name == "two"))
    assert [test.better for test in better.tests] == ["two", "two"]
    alike = filled(pairs, lambda name, case, _: 0.5 + 0.01 * (-1) ** case * (name == "two"))
    assert [test.better for test in alike.tests] == [None, None]


def test_one_case_in_two_formats_is_not_two_channels(tmp_path: Path) -> None:
    for folder in ("images", "references"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.nii.gz").touch()
    (tmp_path / "images" / "a.nii").touch()
    folders = {name: str(tmp_path / name) for name in ("images", "references")}
    with pytest.raises(PluginError, match="the same case twice"):
        read_dataset({"name": "D", "labels": "FLARE22", **folders})
