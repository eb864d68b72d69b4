"""Options of training that users set in the environment, as nnU-Net has its own.

OPTIONS is the table of all: the trainers apply them, ``stunet doctor`` and the documentation list
them. An option that is not set changes nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.utils.files import HOME


@dataclass(frozen=True)
class Option:
    """An environment variable: a number within bounds, one of a few words, or a folder."""

    variable: str
    meaning: str
    minimum: float = 0
    maximum: float = math.inf
    whole: bool = True
    words: tuple[str, ...] = ()
    folder: bool = False

    def parse(self, text: str) -> float | str:
        """Return the value; raise if it is not allowed."""
        if text in self.words or self.folder:
            return text
        try:
            value = int(text) if self.whole else float(text)
        except (ValueError, OverflowError):
            value = math.nan
        if self.words or not self.minimum <= value <= self.maximum:
            given, wanted = f"{self.variable}={text!r}", f"{self.allowed} ({self.meaning})"
            raise PluginError(f"{given} must be {wanted}. Change or unset it.")
        return value

    @property
    def allowed(self) -> str:
        """What it may be set to."""
        if self.words:
            return f"one of {', '.join(self.words)}"
        if self.folder:
            return "a folder"
        kind = "an integer" if self.whole else "a number"
        if self.maximum == math.inf:
            return f"{kind} >= {self.minimum:g}"
        return f"{kind} from {self.minimum:.10g} to {self.maximum:.10g}"


def _fraction(variable: str, meaning: str, minimum: float = 0) -> Option:
    return Option(variable, meaning, minimum, 1, whole=False)


def _switch(variable: str, meaning: str) -> Option:
    return Option(variable, meaning, words=("0", "1"))


OPTIONS = (
    EPOCHS := Option("STUNET_EPOCHS", "epochs, instead of the trainer's own number", 1, 10**6),
    ITERATIONS := Option(
        "STUNET_ITERATIONS", "training iterations per epoch (nnU-Net: 250)", 1, 10**6
    ),
    VAL_ITERATIONS := Option(
        "STUNET_VAL_ITERATIONS", "validation iterations per epoch (nnU-Net: 50)", 1, 10**6
    ),
    SEED := Option("STUNET_SEED", "seed of the initial weights; batches stay random", 0, 2**32 - 1),
    WARMUP_EPOCHS := Option(
        "STUNET_WARMUP_EPOCHS", "epochs in which the learning rate rises to the schedule's"
    ),
    FROZEN_ENCODER_EPOCHS := Option(
        "STUNET_FROZEN_ENCODER_EPOCHS", "first epochs in which the encoder is not trained"
    ),
    ENCODER_RATE := _fraction(
        "STUNET_ENCODER_RATE", "learning rate of the encoder as a fraction of the decoder's"
    ),
    HEADS := Option(
        "STUNET_HEADS",
        "first segmentation heads: of the same class in the pretrained model (name), fitted to"
        " sampled voxels (fit), or both (auto; if not set: in trainers _ft)",
        words=("auto", "random", "name", "fit"),
    ),
    MIRRORING := _switch(
        "STUNET_MIRRORING",
        "0: mirror neither in augmentation nor in prediction, for classes told apart by side",
    ),
    SHARD := _switch(
        "STUNET_SHARD", "1: STU-Net's weights, gradients and momentum sharded (FSDP2)"
    ),
    CHECKPOINTING := Option(
        "STUNET_CHECKPOINTING",
        "activation checkpointing of STU-Net, which saves memory",
        words=("off", "stage", "block", "auto"),
    ),
    CPU := Option(
        "STUNET_CPU",
        "what predicts on the CPU; auto: OpenVINO if it is installed",
        words=("auto", "openvino", "torch"),
    ),
    CPU_PRECISION := Option(
        "STUNET_CPU_PRECISION",
        "of OpenVINO; auto: bfloat16 if the processor has it and the first window agrees",
        words=("auto", "float32", "bfloat16"),
    ),
    SHARE_DATA := _switch(
        "STUNET_SHARE_DATA",
        "planners: 1: use the preprocessed data of nnUNetPlans where the spacing is the same",
    ),
    SELF_TRAINING := Option(
        "STUNET_SELF_TRAINING",
        "self-training: what the target's cases are learned by (if not set: plain)",
        words=("plain", "mean-teacher"),
    ),
    VF_CLASSES := Option(
        "STUNET_VF_CLASSES", "Volume Fusion: classes beside the background (published: 4)", 1, 255
    ),
    VF_SCHEME := Option(
        "STUNET_VF_SCHEME",
        "Volume Fusion: 2023 draws overlapping boxes, 2025 tiles",
        words=("2023", "2025"),
    ),
    VF_SMALLEST := _fraction(
        "STUNET_VF_SMALLEST", "Volume Fusion: smallest block, as a fraction of the patch"
    ),
    VF_LARGEST := _fraction(
        "STUNET_VF_LARGEST", "Volume Fusion: largest block, as a fraction of the patch"
    ),
    VF_STANDARDISE := _switch(
        "STUNET_VF_STANDARDISE",
        "Volume Fusion: 1: fused images of mean 0 and deviation 1; 0: from 0 to 1, as published",
    ),
    VF_RATE := _fraction(
        "STUNET_VF_RATE", "Volume Fusion: first learning rate (published: 1e-3)", 1e-9
    ),
    Option(
        HOME, "downloaded models and compiled networks (if not set: ~/.cache/stunet)", folder=True
    ),
)


def table() -> str:
    """Return a line for each option: variable, allowed values, meaning."""
    return "\n".join(f"  {one.variable:<29}{one.allowed}; {one.meaning}" for one in OPTIONS)


class Options:
    """The options that are set, read once; raises if a value or a name is not allowed."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        known = {option.variable: option for option in OPTIONS}
        self._values: dict[Option, float | str] = {}
        for variable in environment:
            if variable.startswith("STUNET_") and variable not in known:
                hint = did_you_mean(variable, known) or f" Options: {', '.join(known)}."
                told = f"{variable} is set, but there is no such option"
                raise PluginError(f"{told}.{hint} Rename or unset it.")
        for variable, option in known.items():
            if text := environment.get(variable, "").strip():
                self._values[option] = option.parse(text)

    def whole(self, option: Option, default: int) -> int:
        return int(self._values.get(option, default))

    def fraction(self, option: Option, default: float) -> float:
        return float(self._values.get(option, default))

    def word(self, option: Option) -> str | None:
        return str(self._values[option]) if option in self._values else None

    def lines(self) -> list[str]:
        """Return a line for each option that is set."""
        return [f"{one.variable}={value}: {one.meaning}" for one, value in self._values.items()]
