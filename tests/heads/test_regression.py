"""Regression of heads: known heads are found again; fixed outputs stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stunet_plugin.heads.regression import Linear, Samples, fit, held_out_dice

NONE, ALL = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)


def samples(regions: bool) -> tuple[Samples, Linear]:
    """Return voxels of eight cases that a linear head separates, and the head."""
    torch.manual_seed(0)
    features = 0.01 * torch.randn(2400, 5) + torch.tensor([3.0, 0, 0, 0, -2])
    features[:, 4] = 7  # says nothing
    head = Linear(100 * torch.randn(3, 5), torch.zeros(3))
    head.weight[:, 4] = 0
    head.bias.copy_(-(head.weight @ features.mean(0)))
    logits = head(features)
    if regions:
        targets = (logits > 0).float()
    else:
        targets = torch.nn.functional.one_hot(logits.argmax(1), 3).float()
    cases, weights = torch.arange(2400) // 300, torch.rand(2400) + 0.5
    return Samples(features, targets, weights, cases, regions), head


@pytest.mark.parametrize("regions", [False, True])
def test_a_linear_head_is_found_again(regions: bool) -> None:
    given, _ = samples(regions)
    zero = Linear(torch.zeros(3, 5), torch.zeros(3))
    found = fit(given, zero, ALL, ALL)
    assert found.dice.min() > 0.95
    assert given.dice(found.head(given.features)).min() > 0.95
    # As a softmax wants them: likely where they are right.
    assert given.loss(found.head(given.features)) < 0.4 * given.loss(0 * given.targets)


def test_outputs_that_are_not_fitted_stay_and_are_outvoted() -> None:
    given, _ = samples(False)
    start = Linear(torch.randn(3, 5), torch.tensor([0.0, 40, 0]))
    start.weight[:, 4] = 0
    given.targets[given.targets[:, 1] == 1] = torch.tensor([1.0, 0, 0])
    free = torch.tensor([True, False, True])
    found = fit(given, start, free, ALL)
    for part, before in zip(found.head, start, strict=True):
        torch.testing.assert_close(part[1], before[1], rtol=1e-3, atol=1e-3)
    assert found.method.startswith("logistic")
    decided = found.head(given.features).argmax(1)
    assert (decided == 1).float().mean() < 0.01
    assert given.dice(found.head(given.features))[1] > 0.7


def test_a_start_that_is_right_stays_and_one_case_is_split_by_voxels() -> None:
    given, head = samples(False)
    alone = Samples(given.features, given.targets, given.weights, 0 * given.cases, False)
    found = fit(alone, head, ALL, NONE)
    assert given.dice(found.head(given.features)).min() > 0.99
    part, held_out = alone.split()
    assert (len(part.cases), len(held_out.cases)) == (1800, 600)


def test_held_out_dice_grows_with_what_features_know() -> None:
    """Of a rare class."""
    torch.manual_seed(0)
    rare = (torch.rand(4000) < 0.05).long()
    targets = torch.nn.functional.one_hot(rare, 2).float()
    noise = torch.randn(4000, 6)
    dice = []
    for signal in (0.0, 2.0, 4.0):
        features = noise + signal * rare[:, None] * torch.eye(6)[2]
        given = Samples(features, targets, torch.ones(4000), torch.arange(4000) % 7, False)
        dice.append(held_out_dice(given))
        # The scale of the features is of no matter.
        assert held_out_dice(replace(given, features=100 * features)) == pytest.approx(
            dice[-1], rel=1e-2
        )
    assert dice[0] < 0.05 < dice[1] < 0.8
    assert dice[2] > 0.8
    alone = Samples(noise, targets, torch.ones(4000), torch.zeros(4000), False)
    assert held_out_dice(alone) < 0.05
