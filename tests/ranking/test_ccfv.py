"""CCFV on features whose score can be worked out by hand, and against a plain transcription of the
formula."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from stunet_plugin.ranking.ccfv import (
    SPREAD,
    Definition,
    Gaussian,
    score_level,
    variety_energy,
    wasserstein,
)


def gaussian(mean: Sequence[float], deviations: Sequence[float]) -> Gaussian:
    """One with a diagonal covariance."""
    return Gaussian(np.array(mean, float), np.diag(np.array(deviations, float)))


def plain_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The formula as it is written, with a general matrix root."""
    c1, c2 = (np.cov(features.T) for features in (first, second))
    root = sqrtm(c1 @ c2)
    return float(
        np.sqrt(
            np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * np.real(root))
        )
    )


def test_distance_of_diagonal_gaussians_is_that_of_means_and_deviations() -> None:
    # Axis by axis: (m1 - m2)^2 + (s1 - s2)^2.
    distance = wasserstein(gaussian([0, 0], [1, 3]), gaussian([3, 4], [1, 1]))
    assert distance == pytest.approx(np.sqrt(25 + 4), rel=1e-14)


def test_distance_of_one_dimension_lower_rank_and_of_none() -> None:
    line = Gaussian(np.zeros(3), np.array([[2.0, 0, 0]]))
    other = Gaussian(np.zeros(3), np.array([[0, 1.0, 0]]))
    point = Gaussian(np.zeros(3), np.zeros((1, 3)))
    # Lines at right angles: no turn brings them closer, so the traces add up.
    assert wasserstein(line, other) == pytest.approx(np.sqrt(5))
    assert wasserstein(line, point) == pytest.approx(2)
    assert wasserstein(point, point) == 0


@pytest.mark.parametrize(("samples", "channels"), [((60, 50), 4), ((200, 30), 8), ((90, 90), 1)])
def test_distance_agrees_with_the_plain_formula(samples: tuple[int, int], channels: int) -> None:
    rng = np.random.default_rng(0)
    first, second = (
        rng.normal(rng.normal(), 1, (count, channels)) @ rng.normal(size=(channels, channels))
        for count in samples
    )
    if channels == 1:
        expected = np.hypot(first.mean() - second.mean(), first.std(ddof=1) - second.std(ddof=1))
    else:
        expected = plain_distance(first, second)
    assert wasserstein(Gaussian.fit(first), Gaussian.fit(second)) == pytest.approx(
        expected, rel=1e-9
    )


def test_fewer_samples_than_channels() -> None:
    """Rank-deficient covariances, where the plain formula's root is that of a singular matrix."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(7, 40)), rng.normal(1, 2, size=(5, 40))
    one, other = Gaussian.fit(first), Gaussian.fit(second)
    c1, c2 = np.cov(first.T), np.cov(second.T)
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    expected = np.sqrt(
        np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(c1 + c2) - 2 * cross
    )
    assert wasserstein(one, other) == pytest.approx(expected, rel=1e-6)
    assert wasserstein(one, other) == pytest.approx(wasserstein(other, one), rel=1e-12)
    # The same features, 1e6 away from the origin in every channel: no digits are lost.
    assert wasserstein(one, Gaussian.fit(first[::-1])) < 1e-13
    assert wasserstein(Gaussian.fit(first + 1e6), Gaussian.fit(second + 1e6)) == pytest.approx(
        expected, rel=1e-6
    )


def test_fit_is_mean_and_unbiased_covariance() -> None:
    features = np.random.default_rng(2).normal(size=(30, 3)) @ [[1, 2, 0], [0, 1, 5], [0, 0, 3]]
    fitted = Gaussian.fit(features.astype(np.float32))
    assert fitted.mean.dtype == np.float64
    assert np.allclose(fitted.factor.T @ fitted.factor, np.cov(features.T), rtol=1e-5)
    assert Gaussian.fit(features[:2]).factor.shape == (2, 3)
    with pytest.raises(ValueError, match="at least 2 samples"):
        Gaussian.fit(features[:1])


def test_variety_by_hand() -> None:
    means = [np.array([0.0, 0]), np.array([3.0, 4]), np.array([0.0, 0])]
    pair = 1 / np.sqrt(25 + 1e-3)
    assert variety_energy(means) == pytest.approx((2 * pair + 1 / np.sqrt(1e-3)) / 3)


def level(scale: float = 1.0) -> tuple[dict[int, list[Gaussian]], list[np.ndarray]]:
    """Two classes in three cases; the means lie on a line, so that distances can be read off."""
    classes = {
        1: [gaussian([scale * place], [scale]) for place in (0, 1, 3)],
        2: [gaussian([scale * place], [scale * 2]) for place in (0, 2, 6)],
    }
    return classes, [np.array([scale * place]) for place in (0.0, 10.0, 20.0)]


def test_averages_over_pairs_and_classes() -> None:
    result = score_level(*level(), Definition())
    assert result.class_distances == {1: pytest.approx(2), 2: pytest.approx(4)}
    assert result.consistency == pytest.approx(3)
    assert result.energy == pytest.approx((2 / 10 + 1 / 20) / 3, rel=1e-4)
    assert result.score == pytest.approx(np.log(result.energy / 3))


def test_the_published_scripts_sums() -> None:
    result = score_level(*level(), Definition(published_sums=True))
    after_first = 6 + 6 / (9 / 2) / 2
    expected = (after_first + 12) * (1 + 1 / (9 / 2) / 2)
    assert result.consistency == pytest.approx(expected)
    assert result.score == pytest.approx(np.log(result.energy / expected))


def test_scale_of_the_features() -> None:
    """The energy counts the features' scale (twice), its inverse does not."""
    plain, scaled = (score_level(*level(scale), Definition()).score for scale in (1, 100))
    assert plain is not None
    assert scaled == pytest.approx(plain - 2 * np.log(100), abs=1e-3)
    plain, scaled = (
        score_level(*level(scale), Definition(variety=SPREAD)).score for scale in (1, 100)
    )
    assert scaled == pytest.approx(plain, abs=1e-3)


def test_features_that_do_not_vary_or_are_broken_have_no_score() -> None:
    still = [gaussian([1, 1], [0, 0])] * 2
    assert score_level({1: still}, [np.ones(2)] * 2, Definition()).score is None
    broken = [gaussian([np.nan], [0]), gaussian([0], [1])]
    assert score_level({1: broken}, [np.array([np.nan]), np.zeros(1)], Definition()).score is None


def test_the_whole_score_agrees_with_a_plain_computation() -> None:
    rng = np.random.default_rng(3)
    cases = [
        {label: rng.normal(label, 1 + 0.1 * case, size=(80, 5)) for label in (0, 1, 2)}
        for case in range(4)
    ]
    distances = [
        [plain_distance(a[label], b[label]) for a, b in combinations(cases, 2)] for label in (1, 2)
    ]
    means = [np.concatenate(list(case.values())).mean(0) for case in cases]
    variety = np.mean([1 / np.sqrt(np.sum((a - b) ** 2) + 1e-3) for a, b in combinations(means, 2)])
    classes = {label: [Gaussian.fit(case[label]) for case in cases] for label in (1, 2)}
    assert score_level(classes, means, Definition()).score == pytest.approx(
        np.log(variety / np.mean(distances)), rel=1e-9
    )
