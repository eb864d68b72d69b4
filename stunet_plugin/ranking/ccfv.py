"""CCFV, a score of pretrained weights on a labelled dataset: consistent classes, varied features.

Paper: Yang et al., arXiv:2307.11958 (MICCAI 2023). Published code, read for facts, not copied:
github.com/EndoluminalSurgicalVision-IMR/CCFV. Per decoder level,

* W, the consistency (small is good): the 2-Wasserstein distance between the Gaussians of one class
  in two cases, averaged over pairs of cases and over classes;
* F, the variety: of one mean feature vector per case, the mean over pairs of 1 / sqrt(squared
  distance + 1e-3);
* the score log(F / W); those of the levels are added up. F is an energy, which is high where the
  cases' mean features are alike; log(1 / (F W)), with its inverse, is high where they differ, and
  the same whatever the scale of the features.

Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

ENERGY_EPSILON = 1e-3
"""Added to squared distances in the variety, as published."""
MINIMUM_SAMPLES = 2
"""Voxels of a class in a case from which on its covariance is defined."""


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian by its mean (channel,) and a factor (rank, channel) of its covariance, which is
    ``factor.T @ factor``."""

    mean: np.ndarray
    factor: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> Gaussian:
        """Fit mean and unbiased covariance to two or more features (sample, channel), of which
        there may be fewer than channels."""
        features = np.asarray(features, dtype=np.float64)
        mean = features.mean(axis=0)
        scaled = (features - mean) / np.sqrt(len(features) - 1)
        _, values, directions = np.linalg.svd(scaled, full_matrices=False)
        return cls(mean, values[:, None] * directions)


def wasserstein(first: Gaussian, second: Gaussian) -> float:
    """Return the 2-Wasserstein distance, sqrt(|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2
    C1^(1/2))^(1/2))).

    The trace is the least squared distance between factors of the two covariances, one turned to
    meet the other (orthogonal Procrustes). So nothing is subtracted that could cancel, no root is
    drawn of a singular matrix, and the distance of equal Gaussians is zero to the last digits.
    """
    rank = max(len(first.factor), len(second.factor))
    one, other = (np.pad(x.factor, ((0, rank - len(x.factor)), (0, 0))) for x in (first, second))
    left, _, right = np.linalg.svd(one @ other.T)
    between_covariances = np.sum((one - left @ right @ other) ** 2)
    return float(np.sqrt(np.sum((first.mean - second.mean) ** 2) + between_covariances))


@dataclass(frozen=True)
class LevelScore:
    """CCFV of one decoder level.

    Attributes:
        consistency: W.
        class_distances: class to its mean distance over pairs of cases.
        energy: F.
        score: log(F / W); None where W is zero (features that do not vary).
        inverse: log(1 / (F W)), likewise.

    All are None where features are not finite (broken weights).
    """

    consistency: float | None = None
    class_distances: dict[int, float] = field(default_factory=dict)
    energy: float | None = None
    score: float | None = None
    inverse: float | None = None


def score_level(
    classes: Mapping[int, Sequence[Gaussian]],
    means: Sequence[np.ndarray],
    published_sums: bool = False,
) -> LevelScore:
    """Score one level.

    Args:
        classes: class to its Gaussians, one for each case that shows it; at least two.
        means: mean feature vector (channel,) of each case, at least two.
        published_sums: W as the published script adds it up, where the paper averages: the
            distances of all pairs so far, plus, after each class, that sum once more divided by the
            number of pairs and classes.
    """
    distances = {
        label: [wasserstein(*x) for x in combinations(cases, 2)] for label, cases in classes.items()
    }
    class_distances = {label: float(np.mean(values)) for label, values in distances.items()}
    consistency = float(np.mean(list(class_distances.values())))
    if published_sums:
        consistency = 0.0
        for label, values in distances.items():
            consistency += sum(values)
            consistency += consistency / (len(classes[label]) ** 2 / 2) / len(classes)
    squares = np.array([np.sum((a - b) ** 2) for a, b in combinations(means, 2)])
    energy = float(np.mean(1 / np.sqrt(squares + ENERGY_EPSILON)))
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = [float(sign * np.log(energy) - np.log(consistency)) for sign in (1, -1)]
    known = [score if np.isfinite(score) else None for score in scores]
    return LevelScore(consistency, class_distances, energy, *known)
