"""Gaussian of every class's features, with a running mean and a shrunk covariance, as a classifier.

Source: GeNRT, arXiv:2303.05734, carried over from images to voxels. There a normalising flow per
class models the features before the classifier, of the target domain alone; here it is a Gaussian,
as a segmentation network has 16 to 96 such features instead of 512.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FEWEST = 33
"""Samples from which on a class counts as known (published: more than 32)."""
CHUNK = 1 << 18
"""Samples that are classified at a time."""


class ClassModels:
    """Running Gaussians of ``classes`` classes in ``dimensions`` dimensions, float32.

    Args:
        momentum: what is left of the weight of earlier samples of a class after an update.
        shrinkage: share of the covariance that becomes its mean variance times the identity.
        add_up: sums a tensor over all processes, in place.
    """

    def __init__(
        self,
        classes: int,
        dimensions: int,
        device: torch.device,
        momentum: float = 0.99,
        shrinkage: float = 0.1,
        add_up: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.momentum, self.shrinkage, self.add_up = momentum, shrinkage, add_up
        self.weight = torch.zeros(classes, device=device)
        self.frequency = torch.zeros(classes, device=device)
        self.mean = torch.zeros(classes, dimensions, device=device)
        self.scatter = torch.zeros(classes, dimensions, dimensions, device=device)
        self._factors: tuple[Tensor, Tensor] | None = None

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {name: getattr(self, name) for name in _STATE}

    def load(self, state: Mapping[str, Any]) -> None:
        for name in _STATE:
            getattr(self, name).copy_(state[name])
        self._factors = None

    @property
    def known(self) -> Tensor:
        """Which classes have a model, booleans (class,)."""
        return self.weight >= FEWEST

    @property
    def covariance(self) -> Tensor:
        """The shrunk covariances (class, dimension, dimension)."""
        found = self.scatter / self.weight.clamp(min=1)[:, None, None]
        variance = found.diagonal(dim1=1, dim2=2).mean(1)
        identity = torch.eye(found.shape[1], device=found.device)
        # A class whose features do not vary at all has a density still.
        spherical = variance.clamp(min=1e-6)[:, None, None] * identity
        return (1 - self.shrinkage) * found + self.shrinkage * spherical

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, counts: Tensor) -> None:
        """Take in samples. Every process has to call this, with no samples where it has none.

        Args:
            features: (sample, dimension).
            labels: class of each sample.
            counts: voxels of each class (class,), sampled or not: how frequent it is.
        """
        classes, features = len(self.weight), features.float()
        number = torch.bincount(labels, minlength=classes).float()
        total = torch.zeros_like(self.mean).index_add_(0, labels, features)
        sums = torch.cat((number[:, None], counts.float()[:, None], total), 1)
        self._over_processes(sums)
        number, counts, total = sums[:, 0], sums[:, 1], sums[:, 2:]
        mean = total / number.clamp(min=1)[:, None]
        order = labels.argsort()
        centred = (features - mean[labels])[order]
        parts = centred.split(torch.bincount(labels, minlength=classes).tolist())
        scatter = torch.stack([part.T @ part for part in parts])
        self._over_processes(scatter)
        # Chan et al.: two sets of samples merge without a difference of large squares.
        before = torch.where(number > 0, self.momentum, 1.0) * self.weight
        after = before + number
        share = number / after.clamp(min=1e-12)
        step = mean - self.mean
        moved = (share * before)[:, None, None] * step[:, :, None] * step[:, None, :]
        decay = torch.where(number > 0, self.momentum, 1.0)[:, None, None]
        self.scatter = decay * self.scatter + scatter + moved
        self.mean = self.mean + share[:, None] * step
        self.weight = after
        if counts.sum() > 0:
            self.frequency = self.momentum * self.frequency + counts / counts.sum()
        self._factors = None

    def _over_processes(self, sums: Tensor) -> None:
        if self.add_up is not None:
            self.add_up(sums)

    @torch.no_grad()
    def log_likelihoods(self, features: Tensor) -> Tensor:
        """Return the logarithms of the densities (sample, class) at features (sample, dimension);
        -inf for classes without a model."""
        if self._factors is None:
            roots = torch.linalg.cholesky(self.covariance)
            identity = torch.eye(roots.shape[1], device=roots.device).expand_as(roots)
            inverse = torch.linalg.solve_triangular(roots, identity, upper=False)
            self._factors = inverse, roots.diagonal(dim1=1, dim2=2).log().sum(1)
        inverse, half_determinant = self._factors
        constant = features.shape[1] / 2 * math.log(2 * math.pi)
        found = features.new_full((len(features), len(self.weight)), -math.inf, dtype=torch.float32)
        for label in self.known.nonzero()[:, 0].tolist():
            white = (features.float() - self.mean[label]) @ inverse[label].T
            found[:, label] = -white.square().sum(1) / 2 - half_determinant[label] - constant
        return found

    def logits(self, features: Tensor) -> Tensor:
        """Return log-likelihood plus logarithm of the class's frequency (sample, class)."""
        frequency = self.frequency / self.frequency.sum().clamp(min=1e-12)
        return self.log_likelihoods(features) + frequency.clamp(min=1e-6).log()

    def classify(self, features: Tensor) -> Tensor:
        """Return the most probable class of each sample; 0 while no class has a model."""
        parts = [self.logits(part).argmax(1) for part in features.split(CHUNK)]
        return torch.cat(parts) if parts else features.new_zeros(0, dtype=torch.long)

    @torch.no_grad()
    def draw(self, labels: Tensor) -> Tensor:
        """Return a random sample (sample, dimension) of the model of each label."""
        roots = torch.linalg.cholesky(self.covariance)
        noise = torch.randn(len(labels), self.mean.shape[1], device=labels.device)
        return self.mean[labels] + torch.einsum("nij,nj->ni", roots[labels], noise)


_STATE = ("weight", "frequency", "mean", "scatter")


def sample_voxels(labels: Tensor, classes: int, most: int) -> Tensor:
    """Draw voxels of every class without replacement.

    Args:
        labels: of all voxels (voxel,); what is no class from 0 to ``classes`` - 1 is left out.
        most: voxels per class.

    Returns:
        Indices of the drawn voxels, those of a class together.
    """
    shuffled = torch.randperm(len(labels), device=labels.device)
    values = labels[shuffled].long()
    values = torch.where((values >= 0) & (values < classes), values, classes)
    ordered, order = values.sort(stable=True)
    counts = torch.bincount(ordered, minlength=classes + 1)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(labels), device=labels.device) - first[ordered]
    return shuffled[order[(rank < most) & (ordered < classes)]]
