"""Loss of self-training: nnU-Net's on labels, and a mean teacher's for the target's samples.

Mean teacher: arXiv:1703.01780.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN, MEAN_TEACHER = "plain", "mean-teacher"
ARMS = (PLAIN, MEAN_TEACHER)
"""What the target's samples are learned by: their pseudo-labels, or a teacher that learns too."""
CONSISTENCY = 10.0
"""Weight of the mean teacher's consistency: the squared difference of probabilities, summed over
classes, has about a tenth of the gradient of cross-entropy."""
RAMP = 0.3
"""Part of a training from which on the consistency has its whole weight."""


@dataclass(frozen=True)
class Step:
    """A training step with a teacher: which samples are of the target (sample,), how far the
    training is (0 to 1), and the teacher's probabilities (target sample, class, *spatial)."""

    target: Tensor
    progress: float
    teacher: Tensor

    @property
    def ramp(self) -> float:
        return math.exp(-5 * (1 - min(self.progress / RAMP, 1)) ** 2)


class SelfTrainingLoss(nn.Module):
    """nnU-Net's loss ``supervised``, which a teacher replaces for the target's samples.

    Args:
        ignore: label value that ``supervised`` leaves out.
    """

    step: Step | None = None
    """Of the batch that comes next; None in validation."""

    def __init__(self, supervised: nn.Module, ignore: int) -> None:
        super().__init__()
        self.supervised, self.ignore = supervised, ignore

    @property
    def weight_factors(self) -> Any:
        """Weights of the outputs, as of nnU-Net's wrapper."""
        return self.supervised.weight_factors

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of outputs (sample, class, *spatial) and targets (sample, 1, *spatial),
        lists of them with deep supervision."""
        step = self.step
        if step is None:
            supervised: Tensor = self.supervised(outputs, targets)
            return supervised
        listed = isinstance(outputs, (list, tuple))
        logits = outputs[0] if listed else outputs
        # A process's batch may have no sample of the target.
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = logits[step.target].float().softmax(1)
            apart = (probabilities - step.teacher).square().sum(1)
            consistency = apart.sum() / max(apart.numel(), 1)
        used = [self._without(step.target, one) for one in (targets if listed else [targets])]
        labelled: Tensor = self.supervised(outputs, used if listed else used[0])
        return labelled + CONSISTENCY * step.ramp * consistency

    def _without(self, samples: Tensor, target: Tensor) -> Tensor:
        """Return a target whose chosen samples are left out."""
        changed = target.clone()
        changed[samples] = self.ignore
        return changed


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
