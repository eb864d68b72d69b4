"""Class models: their likelihoods against scipy's, and what they make of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import shrunk_covariance

from stunet_plugin.self_training.class_models import FEWEST, ClassModels, sample_voxels

CPU = torch.device("cpu")


def gaussians(number: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes (sample, 5), far from zero, correlated; class 1 has a third."""
    random = np.random.default_rng(1)
    parts = []
    for label, count in enumerate((number, number // 3, number)):
        turn = random.normal(size=(5, 5))
        parts.append(random.normal(size=(count, 5)) @ turn + 30 + 4 * label)
    labels = [label for label, part in enumerate(parts) for _ in part]
    return torch.tensor(np.concatenate(parts), dtype=torch.float32), torch.tensor(labels)


def fitted(parts: int, momentum: float = 1.0) -> ClassModels:
    features, labels = gaussians()
    models = ClassModels(3, 5, CPU, momentum=momentum)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for part in order.chunk(parts):
        counts = torch.bincount(labels[part], minlength=3)
        models.update(features[part], labels[part], counts)
    return models


@pytest.mark.parametrize("parts", [1, 7])
def test_log_likelihoods_are_scipys_however_the_samples_came(parts: int) -> None:
    features, labels = gaussians()
    models = fitted(parts)
    found = models.log_likelihoods(features)
    for label in range(3):
        mine = features[labels == label].double().numpy()
        covariance = shrunk_covariance(np.cov(mine.T, bias=True), 0.1)
        expected = multivariate_normal(mine.mean(0), covariance).logpdf(features.numpy())
        np.testing.assert_allclose(found[:, label], expected, rtol=2e-4, atol=2e-3)
    assert (models.classify(features) == labels).float().mean() > 0.9
    share = models.frequency / models.frequency.sum()
    assert share.tolist() == pytest.approx([3 / 7, 1 / 7, 3 / 7], abs=0.03)


def test_later_samples_count_more_and_rare_classes_do_not_fade() -> None:
    models = ClassModels(2, 1, CPU, momentum=0.5)
    zeros, counts = torch.zeros(100, dtype=torch.long), torch.tensor([100, 0])
    models.update(torch.full((100, 1), 9.0), zeros + 1, counts.flip(0))
    for value in (1.0, 2.0, 3.0):
        models.update(torch.full((100, 1), value), zeros, counts)
    assert models.mean[0].item() == pytest.approx((0.25 * 1 + 0.5 * 2 + 3) / 1.75)
    assert models.weight.tolist() == [175, 100]


def test_a_class_with_too_few_samples_has_no_model() -> None:
    models = ClassModels(3, 2, CPU)
    assert models.classify(torch.randn(4, 2)).tolist() == [0] * 4
    labels = torch.tensor([0] * FEWEST + [1] * (FEWEST - 1))
    models.update(torch.randn(len(labels), 2), labels, torch.bincount(labels, minlength=3))
    assert models.known.tolist() == [True, False, False]
    found = models.log_likelihoods(torch.randn(8, 2))
    assert found[:, 0].isfinite().all()
    assert (found[:, 1:] == -torch.inf).all()
    empty = torch.zeros(0, dtype=torch.long)
    before = models.mean.clone()
    models.update(torch.zeros(0, 2), empty, torch.zeros(3))
    assert torch.equal(models.mean, before)


def test_drawn_samples_are_those_of_the_class() -> None:
    torch.manual_seed(0)
    models = fitted(1)
    drawn = models.draw(torch.full((20_000,), 2))
    assert torch.allclose(drawn.mean(0), models.mean[2], atol=0.15)
    assert torch.allclose(drawn.T.cov(), models.covariance[2], atol=0.5)


def test_sums_over_processes_make_one_model() -> None:
    """Two processes with different samples, each of which adds the other's sums."""
    features, labels = gaussians()
    halves = [torch.arange(len(labels)) % 2 == number for number in (0, 1)]
    sent: list[list[torch.Tensor]] = [[], []]
    # The sums of one process are known before those of the other are wanted: run each twice.
    for _ in range(2):
        models = []
        for number, half in enumerate(halves):
            others, mine = iter(sent[1 - number]), []

            def add_up(sums: torch.Tensor, others=others, mine=mine) -> None:
                mine.append(sums.clone())
                sums += next(others, torch.zeros_like(sums))

            one = ClassModels(3, 5, CPU, add_up=add_up)
            counts = torch.bincount(labels[half], minlength=3)
            one.update(features[half], labels[half], counts)
            models.append(one)
            sent[number] = mine
        # Scatter is about the common mean, which the second round knows.
    whole = ClassModels(3, 5, CPU)
    whole.update(features, labels, torch.bincount(labels, minlength=3))
    third = [torch.allclose(one.covariance, whole.covariance, rtol=1e-3) for one in models]
    assert torch.allclose(models[1].mean, whole.mean)
    assert third[1]


def test_sampled_voxels_are_of_every_class_and_no_more_than_asked_for() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0] * 500 + [2] * 3 + [-1] * 50 + [3] * 50)[torch.randperm(603)]
    drawn = sample_voxels(labels, 3, 20)
    assert len(drawn.unique()) == len(drawn) == 23
    assert torch.bincount(labels[drawn], minlength=3).tolist() == [20, 0, 3]
    assert not torch.equal(drawn, sample_voxels(labels, 3, 20))
    assert len(sample_voxels(torch.full((9,), 7), 3, 20)) == 0
