"""Label systems: published ones, users' own, what two of them share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.label_systems import (
    LabelSystem,
    canonical_name,
    load_label_system,
    published_facts,
    shared_classes,
)

A_EVAL = ("FLARE22", "AMOS", "WORD-17", "TotalSegmentator-v2", "TotalSegmentator-MR", "BTCV")


def system(labels: Any, **more: Any) -> LabelSystem:
    return LabelSystem.from_table({"labels": labels, **more}, "test")


def test_published_systems() -> None:
    for name in published_facts()["systems"]:
        found = load_label_system(name)
        assert found.values == frozenset(range(max(found.values) + 1)), name
    organs = ["spleen", "gallbladder", "liver", "stomach", "pancreas", "esophagus"]
    organs += [f"{x}_{side}" for x in ("kidney", "adrenal_gland") for side in ("left", "right")]
    systems = [load_label_system(name) for name in A_EVAL]
    assert set(shared_classes(systems)) == {*organs} == set(load_label_system("AEval").classes)


def test_names_of_one_class_are_one_name() -> None:
    expected = {
        "IVC": "inferior_vena_cava",
        "right adrenal gland": "adrenal_gland_right",
        "LAG": "adrenal_gland_left",
        "Femur-left": "femur_left",
        "left_common_iliac_vein": "iliac_vena_left",
        "prostate/uterus": "prostate_uterus",
        "left": "left",
        "ER-": "er-",
        "#1": "#1",
    }
    assert {name: canonical_name(name) for name in expected} == expected


def test_names_of_every_script_and_signs_stay_apart() -> None:
    names = ["肝脏", "脾脏", "печень", "कि", "की"]
    names += ["lesion < 3 cm", "lesion ≥ 3 cm", "lesion", "HER2+"]
    found = LabelSystem.numbered("own", names)
    assert [found.find(name) for name in names] == [(value,) for value in range(1, 10)]


@pytest.mark.shared
def test_published_systems_agree_with_the_facts(shared: Path) -> None:
    facts = json.loads((shared / "reference" / "label_systems.json").read_text())
    names = {"WORD": "WORD-17", "TotalSeg": A_EVAL[3], "TotalSegMR": A_EVAL[4]}
    for name, labels in facts["a_eval"].items():
        ours = load_label_system(names.get(name, name)).classes
        for label, value in labels.items():
            known = canonical_name(label)
            # A-Eval orders the ribs in its own way; MR names are of another release.
            if value and not known.startswith("rib_") and known != "hepatic_portal_vein":
                assert ours[known] == (value,), name
    v1 = load_label_system("totalsegmentator_v1")
    direct = facts["stunet_direct_inference"]["target_to_totalsegmentator_v1"]
    for name, parts in direct.items():
        expected = {v1.values_of(part)[0] for part in parts.removeprefix("agg:").split(",")}
        # LV, T10 and the like may mean anything in another dataset, so they are no synonyms.
        if not re.fullmatch(r"[LR][VA]|[CTL]\d+", name):
            assert set(v1.values_of(name)) == expected, name
    labels = json.loads((shared / "data" / "examples" / "example_seg_labels.json").read_text())
    assert LabelSystem.from_table(labels, "x").classes == load_label_system(A_EVAL[3]).classes


def test_a_larger_class_is_made_up_of_smaller_ones() -> None:
    names = ("FLARE22", "AbdomenCT-1K", "TotalSegmentator-v1", "MSD-Liver")
    flare, abdomen, v1, msd = map(load_label_system, names)
    assert flare.find("kidneys") == (2, 13)
    assert v1.find("lung") == (13, 14, 15, 16, 17)
    assert abdomen.find("kidney_left") is None
    assert shared_classes([flare, abdomen]) == ["liver", "spleen", "pancreas", "kidney"]
    left = flare.without_counterpart(["kidney", "liver"])
    assert left[:2] == ["spleen", "pancreas"]
    assert not {"kidney_left", "kidney_right"} & set(left)
    labels = np.array([0, 1, 2, 1])
    assert msd.mask(labels, "liver").tolist() == [False, True, True, True]
    with pytest.raises(PluginError, match="has no class 'spleen'; its classes are: liver_without"):
        msd.mask(labels, "spleen")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"labels": {"liver": 1, "spleen": 1}}, "'liver' and 'spleen' overlap in label 1"),
    ({"labels": {"liver": 1, "ignore": 1}}, "'ignore' and 'liver' overlap in label 1"),
    ({"labels": {"background": 1, "liver": 2}}, "the background must be 0, not"),
    ({"labels": {"left kidney": 1, "kidney_left": 2}}, "'kidney_left', which stands twice"),
    ({"labels": {"liver": 70000}}, "'liver' must be a value of 0 to 65535"),
    ({"labels": {"background": 0}}, "has no classes"),
    ({"labels": ["liver"], "groups": {"both": ["liver", "spleen"]}}, "'both' must list labels"),
    ({"labels": ["liver"], "groups": {"Liver": ["liver"]}}, "has the name of another class"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_label_systems_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        LabelSystem.from_table(content, "mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lables: {liver: 1}", r"unknown entry 'lables'; there are name, .*Did you mean labels\?"),
        ("liver: 1\ngroups: {both: [liver]}", "there is 'groups', but no entry 'labels'"),
        ("[liver]", "holds a list, not a table"),
        ("{", "cannot be read as YAML"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(PluginError, match=message):
        load_label_system(tmp_path / "mine.yaml")


def test_files_and_folders(tmp_path: Path) -> None:
    for text in ("liver: 1\nkidneys: [2, 3]", "1: liver\n2: spleen"):
        (tmp_path / "mine.yaml").write_text(text)
        assert load_label_system(tmp_path / "mine.yaml").find("liver") == (1,)
    (tmp_path / "mine.yaml").write_text("name: Ours\nlabels:\n  liver: 1\n  kidneys: [2, 3]\n")
    found = load_label_system(tmp_path / "mine.yaml")
    assert (found.name, dict(found.classes)) == ("Ours", {"liver": (1,), "kidney": (2, 3)})
    content = {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}}
    more = {"regions_class_order": [1, 2], "channel_names": {"0": "MRI"}, "anything": 1}
    (tmp_path / "dataset.json").write_text(json.dumps({**content, **more}))
    found = load_label_system(tmp_path)
    assert (dict(found.classes), found.ignore) == ({"whole": (1, 2), "core": (2,)}, 3)
    with pytest.raises(PluginError, match="neither a published label system nor a file"):
        load_label_system("nothing")
