"""Linear heads fitted to features of sampled voxels: logistic and ridge regression to the logits.

Each sampled voxel stands for the voxels of its label in its patch, by its weight. Which regression
and which strength of regularisation is decided by the Dice on the voxels of held-out cases; the
chosen one is fitted to all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LOGISTIC, RIDGE = "logistic regression", "ridge regression"
METHODS = ((LOGISTIC, 1e-2), (RIDGE, 1e-2), (LOGISTIC, 1e-3), (LOGISTIC, 1e-4))
"""Regressions, and how strongly they are regularised, on features of deviation 1 and the mean loss
of a voxel; smaller weights first. Rare classes need the last ones."""
AS_GOOD = 0.02
"""Of Dice. Large weights may unsettle a training (seen once), so they must be worth it."""
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""From the scores of a ridge regression, 0 to 1, to logits; the best by the held-out loss."""
STEPS = 50
LEAST_DEVIATION = 0.1
"""Of a channel's features, of that of all."""
HELD_OUT = 4
"""Every fourth case."""


class Linear(NamedTuple):
    """Weights (output, channel) and biases (output,) of a head."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class Samples:
    """Sampled voxels.

    Attributes:
        features: (voxel, channel), float32.
        targets: (voxel, output), 1 where the voxel belongs to the output's class, else 0.
        weights: (voxel,), the voxels that each stands for.
        cases: (voxel,), the number of its case.
        regions: whether each output is a sigmoid of its own, rather than one of a softmax.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor
    cases: Tensor
    regions: bool

    def at(self, chosen: Tensor) -> Samples:
        """Return some of them, by a mask or by numbers."""
        return Samples(
            self.features[chosen],
            self.targets[chosen],
            self.weights[chosen],
            self.cases[chosen],
            self.regions,
        )

    def split(self) -> tuple[Samples, Samples]:
        """Return the samples to fit to, and those of held-out cases; of one case, voxels."""
        numbers = torch.unique(self.cases, return_inverse=True)[1]
        if int(numbers.max()) == 0:
            numbers = torch.arange(len(self.cases))
        held_out = numbers % HELD_OUT == min(HELD_OUT - 1, int(numbers.max()))
        return self.at(~held_out), self.at(held_out)

    def loss(self, logits: Tensor) -> Tensor:
        """Return the mean cross-entropy of a voxel."""
        if self.regions:
            losses = functional.binary_cross_entropy_with_logits(
                logits, self.targets, reduction="none"
            ).sum(1)
        else:
            losses = -(self.targets * functional.log_softmax(logits, 1)).sum(1)
        return (self.weights * losses).sum() / self.weights.sum()

    def dice(self, logits: Tensor) -> Tensor:
        """Return the Dice of each output (NaN: there is none of it), the background left out."""
        if self.regions:
            decided = (logits > 0).float()
        else:
            decided = functional.one_hot(logits.argmax(1), logits.shape[1]).float()
        weights = self.weights[:, None]
        both = (weights * decided * self.targets).sum(0)
        sizes = (weights * decided).sum(0) + (weights * self.targets).sum(0)
        there = (weights * self.targets).sum(0) > 0
        dice = torch.where(there, 2 * both / sizes.clamp(min=1e-9), torch.nan)
        return dice if self.regions else dice[1:]


@dataclass(frozen=True)
class Fit:
    """A fitted head, its Dice per output on the held-out voxels before it was fitted to all, and
    how it was fitted."""

    head: Linear
    dice: Tensor
    method: str


def fit(samples: Samples, start: Linear, free: Tensor, blank: Tensor) -> Fit:
    """Fit some outputs of a head; the others stay as they are and are counted in the softmax.

    Args:
        start: the head as it is.
        free: (output,), the outputs to fit.
        blank: (output,), outputs that ``start`` says nothing about; the others stay near it.
    """
    scaled, to_scaled, back = _standardised(samples)
    first = to_scaled(start)
    first.weight[free & blank] = 0
    first.bias[free & blank] = 0
    part, held_out = scaled.split()

    def method(name: str, strength: float, given: Samples) -> Linear:
        if name == LOGISTIC:
            return _logistic(given, first, free, strength)
        return _ridge(given, held_out, strength)

    # Ridge regression knows nothing of outputs that stay as they are.
    known = [x for x in METHODS if x[0] == LOGISTIC or bool((free & blank).all())]
    dice = {x: held_out.dice(method(*x, part)(held_out.features)) for x in known}
    means = {x: float(values.nanmean().nan_to_num(0)) for x, values in dice.items()}
    best = next(x for x, mean in means.items() if mean >= max(means.values()) - AS_GOOD)
    return Fit(back(method(*best, scaled)), dice[best], f"{best[0]}, {best[1]:g}")


def held_out_dice(samples: Samples) -> float:
    """Return the mean Dice of the outputs on held-out cases of a head that is fitted from
    nothing, by logistic regression of the best strength, over up to four ways to hold cases out; 0
    if there are no classes in them."""
    scaled, _, _ = _standardised(samples)
    channels, outputs = scaled.features.shape[1], scaled.targets.shape[1]
    start = Linear(torch.zeros(outputs, channels), torch.zeros(outputs))
    every = torch.ones(outputs, dtype=torch.bool)
    names, numbers = torch.unique(samples.cases, return_inverse=True)
    best = []
    for first in range(min(HELD_OUT, len(names))):
        part, held_out = replace(scaled, cases=(numbers + first) % len(names)).split()
        heads = [_logistic(part, start, every, x) for name, x in METHODS if name == LOGISTIC]
        dice = [held_out.dice(head(held_out.features)).nanmean() for head in heads]
        best.append(torch.stack(dice).nan_to_num(0).amax())
    return float(torch.stack(best).mean())


def _standardised(
    samples: Samples,
) -> tuple[Samples, Callable[[Linear], Linear], Callable[[Linear], Linear]]:
    """Return the samples with features of mean 0 and deviation 1, and the translations of a head to
    them and back."""
    share = samples.weights / samples.weights.sum()
    mean = share @ samples.features
    deviation = (share @ (samples.features - mean) ** 2).sqrt()
    # Channels that hardly vary must not get weights that a training could not keep.
    least = LEAST_DEVIATION * deviation.square().mean().sqrt()
    deviation = deviation.clamp(min=float(least.clamp(min=1e-6)))
    scaled = Samples(
        (samples.features - mean) / deviation,
        samples.targets,
        samples.weights,
        samples.cases,
        samples.regions,
    )

    def forward(head: Linear) -> Linear:
        return Linear(head.weight * deviation, head.bias + head.weight @ mean)

    def back(head: Linear) -> Linear:
        weight = head.weight / deviation
        return Linear(weight, head.bias - weight @ mean)

    return scaled, forward, back


def _logistic(samples: Samples, first: Linear, free: Tensor, strength: float) -> Linear:
    """Logistic regression, regularised towards ``first``."""
    rows = free.nonzero()[:, 0]
    change = [torch.zeros_like(part[free]).requires_grad_() for part in first]

    def head() -> Linear:
        return Linear(*(x.index_add(0, rows, y) for x, y in zip(first, change, strict=True)))

    optimizer = torch.optim.LBFGS(
        change, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = samples.loss(head()(samples.features)) + strength / 2 * change[0].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Linear(*(part.detach() for part in head()))


def _ridge(samples: Samples, held_out: Samples, strength: float) -> Linear:
    """Ridge regression to 0 and 1 in closed form, scaled to logits by the loss on other voxels."""
    share = samples.weights / samples.weights.sum()
    mean, middle = share @ samples.features, share @ samples.targets
    centred = (samples.features - mean).double()
    squares = centred.T @ (share[:, None] * centred)
    squares += strength * torch.eye(len(squares), dtype=squares.dtype)
    products = centred.T @ (share[:, None] * (samples.targets - middle)).double()
    weight = torch.linalg.solve(squares, products).T.float()
    # A region is found where its score is above one half.
    bias = middle - weight @ mean - (0.5 if samples.regions else 0.0)
    heads = [Linear(scale * weight, scale * bias) for scale in SCALES]
    return min(heads, key=lambda head: float(held_out.loss(head(held_out.features))))
