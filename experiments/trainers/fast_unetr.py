"""Trainers of UNETR for short trainings: a rate of 0.001, as the published one is for thousands of
epochs.

For ``nnUNet_extTrainer=experiments/trainers``; no part of the package.
"""

from __future__ import annotations

from stunet_plugin.trainers.unetr_trainers import TRAINERS as PUBLISHED

TRAINERS = {
    f"{name}_Fast": type(
        f"{name}_Fast", (trainer,), {"learning_rate": 1e-3, "__module__": __name__}
    )
    for name, trainer in PUBLISHED.items()
}
globals().update(TRAINERS)
