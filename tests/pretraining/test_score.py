"""Scores of the pretext task: of all draws together, and classes that were not learned."""

from __future__ import annotations

import pytest
import torch

from stunet_plugin.pretraining.score import (
    confusion_matrix,
    dice_per_class,
    overlap_counts,
    pretext_score,
    unlearned_classes,
)


def test_score_is_of_all_draws_together() -> None:
    class_map = torch.tensor([[[0, 0, 1, 2]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 0]]]), 3).movedim(-1, 1).float()
    confusion = confusion_matrix(logits, class_map)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    counts = [one.tolist() for one in overlap_counts(confusion)]
    assert counts == [[1, 1, 0], [1, 1, 0], [1, 0, 1]]
    assert dice_per_class(confusion) == pytest.approx([2 / 4, 2 / 3, 0])
    score = pretext_score([confusion, confusion], ["0", "1/2", "1"])
    assert score["dice_per_alpha"]["1/2"] == pytest.approx(2 / 3)
    assert score["accuracy"] == 0.5
    assert score["mean_absolute_error_of_alpha"] == pytest.approx((0.5 + 1) / 4)
    batches = {"mean": pytest.approx(7 / 18), "standard_deviation": 0, "batches": 2}
    assert score["mean_dice_of_batches"] == batches
    assert unlearned_classes(score["dice_per_alpha"]) == "1 (0.000)"


def test_classes_that_are_not_there_do_not_count_as_unlearned() -> None:
    assert unlearned_classes({"0": 0.9, "1/2": None, "1": 0.3}) == ""
