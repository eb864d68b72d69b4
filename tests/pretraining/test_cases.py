"""Preprocessed cases of a pretraining: splits that do not fit them, files that are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining.cases import check_cases_complete, check_fold, describe_cases


def test_splits_that_do_not_fit_the_cases(tmp_path: Path) -> None:
    data, splits = tmp_path / "data", tmp_path / "splits_final.json"
    data.mkdir()
    for case in "abc":
        (data / f"{case}.b2nd").touch()
    with pytest.raises(PluginError, match=r"3 case.s., too few for nnU-Net's 5 folds.*: TRAIN ALL"):
        check_fold(data, 0, "TRAIN ALL")
    check_fold(data, "all", "")
    folds = [{"train": ["a"], "val": ["b"]}, {"train": ["a", "gone"], "val": ["b", "c"]}]
    splits.write_text(json.dumps(folds))
    check_fold(data, 0, "")
    (line,) = describe_cases(data, 0, expected=3)
    assert line.startswith("1 preprocessed case(s) are not used"), line
    with pytest.raises(PluginError, match="1 case.s. for fold 1 .* preprocessed .* example gone"):
        check_fold(data, 1, "")
    check_fold(data, 7, "")
    assert describe_cases(data, 7, expected=3) == describe_cases(data, "all", expected=3) == []
    (line,) = describe_cases(data, "all", expected=6)
    assert line.startswith("Only 3 of the 6 cases of dataset.json are preprocessed"), line
    splits.write_text("[")
    with pytest.raises(PluginError, match="splits_final.json is damaged"):
        check_fold(data, 0, "")


def test_missing_files_of_cases_are_named(tmp_path: Path) -> None:
    for name in ("a.b2nd", "a_seg.b2nd", "a.pkl", "b.b2nd", "b.pkl"):
        (tmp_path / name).touch()
    with pytest.raises(PluginError, match="1 file.s. .* b_seg.b2nd.*nnUNetv2_preprocess again"):
        check_cases_complete(tmp_path)
    (tmp_path / "b_seg.b2nd").touch()
    check_cases_complete(tmp_path)
