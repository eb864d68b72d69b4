"""Loss of self-training: nnU-Net's on labels, and what the target's samples add to it.

Mean teacher: arXiv:1703.01780. GeNRT: arXiv:2303.05734, see :mod:`.class_models`; weights and ramp
are the published ones, on sampled voxels instead of images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.self_training.class_models import ClassModels, sample_voxels

CONSISTENCY = 10.0
"""Weight of the mean teacher's consistency: the squared difference of probabilities, summed over
classes, has about a tenth of the gradient of cross-entropy."""
GDC, MIXED = 0.5, 1.0
"""Weights of GeNRT's consistency of both classifiers, and of mixed features (D-CFA)."""
BETA = 0.1
"""Of the Beta distribution that features are mixed by."""
CONFIDENT = 0.8
"""Least probability by which the teacher labels a voxel for the class models."""
SAMPLES = 256
"""Voxels per class and domain in a step."""
START, RAMP = 0.1, 0.3
"""Parts of a training: class models are only fitted until the first, and all additions have their
whole weight from the second on."""


@dataclass(frozen=True)
class Arm:
    """What the target's samples are learned by: labels of a teacher that learns too, instead of the
    dataset's; class models."""

    teacher: bool
    models: bool


ARMS = {
    "plain": Arm(teacher=False, models=False),
    "mean-teacher": Arm(teacher=True, models=False),
    "genrt": Arm(teacher=False, models=True),
    "both": Arm(teacher=True, models=True),
}


@dataclass(frozen=True)
class Step:
    """A training step: which samples are of the target (sample,), how far the training is (0 to 1),
    and the teacher's probabilities (target sample, class, *spatial)."""

    target: Tensor
    progress: float
    teacher: Tensor | None = None

    @property
    def ramp(self) -> float:
        return math.exp(-5 * (1 - min(self.progress / RAMP, 1)) ** 2)


class SelfTrainingLoss(nn.Module):
    """nnU-Net's loss ``supervised``, plus what an arm adds in a training step.

    Args:
        ignore: label value that ``supervised`` leaves out.
        head: last convolution of the network; its input is what the models are of.
        models: None for the arms without.
    """

    step: Step | None = None
    """Of the batch that comes next; None in validation."""

    def __init__(
        self, supervised: nn.Module, ignore: int, head: Any, models: ClassModels | None
    ) -> None:
        super().__init__()
        self.supervised, self.ignore, self.models = supervised, ignore, models
        self._head = [head]  # not a part of this module
        self._features: Tensor | None = None
        self.left_out: list[Tensor] = []
        if models is not None:
            head.register_forward_pre_hook(self._note_features)

    @property
    def weight_factors(self) -> Any:
        """Weights of the outputs, as of nnU-Net's wrapper."""
        return self.supervised.weight_factors

    def _note_features(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._features = given[0]

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of outputs (sample, class, *spatial) and targets (sample, 1, *spatial),
        lists of them with deep supervision."""
        step, models = self.step, self.models
        supervised: Tensor
        if step is None or (models is None and step.teacher is None):
            supervised = self.supervised(outputs, targets)
            return supervised
        listed = isinstance(outputs, (list, tuple))
        logits, label = (outputs[0], targets[0]) if listed else (outputs, targets)
        labels = label[:, 0].long()
        kept = torch.ones_like(labels[step.target], dtype=torch.bool)
        added = logits.new_zeros((), dtype=torch.float32)
        with torch.autocast(logits.device.type, enabled=False):
            if step.teacher is not None:
                confidence, found = step.teacher.max(1)
                found = torch.where(confidence >= CONFIDENT, found, self.ignore)
                labels = labels.index_put((step.target.nonzero()[:, 0],), found)
            if models is not None:
                kept, added = self._generative(logits.float(), labels, models, step)
            if step.teacher is not None:
                probabilities = logits[step.target].float().softmax(1)
                apart = (probabilities - step.teacher).square().sum(1) * kept
                # A process's batch may have no sample of the target.
                consistency = apart.sum() / max(apart.numel(), 1)
                added = added + CONSISTENCY * step.ramp * consistency
                kept = torch.zeros_like(kept)
        used = [self._left_out(one, kept, step.target) for one in (targets if listed else [label])]
        return self.supervised(outputs, used if listed else used[0]) + added

    def _left_out(self, target: Tensor, kept: Tensor, of: Tensor) -> Tensor:
        """Return a target, of any resolution, with the ignore label where the labels of the
        target's samples are not kept."""
        if not len(kept):
            return target
        size = target.shape[2:]
        there = functional.interpolate(kept[:, None].float(), size=size, mode="nearest-exact") > 0.5
        changed = target.clone()
        changed[of] = torch.where(there, target[of], self.ignore)
        return changed

    def _generative(
        self, logits: Tensor, labels: Tensor, models: ClassModels, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return which voxels of the target's samples both classifiers agree on, and GeNRT's parts
        of the loss; the models take in this step's samples last."""
        assert self._features is not None
        features = self._features.float().movedim(1, -1)
        self._features = None
        classes, of_target = logits.shape[1], labels[step.target]
        seen = features[step.target].detach()
        kept = torch.ones_like(of_target, dtype=torch.bool)
        added = logits.new_zeros(())
        ready = step.progress >= START and bool(models.known.any())
        if ready and len(seen):
            found = models.classify(seen.flatten(0, -2)).view_as(of_target)
            known = models.known[of_target.clamp(0, classes - 1)]
            is_class = (of_target >= 0) & (of_target < classes)
            kept = ~(is_class & known) | (found == of_target)
            self.left_out.append(1 - kept[is_class].float().mean().nan_to_num(1.0))
        for domain in (step.target, ~step.target):
            values = labels[domain]
            if domain is step.target:
                values = torch.where(kept, values, self.ignore)
            values = values.flatten()
            drawn = sample_voxels(values, classes, SAMPLES)
            sampled = features[domain].flatten(0, -2)[drawn]
            chosen, counts = values[drawn], _counts(values, classes)
            if ready and len(drawn):
                weights = (counts / _counts(chosen, classes).clamp(min=1))[chosen]
                weights = weights / weights.sum()
                added = added + MIXED * step.ramp * self._mixed(sampled, chosen, weights, models)
                if domain is step.target:
                    own = logits[domain].movedim(1, -1).flatten(0, -2)[drawn]
                    apart = _disagreement(models.logits(sampled.detach()), own, features.shape[-1])
                    added = added + GDC * step.ramp * (weights * apart).sum()
            if domain is step.target:
                self._fit(seen, labels[domain], models)
        return kept, added

    def _mixed(
        self, features: Tensor, labels: Tensor, weights: Tensor, models: ClassModels
    ) -> Tensor:
        """Return the cross-entropy of features mixed with samples of their class's model."""
        share = torch.distributions.Beta(BETA, BETA).sample(labels.shape).to(features.device)
        share = torch.maximum(share, 1 - share)
        share = torch.where(models.known[labels], share, 1.0)[:, None]
        mixed = share * features + (1 - share) * models.draw(labels)
        head = self._head[0]
        found = functional.linear(mixed, head.weight.float().flatten(1), head.bias)
        return (weights * functional.cross_entropy(found, labels, reduction="none")).sum()

    def _fit(self, features: Tensor, labels: Tensor, models: ClassModels) -> None:
        """Update the models by the target's voxels, as they are labelled: were those left out that
        a model disagrees with, it could never learn that it was wrong."""
        classes, values = len(models.weight), labels.flatten()
        drawn = sample_voxels(values, classes, SAMPLES)
        sampled = features.flatten(0, -2)[drawn]
        models.update(sampled, values[drawn], _counts(values, classes))

    def share_left_out(self) -> float | None:
        """Return the mean share of the target's labelled voxels on which the classifiers disagreed
        since this was last asked; None if there were none."""
        found, self.left_out = self.left_out, []
        return float(torch.stack(found).mean()) if found else None


def _counts(labels: Tensor, classes: int) -> Tensor:
    inside = labels[(labels >= 0) & (labels < classes)]
    return torch.bincount(inside, minlength=classes).float()


def _disagreement(generative: Tensor, logits: Tensor, dimensions: int) -> Tensor:
    """Return the squared differences of both classifiers' probabilities (sample,), 0 where they
    name different classes. The temperature is the number of dimensions: a likelihood's logarithm
    grows with it (published: 100, for 512)."""
    tempered = (generative / dimensions).softmax(1)
    own = logits.softmax(1)
    apart = (tempered - own).square().sum(1)
    return torch.where(tempered.argmax(1) == own.argmax(1), apart, 0.0)


def horizon(steps: int) -> int:
    """Return over how many steps the mean teacher averages in a training of so many."""
    return min(1000, max(10, steps // 10))


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, steps: int) -> None:
    """Move a teacher's weights towards a student's, as a running mean over so many steps."""
    own: list[Tensor] = [*teacher.parameters()]
    given = [x.detach() for x in student.parameters()]
    torch._foreach_lerp_(own, given, 1 / steps)
    for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(theirs)
