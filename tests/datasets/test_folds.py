"""Folds in which every dataset has its share, and those of a dataset's own splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stunet_plugin.datasets.folds import balanced_folds, own_folds

from damage import damaged_json

TEN = [f"a{number}" for number in range(10)]
PAIRS = [[f"a{2 * fold}", f"a{2 * fold + 1}"] for fold in range(5)]


def names(letter: str, count: int) -> list[str]:
    return [f"{letter}{number}" for number in range(count)]


def test_every_dataset_has_its_share_of_every_fold() -> None:
    cases = {"A": names("a", 13), "B": names("b", 7), "C": names("c", 4)}
    folds = balanced_folds(cases, ["C"], 0, {})
    assert [len(fold["val"]) for fold in folds] == [4] * 5
    for fold in folds:
        assert set(cases["C"]) <= set(fold["train"])
        assert len(set(fold["train"]) | set(fold["val"])) == 24 == sum(map(len, fold.values()))
        assert 2 <= len(set(fold["val"]) & set(cases["A"])) <= 3
    validated = sorted(name for fold in folds for name in fold["val"])
    assert validated == sorted([*cases["A"], *cases["B"]])
    assert folds == balanced_folds(cases, ["C"], 0, {}) != balanced_folds(cases, ["C"], 1, {})


@pytest.mark.parametrize(
    ("counts", "sizes"), [((2, 2), []), ((3, 3), [1, 1, 1, 1, 2]), ((5, 1), [1, 1, 1, 1, 2])]
)
@pytest.mark.filterwarnings("ignore:The least populated class")
def test_few_cases(counts: tuple[int, int], sizes: list[int]) -> None:
    folds = balanced_folds({"A": names("a", counts[0]), "B": names("b", counts[1])}, [], 0, {})
    assert sorted(len(fold["val"]) for fold in folds) == sizes


def test_own_splits_are_found_and_damaged_ones_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    folder, trained = tmp_path / "Dataset001_A", tmp_path / "preprocessed" / "Dataset001_A"
    folder.mkdir()
    trained.mkdir(parents=True)
    assert own_folds(folder, TEN) == (None, "")
    splits = [{"train": sorted(set(TEN) - set(val)), "val": val} for val in PAIRS]
    for _, text in damaged_json(splits, 200):
        (folder / "splits_final.json").write_text(text)
        own, said = own_folds(folder, TEN)
        assert said
        found = [name for fold in own or () for name in fold]
        assert own is None or len(own) == 5
        assert len(found) == len(set(found) & set(TEN))
    # Those that training reads come first.
    (trained / "splits_final.json").write_text(json.dumps(splits))
    own, said = own_folds(folder, TEN)
    assert own == PAIRS
    assert str(trained) in said
