"""UNETRTrainer and UNETRTrainer_STP, with ``_tiny`` and ``_small``: a vision transformer that keeps
all tokens, or prunes and reassembles them (arXiv:2303.06522)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from stunet_plugin.networks.presets import UNETR_PRESETS, UNETRPreset
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.map_pictures import MapPictures


class UNETRBase(PluginTrainer):
    """Base of the trainers of all sizes: AdamW as published, at the published rate for a batch of
    two; nnU-Net's schedule."""

    preset: ClassVar[UNETRPreset]
    learning_rate = 1.3e-4

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        self.weight_decay = 0.05
        parts = []
        for group in groups:
            # As published, biases and the weights of norms do not decay.
            matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
            others = [parameter for parameter in group["params"] if parameter.ndim <= 1]
            parts.append({**group, "params": matrices})
            parts.append({**group, "params": others, "weight_decay": 0.0})
        return torch.optim.AdamW(
            parts, self.initial_lr, betas=(0.9, 0.95), weight_decay=self.weight_decay
        )


def _make_trainer(preset: UNETRPreset) -> type[UNETRBase]:
    kept = "all tokens kept" if preset.ratio is None else "tokens pruned and reassembled (STP, MTA)"
    attributes = {
        "__doc__": f"UNETR {preset.size}, {kept}.",
        "__module__": __name__,
        "preset": preset,
    }
    bases = (UNETRBase,) if preset.ratio is None else (MapPictures, UNETRBase)
    return type(f"UNETRTrainer{preset.suffix}", bases, attributes)


TRAINERS = {trainer.__name__: trainer for trainer in map(_make_trainer, UNETR_PRESETS)}
globals().update(TRAINERS)
