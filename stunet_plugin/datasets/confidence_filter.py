"""Which parts of a prediction to trust: by confidence per voxel, by mean confidence and by volume
per class and case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stunet_plugin.datasets.label_systems import LabelSystem, canonical_name
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Prediction


@dataclass(frozen=True)
class Rule:
    """When a class of a case is trusted; None asks for nothing.

    Attributes:
        min_confidence: the least mean confidence over its voxels, from 0 to 1.
        min_mm3, max_mm3: its volume.
    """

    min_confidence: float | None = None
    min_mm3: float | None = None
    max_mm3: float | None = None

    def objections(self, confidence: float | None, volume: float) -> list[str]:
        """Say what speaks against a class (confidence None: it is not predicted at all)."""
        found = []
        if (
            self.min_confidence is not None
            and confidence is not None
            and confidence < self.min_confidence
        ):
            found.append(f"mean confidence {confidence:.3f} below {self.min_confidence:g}")
        if self.min_mm3 is not None and volume < self.min_mm3:
            found.append(f"{volume:.0f} mm3, less than {self.min_mm3:g}")
        if self.max_mm3 is not None and volume > self.max_mm3:
            found.append(f"{volume:.0f} mm3, more than {self.max_mm3:g}")
        return found


@dataclass(frozen=True)
class Verdict:
    """What becomes of a case.

    Attributes:
        labels: (z, y, x), with the ignore label where the prediction is not trusted; None if the
            case is left out.
        reason: why it is left out, else empty.
        classes: name to voxels, volume in mm3, mean confidence, objections.
        ignored: share of the voxels that became ignore.
    """

    labels: np.ndarray | None
    reason: str
    classes: dict[str, dict[str, Any]]
    ignored: float


@dataclass(frozen=True)
class Trust:
    """The rules for a data set.

    Attributes:
        system: label system of the model.
        ignore: the ignore label's value.
        ignore_below: least confidence of a voxel, None asks for none.
        rules: canonical class name to its rule.
        drop_cases: leave out a case of which a class is not trusted, instead of ignoring the class
            there.
    """

    system: LabelSystem
    ignore: int
    ignore_below: float | None = None
    rules: Mapping[str, Rule] = field(default_factory=dict)
    drop_cases: bool = False

    @property
    def may_ignore(self) -> bool:
        return self.ignore_below is not None or (bool(self.rules) and not self.drop_cases)

    def to_json(self) -> dict[str, Any]:
        rules = {name: asdict(rule) for name, rule in self.rules.items()}
        return {"ignore_below": self.ignore_below, "rules": rules, "drop_cases": self.drop_cases}

    def judge(self, prediction: Prediction) -> Verdict:
        """Apply the rules; sizes and mean confidences are those of the whole prediction, doubtful
        voxels included."""
        labels, confidence = prediction.labels, prediction.confidence
        doubtful = (
            np.zeros(labels.shape, bool)
            if self.ignore_below is None
            else confidence < self.ignore_below
        )
        classes: dict[str, dict[str, Any]] = {}
        reasons = []
        for name in self.system.classes:
            mask = self.system.mask(labels, name)
            voxels = int(mask.sum())
            mean = float(confidence[mask].mean(dtype=np.float64)) if voxels else None
            volume = voxels * prediction.voxel_mm3
            objections = self.rules.get(name, Rule()).objections(mean, volume)
            classes[name] = {
                "voxels": voxels,
                "mm3": round(volume, 3),
                "confidence": mean,
                "objections": objections,
            }
            # What is not predicted cannot be marked: it may be anywhere in the background.
            if objections and (self.drop_cases or not voxels):
                reasons += [f"{name}: {objection}" for objection in objections]
            elif objections:
                doubtful |= mask
        if reasons:
            return Verdict(None, "; ".join(reasons), classes, 0.0)
        return Verdict(
            np.where(doubtful, labels.dtype.type(self.ignore), labels),
            "",
            classes,
            float(doubtful.mean()),
        )


def parse_rules(
    system: LabelSystem, confidences: Sequence[str], sizes: Sequence[str]
) -> dict[str, Rule]:
    """Return the rule of each class that has one.

    Args:
        system: the classes that there are.
        confidences: each ``P`` (for all classes) or ``CLASS=P``.
        sizes: each ``CLASS=MIN:MAX`` in mm3, of which one may be empty.

    Raises:
        PluginError: an unknown class, or no such number.
    """
    fields: dict[str, dict[str, float | None]] = {}
    for text in sorted(confidences, key=lambda text: "=" in text):
        name, separator, number = text.rpartition("=")
        for known in [_known(system, name, text)] if separator else system.classes:
            fields.setdefault(known, {})["min_confidence"] = probability(number, "--min-confidence")
    for text in sizes:
        name, separator, reach = text.rpartition("=")
        low, colon, high = reach.partition(":")
        if not separator or not colon:
            raise PluginError(
                f"--size must be CLASS=MIN:MAX (mm3, one of them may be left out), not {text!r}."
            )
        least, most = (_volume(end, text) for end in (low, high))
        if least is not None and most is not None and least > most:
            raise PluginError(f"--size {text}: the least volume is larger than the most.")
        fields.setdefault(_known(system, name, text), {}).update(min_mm3=least, max_mm3=most)
    return {name: Rule(**given) for name, given in fields.items()}


def probability(text: str, option: str) -> float:
    """Return a number from 0 to 1; raise PluginError if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise PluginError(f"{option} must be a number from 0 to 1, not {text!r}.")
    return value


def _volume(text: str, whole: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise PluginError(f"--size {whole}: {text!r} is no volume in mm3.")
    return value


def _known(system: LabelSystem, name: str, where: str) -> str:
    known = canonical_name(name)
    if known not in system.classes:
        raise PluginError(
            f"{where}: the model has no class {name!r}. Its classes: {', '.join(system.classes)}."
        )
    return known
