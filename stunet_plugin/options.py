"""Training options that users set in the environment, as nnU-Net does with its own (``nnUNet_compile`` and others).

One record per option; the trainers apply them, ``stunet doctor`` and the documentation list them. Published values stay
the default: an option that is not set changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from stunet_plugin.errors import PluginError


@dataclass(frozen=True)
class Option:
    """An environment variable that takes a whole number.

    Attributes:
        variable: its name.
        minimum: smallest allowed value.
        meaning: one line for users.
        trainer_attribute: what it sets on the trainer; None where the trainer handles it otherwise.
    """

    variable: str
    minimum: int
    meaning: str
    trainer_attribute: str | None


OPTIONS = (
    Option("STUNET_EPOCHS", 1, "epochs of the training, instead of the trainer's own number", "num_epochs"),
    Option("STUNET_ITERATIONS", 1, "training iterations per epoch (nnU-Net: 250)", "num_iterations_per_epoch"),
    Option("STUNET_VAL_ITERATIONS", 1, "validation iterations per epoch (nnU-Net: 50)", "num_val_iterations_per_epoch"),
    Option("STUNET_SEED", 0, "seed of the initial weights; the order of the augmented batches stays random", None),
)


def read_options(environment: Mapping[str, str] = os.environ) -> dict[Option, int]:
    """Return the options that are set, with their values.

    Raises:
        PluginError: a value is not a whole number or too small.
    """
    values = {}
    for option in OPTIONS:
        text = environment.get(option.variable, "").strip()
        if not text:
            continue
        try:
            value = int(text)
        except ValueError:
            value = option.minimum - 1
        if value < option.minimum:
            raise PluginError(
                f"{option.variable}={text!r} must be a whole number of at least {option.minimum} ({option.meaning}). "
                f"Set it to one, or unset it."
            )
        values[option] = value
    return values
