"""CCFV on features whose score can be worked out by hand, and against a plain transcription of the
formula."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from stunet_plugin.ranking.ccfv import Gaussian, score_level, wasserstein


def gaussian(mean: Sequence[float], deviations: Sequence[float]) -> Gaussian:
    """One with a diagonal covariance."""
    return Gaussian(np.array(mean, float), np.diag(np.array(deviations, float)))


def plain_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The formula as it is written, with matrix roots by eigenvalues."""
    c1, c2 = (np.atleast_2d(np.cov(features.T)) for features in (first, second))
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    return float(
        np.sqrt(np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(c1 + c2) - 2 * cross)
    )


# Fewer samples than channels: singular covariances.
@pytest.mark.parametrize(("samples", "channels"), [((60, 50), 4), ((90, 90), 1), ((7, 5), 40)])
def test_distance_agrees_with_the_plain_formula(samples: tuple[int, int], channels: int) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.normal(rng.normal(), 1 + rng.random(), (n, channels)) for n in samples)
    one, other = Gaussian.fit(first.astype(np.float32)), Gaussian.fit(second)
    assert np.allclose(one.factor.T @ one.factor, np.cov(first.T), rtol=1e-5, atol=1e-5)
    one, expected = Gaussian.fit(first), pytest.approx(plain_distance(first, second), rel=1e-6)
    assert wasserstein(one, other) == expected
    assert wasserstein(one, other) == pytest.approx(wasserstein(other, one), rel=1e-12)
    assert wasserstein(one, Gaussian.fit(first[::-1])) < 1e-13
    # The same features, 1e6 away from the origin in every channel: no digits are lost.
    assert wasserstein(Gaussian.fit(first + 1e6), Gaussian.fit(second + 1e6)) == expected


def test_averages() -> None:
    """Two classes in three cases; the means lie on a line, so that distances can be read off."""
    classes = {
        1: [gaussian([place], [1]) for place in (0, 1, 3)],
        2: [gaussian([place], [2]) for place in (0, 2, 6)],
    }
    result = score_level(classes, [np.array([place]) for place in (0.0, 10.0, 20.0)])
    assert result.class_distances == {1: pytest.approx(2), 2: pytest.approx(4)}
    assert result.consistency == pytest.approx(3)
    pairs = [1 / np.sqrt(distance**2 + 1e-3) for distance in (10, 10, 20)]
    assert result.energy == pytest.approx(np.mean(pairs))
    assert result.score == pytest.approx(np.log(result.energy / 3))


def test_features_that_do_not_vary_have_no_score() -> None:
    still = [gaussian([1, 1], [0, 0])] * 2
    assert score_level({1: still}, [np.ones(2)] * 2).score is None
