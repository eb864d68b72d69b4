"""Training options that users set in the environment, as nnU-Net does with its own
(``nnUNet_compile`` and others).

One record per option; the trainers apply them, ``stunet doctor`` and the documentation list them.
Published values stay
the default: an option that is not set changes nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.networks.checkpointing_settings import AUTO, SETTINGS


@dataclass(frozen=True)
class Option:
    """An environment variable that takes a number, or one of a few words.

    Attributes:
        variable: its name.
        meaning: one line for users.
        minimum, maximum: smallest and largest allowed value.
        whole: whole numbers only.
        choices: the allowed values, where only some are.
        words: the allowed words, where it takes no number; its value is the place among them.
    """

    variable: str
    meaning: str
    minimum: float = 0
    maximum: float = math.inf
    whole: bool = True
    choices: tuple[int, ...] = ()
    words: tuple[str, ...] = ()

    def parse(self, text: str) -> float:
        """Return the value.

        Raises:
            PluginError: it is not a number, or out of range, or not one of the words.
        """
        try:
            value = (
                self.words.index(text) if self.words else int(text) if self.whole else float(text)
            )
        except (ValueError, OverflowError):
            value = math.nan
        if not self.minimum <= value <= self.maximum or (
            self.choices and value not in self.choices
        ):
            raise PluginError(
                f"{self.variable}={text!r} must be {self._allowed()} ({self.meaning}). Set it to"
                " one, or unset it."
            )
        return value

    def show(self, value: float) -> str:
        """Return a value as a user writes it."""
        return self.words[int(value)] if self.words else f"{value:g}"

    def _allowed(self) -> str:
        if self.choices or self.words:
            return f"one of {', '.join(map(str, self.choices or self.words))}"
        reach = (
            f"of at least {self.minimum:g}"
            if self.maximum == math.inf
            else f"from {self.minimum:g} to {self.maximum:g}"
        )
        return f"{'a whole number' if self.whole else 'a number'} {reach}"


EPOCHS = Option(
    "STUNET_EPOCHS", "epochs of the training, instead of the trainer's own number", 1, 1_000_000
)
ITERATIONS = Option(
    "STUNET_ITERATIONS", "training iterations per epoch (nnU-Net: 250)", 1, 1_000_000
)
VAL_ITERATIONS = Option(
    "STUNET_VAL_ITERATIONS", "validation iterations per epoch (nnU-Net: 50)", 1, 1_000_000
)
SEED = Option(
    "STUNET_SEED",
    "seed of the initial weights; the order of the augmented batches stays random",
    0,
    2**32 - 1,
)
WARMUP_EPOCHS = Option(
    "STUNET_WARMUP_EPOCHS",
    "epochs over which the learning rate rises linearly to the schedule's",
    0,
)
FROZEN_ENCODER_EPOCHS = Option(
    "STUNET_FROZEN_ENCODER_EPOCHS",
    "first epochs in which the encoder's weights stay as they are",
    0,
)
ENCODER_RATE = Option(
    "STUNET_ENCODER_RATE",
    "learning rate of the encoder as a fraction of the decoder's",
    0.0,
    1.0,
    whole=False,
)
MIRRORING = Option(
    "STUNET_MIRRORING",
    "0: mirror neither in augmentation nor in prediction, for classes told apart by side",
    0,
    1,
)
SHARD = Option(
    "STUNET_SHARD",
    "1: share weights, gradients and momentum of an STU-Net out over the processes (FSDP2)",
    0,
    1,
)
CHECKPOINTING = Option(
    "STUNET_CHECKPOINTING",
    "what of an STU-Net's activations is computed again to save memory",
    words=(*SETTINGS, AUTO),
)

# Of the VolumeFusionTrainers.
VF_CLASSES = Option(
    "STUNET_VF_CLASSES", "fusion classes K beside the background (published: 4)", 1, 255
)
VF_SCHEME = Option(
    "STUNET_VF_SCHEME",
    "how blocks are drawn: 2023 overlapping boxes, 2025 tiles",
    0,
    choices=(2023, 2025),
)
VF_SMALLEST = Option(
    "STUNET_VF_SMALLEST",
    "smallest block, as a fraction of each axis of the patch",
    0,
    1,
    whole=False,
)
VF_LARGEST = Option(
    "STUNET_VF_LARGEST", "largest block, as a fraction of each axis of the patch", 0, 1, whole=False
)
VF_STANDARDISE = Option(
    "STUNET_VF_STANDARDISE",
    "1: fused images of mean 0 and deviation 1; 0: from 0 to 1, as published",
    0,
    1,
)
VF_RATE = Option(
    "STUNET_VF_RATE",
    "learning rate of pretraining at the start (published: 1e-3)",
    1e-9,
    1,
    whole=False,
)

OPTIONS = (
    *(
        EPOCHS,
        ITERATIONS,
        VAL_ITERATIONS,
        SEED,
        WARMUP_EPOCHS,
        FROZEN_ENCODER_EPOCHS,
        ENCODER_RATE,
        MIRRORING,
    ),
    *(SHARD, CHECKPOINTING),
    *(VF_CLASSES, VF_SCHEME, VF_SMALLEST, VF_LARGEST, VF_STANDARDISE, VF_RATE),
)


class Options:
    """The options that are set, read once.

    Raises:
        PluginError: a value is not allowed.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        known = [option.variable for option in OPTIONS]
        for variable in environment:
            if variable.startswith("STUNET_") and variable not in known:
                hint = did_you_mean(variable, known) or f" Options: {', '.join(known)}."
                raise PluginError(
                    f"{variable} is set, but there is no such option.{hint} Unset it."
                )
        texts = {option: environment.get(option.variable, "").strip() for option in OPTIONS}
        self._values = {option: option.parse(text) for option, text in texts.items() if text}

    def whole(self, option: Option, default: int) -> int:
        """Return the value of an option for whole numbers, or the default."""
        return int(self._values.get(option, default))

    def fraction(self, option: Option, default: float) -> float:
        """Return the value of an option, or the default."""
        return self._values.get(option, default)

    def word(self, option: Option) -> str | None:
        """Return the word that an option is set to, or None."""
        return option.show(self._values[option]) if option in self._values else None

    def lines(self) -> list[str]:
        """Return a line for each option that is set."""
        return [
            f"{option.variable}={option.show(value)}: {option.meaning}"
            for option, value in self._values.items()
        ]
