"""Label systems: published ones, users' own, what two of them share, and maps between them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stunet_plugin.datasets.label_systems import (
    LabelSystem,
    canonical_name,
    load_label_system,
    map_labels,
    published_systems,
    shared_classes,
)
from stunet_plugin.errors import PluginError

A_EVAL = ("FLARE22", "AMOS", "WORD-17", "TotalSegmentator-v2", "TotalSegmentator-MR", "BTCV")
ORGANS = {
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "liver",
    "stomach",
    "pancreas",
    "adrenal_gland_right",
    "adrenal_gland_left",
    "esophagus",
}


def system(labels: Any, **more: Any) -> LabelSystem:
    return LabelSystem.from_table({"labels": labels, **more}, "test")


@pytest.mark.parametrize("name", published_systems())
def test_published_systems_number_their_labels_without_gaps(name: str) -> None:
    found = load_label_system(name)
    assert found.values == frozenset(range(max(found.values) + 1))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postcava", "inferior_vena_cava"),
        ("IVC", "inferior_vena_cava"),
        ("inferior vena cava", "inferior_vena_cava"),
        ("right adrenal gland", "adrenal_gland_right"),
        ("LAG", "adrenal_gland_left"),
        ("Femur-left", "femur_left"),
        ("left_common_iliac_vein", "iliac_vena_left"),
        ("prostate/uterus", "prostate_uterus"),
        ("left", "left"),
    ],
)
def test_names_of_one_class_are_one_name(given: str, expected: str) -> None:
    assert canonical_name(given) == expected


def test_the_data_sets_of_a_eval_share_its_ten_organs() -> None:
    systems = [load_label_system(name) for name in A_EVAL]
    assert set(shared_classes(systems)) == ORGANS == set(load_label_system("AEval").classes)


@pytest.mark.shared
def test_published_systems_agree_with_the_facts(shared: Path) -> None:
    facts = json.loads((shared / "reference" / "label_systems.json").read_text())
    names = {
        "WORD": "WORD-17",
        "TotalSeg": "TotalSegmentator-v2",
        "TotalSegMR": "TotalSegmentator-MR",
    }
    for name, labels in facts["a_eval"].items():
        ours = load_label_system(names.get(name, name)).classes
        theirs = {canonical_name(label): (value,) for label, value in labels.items() if value}
        # A-Eval has the ribs of TotalSegmentator in an order of its own, and MR names of another
        # release.
        differing = {label for label in theirs if theirs[label] != ours.get(label)}
        assert all(
            label.startswith("rib_") or label == "hepatic_portal_vein" for label in differing
        ), name


@pytest.mark.shared
def test_direct_inference_finds_its_classes_in_totalsegmentator(shared: Path) -> None:
    facts = json.loads((shared / "reference" / "label_systems.json").read_text())[
        "stunet_direct_inference"
    ]
    totalsegmentator = load_label_system("totalsegmentator_v1")
    for name, parts in facts["target_to_totalsegmentator_v1"].items():
        expected = {
            totalsegmentator.values_of(part)[0] for part in parts.removeprefix("agg:").split(",")
        }
        # LV, T10 and the like may mean anything in another data set, so they are no synonyms.
        if not re.fullmatch(r"[LR][VA]|[CTL]\d+", name):
            assert set(totalsegmentator.values_of(name)) == expected, name


@pytest.mark.shared
def test_totalsegmentator_numbers_are_those_of_its_example(shared: Path) -> None:
    labels = json.loads((shared / "data" / "examples" / "example_seg_labels.json").read_text())
    assert (
        LabelSystem.from_table(labels, "example").classes
        == load_label_system("TotalSegmentator-v2").classes
    )


def test_a_larger_class_is_made_up_of_smaller_ones() -> None:
    flare, abdomen, v1 = (
        load_label_system(name) for name in ("FLARE22", "AbdomenCT-1K", "TotalSegmentator-v1")
    )
    assert flare.find("kidneys") == (2, 13)
    assert v1.find("lung") == (13, 14, 15, 16, 17)
    assert abdomen.find("kidney_left") is None
    assert shared_classes([flare, abdomen]) == ["liver", "spleen", "pancreas", "kidney"]
    assert "kidney" not in shared_classes([flare, load_label_system("AMOS")])
    assert flare.without_counterpart(["kidney", "liver"])[:2] == ["spleen", "pancreas"]
    assert not {"kidney_left", "kidney_right"} & set(flare.without_counterpart(["kidney"]))


def test_masks_of_groups() -> None:
    liver = load_label_system("MSD-Liver")
    labels = np.array([0, 1, 2, 1])
    assert liver.mask(labels, "liver").tolist() == [False, True, True, True]
    assert liver.mask(labels, "liver_tumour").tolist() == [False, False, True, False]
    with pytest.raises(
        PluginError,
        match=r"has no class 'spleen'; its classes are: liver_without_tumour, liver_tumour, liver",
    ):
        liver.mask(labels, "spleen")


def test_mapping_between_systems_goes_by_name() -> None:
    source, target = load_label_system("FLARE22"), load_label_system("AEval")
    labels = np.array([[0, 1, 2], [13, 5, 10]])
    assert map_labels(labels, source, target).tolist() == [[0, 5, 2], [3, 0, 10]]
    # What the target lacks can be kept apart from the background.
    assert map_labels(labels, source, target, unmatched=255).tolist() == [[0, 5, 2], [3, 255, 10]]
    kidneys = LabelSystem.numbered("kidneys", ["kidney", "liver"])
    assert map_labels(labels, source, kidneys).tolist() == [[0, 2, 1], [1, 0, 0]]


def test_the_ignore_label_stays_one() -> None:
    source = system({"background": 0, "liver": 1, "ignore": 2})
    target = LabelSystem.numbered("t", ["spleen", "liver"], ignore=True)
    assert map_labels(np.array([0, 1, 2]), source, target).tolist() == [0, 2, 3]
    with pytest.raises(PluginError, match=r"has an ignore label and t has none"):
        map_labels(np.array([2]), source, LabelSystem.numbered("t", ["liver"]))


def test_what_cannot_be_mapped_is_refused() -> None:
    flare = load_label_system("FLARE22")
    with pytest.raises(PluginError, match=r"'kidney' and 'kidney_left' share labels there"):
        map_labels(np.array([0]), flare, LabelSystem.numbered("t", ["kidney", "kidney_left"]))
    with pytest.raises(
        PluginError, match=r"holds the label 14, which FLARE22 does not have \(0 to 13\)"
    ):
        map_labels(np.array([0, 14]), flare, load_label_system("AEval"))


def test_dataset_json_with_regions() -> None:
    regions = {
        "background": 0,
        "whole tumor": [1, 2, 3],
        "tumor core": [2, 3],
        "enhancing tumor": 3,
    }
    tumours = system(regions, regions_class_order=[1, 2, 3])
    assert tumours.find("whole tumor") == (1, 2, 3)
    assert tumours.overlapping(["whole tumor", "enhancing tumor"]) == [
        ("whole tumor", "enhancing tumor")
    ]
    with pytest.raises(PluginError, match=r"'whole_tumor' and 'tumor_core' overlap in label 2"):
        system(regions)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": {"liver": 1, "spleen": 1}}, r"'liver' and 'spleen' overlap in label 1"),
        ({"labels": {"liver": 0}}, r"'liver' has the value 0, which is the background's"),
        ({"labels": {"background": 1, "liver": 2}}, r"the background must be 0, not 1"),
        ({"labels": {"left kidney": 1, "kidney_left": 2}}, r"the class 'kidney_left' stands twice"),
        ({"labels": {"liver": "one"}}, r"'liver' must be a value of 0 to 65535"),
        ({"labels": {"liver": 70000}}, r"of 0 to 65535"),
        ({"labels": {"background": 0}}, r"has no classes"),
        ({"labels": {"liver": 1, "ignore": 1}}, r"the value 1, which is the ignore label's"),
        (
            {"labels": ["liver"], "groups": {"both": ["liver", "spleen"]}},
            r"the group 'both' names spleen, which is no label",
        ),
        ({"labels": ["liver"], "groups": {"Liver": ["liver"]}}, r"has the name of another class"),
    ],
)
def test_bad_label_systems_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        LabelSystem.from_table(content, "mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lables: {liver: 1}",
            r"unknown entry 'lables'; there are name, labels, groups, .*Did you mean labels\?",
        ),
        ("lables: [liver, spleen]", r"unknown entry 'lables'.*Did you mean labels\?"),
        (
            "labels: {liver: 1}\ngruops: {both: [liver]}",
            r"unknown entry 'gruops'.*Did you mean groups\?",
        ),
        ("liver: 1\ngroups: {both: [liver]}", r"there is 'groups', but no entry 'labels'"),
    ],
)
def test_wrong_entries_of_a_users_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(PluginError, match=message):
        load_label_system(tmp_path / "mine.yaml")


def test_tables_without_the_entry_labels(tmp_path: Path) -> None:
    for text in ("liver: 1\nkidneys: [2, 3]", "1: liver\n2: spleen"):
        (tmp_path / "mine.yaml").write_text(text)
        assert load_label_system(tmp_path / "mine.yaml").find("liver") == (1,)


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: Ours\nlabels:\n  liver: 1\n  kidneys: [2, 3]\n")
    found = load_label_system(tmp_path / "mine.yaml")
    assert (found.name, dict(found.classes)) == ("Ours", {"liver": (1,), "kidney": (2, 3)})
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "Anterior": 1, "ignore": 2}})
    )
    found = load_label_system(tmp_path)
    assert (dict(found.classes), found.ignore) == ({"anterior": (1,)}, 2)
    (tmp_path / "wrong.json").write_text('["liver"]')
    for name, message in (
        ("nothing", r"neither a published label system nor a file"),
        (str(tmp_path / "wrong.json"), r"holds a list, not a table"),
    ):
        with pytest.raises(PluginError, match=message):
            load_label_system(name)
    (tmp_path / "wrong.json").write_text("{")
    with pytest.raises(PluginError, match=r"cannot be read"):
        load_label_system(tmp_path / "wrong.json")


def test_names_of_every_script_and_signs_stay_apart() -> None:
    names = [
        "肝脏",
        "脾脏",
        "печень",
        "कि",
        "की",
        "lesion < 3 cm",
        "lesion ≥ 3 cm",
        "lesion",
        "HER2+",
    ]
    system = LabelSystem.numbered("own", names)
    assert len(system.classes) == len(names)
    assert [system.find(name) for name in names] == [(value,) for value in range(1, 10)]
    with pytest.raises(PluginError, match="has no name"):
        LabelSystem.numbered("own", ["---"])
