"""Loss of SAM-Med2D: focal, Dice, and the square of how wrong the predicted IoU is.

Weights and terms as published (github.com/OpenGVLab/SAM-Med2D). Its Dice and IoU are over all
pixels of a batch at once, so that every mask is told the batch's IoU; ``per_mask`` takes them mask
by mask, the same for one mask. The IoU that is to be predicted gets no gradient, as in SAM.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.networks.sammed2d import Masks
from stunet_plugin.sam.prompts import IGNORED

FOCAL_WEIGHT, ALPHA, GAMMA = 20.0, 0.25, 2.0
TINY = 1e-12


class SAMLoss(nn.Module):
    """Loss of the best of three masks by predicted IoU. ``latest``: what the last call was given,
    and ``found`` which pixels it took for the object, for the next prompts."""

    latest: Masks
    found: Tensor

    def __init__(self, per_mask: bool = True) -> None:
        super().__init__()
        self.per_mask = per_mask

    def forward(self, masks: Masks, targets: Tensor) -> Tensor:
        """``targets`` (N, 1, size, size): 1 object, 0 the rest, IGNORED."""
        logits, iou = masks.best()
        whole = functional.interpolate(
            logits.float(), targets.shape[2:], mode="bilinear", align_corners=False
        )
        self.latest, self.found = masks, whole.detach() > 0
        return torch.stack(self.terms(whole, targets, iou.float())).sum()

    def terms(self, logits: Tensor, targets: Tensor, iou: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted terms: focal, Dice, IoU."""
        known = targets != IGNORED
        truth = (targets == 1).to(logits.dtype)
        chance = torch.sigmoid(logits) * known
        right = torch.where(truth == 1, chance, 1 - chance)
        weight = torch.where(truth == 1, ALPHA, 1 - ALPHA)
        focal = -weight * (1 - right) ** GAMMA * torch.log(right + TINY)
        focal = focal.sum() / known.sum().clamp(min=1)
        dims = (1, 2, 3) if self.per_mask else (0, 1, 2, 3)
        both, sizes = (chance * truth).sum(dims), (chance + truth).sum(dims)
        dice = 1 - (2 * both + 1) / (sizes + 1)
        real = both / (sizes - both).clamp(min=TINY)
        wrong = iou - real.detach()[..., None]
        return FOCAL_WEIGHT * focal, dice.mean(), wrong.square().mean()
