from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.pretraining import score
from stunet_plugin.pretraining.cases import check_cases, describe_cases


def test_splits_and_files_that_do_not_fit_the_cases(tmp_path: Path) -> None:
    data, splits = tmp_path / "data", tmp_path / "splits_final.json"
    data.mkdir()
    for case in "abc":
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (data / f"{case}{ending}").touch()

    def refused(fold: int, message: str) -> None:
        with pytest.raises(PluginError, match=message):
            check_cases(data, fold, "TRAIN ALL")

    refused(0, r"3 case.s., too few for nnU-Net's 5 folds.*: TRAIN ALL")
    check_cases(data, "all", "")
    folds = [{"train": ["a"], "val": ["b"]}, {"train": ["a", "gone"], "val": ["b", "c"]}]
    splits.write_text(json.dumps(folds))
    for fold in (0, 7, "all"):
        check_cases(data, fold, "")
    refused(1, "1 case.s. for fold 1 .* preprocessed .* example gone")
    (line,) = describe_cases(data, 0, expected=3)
    assert line.startswith("1 preprocessed case(s) are not used")
    (line,) = describe_cases(data, "all", expected=6)
    assert line.startswith("Only 3 of the 6 cases of dataset.json are preprocessed")
    splits.write_text("[")
    refused(0, "splits_final.json is damaged")
    (data / "b_seg.b2nd").unlink()
    refused(0, "1 file.s. .* b_seg.b2nd.*nnUNetv2_preprocess again")


def test_score_is_of_all_draws_together() -> None:
    class_map = torch.tensor([[[0, 0, 1, 2]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 0]]]), 3).movedim(-1, 1).float()
    confusion = score.confusion_matrix(logits, class_map)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    counts = [one.tolist() for one in score.overlap_counts(confusion)]
    assert counts == [[1, 1, 0], [1, 1, 0], [1, 0, 1]]
    found = score.pretext_score([confusion, confusion], ["0", "1/2", "1"])
    assert list(found["dice_per_alpha"].values()) == pytest.approx([2 / 4, 2 / 3, 0])
    assert found["accuracy"] == 0.5
    assert found["mean_absolute_error_of_alpha"] == pytest.approx((0.5 + 1) / 4)
    batches = {"mean": pytest.approx(7 / 18), "standard_deviation": 0, "batches": 2}
    assert found["mean_dice_of_batches"] == batches
    assert score.unlearned_classes(found["dice_per_alpha"]) == "1 (0.000)"
