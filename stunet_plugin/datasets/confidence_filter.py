"""Confidence filter of predictions: by confidence per voxel, by mean confidence and by volume per
class and case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stunet_plugin.datasets.label_systems import LabelSystem, canonical_name
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Prediction


@dataclass(frozen=True)
class Rule:
    """When a class of a case is kept; None asks for nothing.

    Attributes:
        min_confidence: the least mean confidence over its voxels, from 0 to 1.
        min_mm3, max_mm3: its volume.
    """

    min_confidence: float | None = None
    min_mm3: float | None = None
    max_mm3: float | None = None

    def reasons_against(self, confidence: float | None, volume: float) -> list[str]:
        """Return why a class is not kept (confidence None: it is not predicted at all)."""
        found = []
        # Comparisons are such that what is not a number is never confident.
        least = self.min_confidence
        if least is not None and confidence is not None and not confidence >= least:
            found.append(f"mean confidence {confidence:.3f} below {least:g}")
        if self.min_mm3 is not None and not volume >= self.min_mm3:
            found.append(f"{volume:.0f} mm3, less than {self.min_mm3:g}")
        if self.max_mm3 is not None and not volume <= self.max_mm3:
            found.append(f"{volume:.0f} mm3, more than {self.max_mm3:g}")
        return found


@dataclass(frozen=True)
class Decision:
    """What becomes of a case.

    Attributes:
        labels: (z, y, x), with the ignore label where the prediction is not kept; None if the case
            is left out.
        reason: why it is left out, else empty.
        classes: name to voxels, volume in mm3, mean confidence, reasons against it, and voxels that
            are kept.
        ignored: share of the voxels that became ignore.
    """

    labels: np.ndarray | None
    reason: str
    classes: dict[str, dict[str, Any]]
    ignored: float


@dataclass(frozen=True)
class ConfidenceFilter:
    """The rules for a dataset.

    Attributes:
        system: label system of the model.
        ignore: the ignore label's value.
        ignore_below: least confidence of a voxel, None asks for none.
        rules: canonical class name to its rule.
        drop_cases: leave out a case with a class that is not kept, instead of ignoring the class
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

    def decide(self, prediction: Prediction) -> Decision:
        """Apply the rules; sizes and mean confidences are those of the whole prediction, doubtful
        voxels included."""
        labels, confidence = prediction.labels, prediction.confidence
        doubtful = np.zeros(labels.shape, bool)
        if self.ignore_below is not None:
            doubtful = ~(confidence >= self.ignore_below)
        classes: dict[str, dict[str, Any]] = {}
        left_out = []
        masks = {name: self.system.mask(labels, name) for name in self.system.classes}
        for name, mask in masks.items():
            voxels = int(mask.sum())
            mean = float(confidence[mask].mean(dtype=np.float64)) if voxels else None
            volume = voxels * prediction.voxel_mm3
            reasons = self.rules.get(name, Rule()).reasons_against(mean, volume)
            classes[name] = {
                "voxels": voxels,
                "mm3": round(volume, 3),
                "confidence": mean,
                "reasons": reasons,
            }
            # What is not predicted cannot be marked: it may be anywhere in the background.
            if reasons and (self.drop_cases or not voxels):
                left_out += [f"{name}: {reason}" for reason in reasons]
            elif reasons:
                doubtful |= mask
        for name, mask in masks.items():
            classes[name]["kept"] = 0 if left_out else int((mask & ~doubtful).sum())
        if left_out:
            return Decision(None, "; ".join(left_out), classes, 0.0)
        filtered = np.where(doubtful, labels.dtype.type(self.ignore), labels)
        return Decision(filtered, "", classes, float(doubtful.mean()))


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

    def known(name: str, where: str) -> str:
        found = canonical_name(name)
        if found not in system.classes:
            classes = ", ".join(system.classes)
            raise PluginError(f"{where}: the model has no class {name!r}. Its classes: {classes}.")
        return found

    fields: dict[str, dict[str, float | None]] = {}
    for text in sorted(confidences, key=lambda text: "=" in text):
        name, separator, number = text.rpartition("=")
        for one in [known(name, text)] if separator else system.classes:
            fields.setdefault(one, {})["min_confidence"] = probability(number, "--min-confidence")
    for text in sizes:
        name, separator, reach = text.rpartition("=")
        low, colon, high = reach.partition(":")
        if not separator or not colon:
            raise PluginError(
                f"--size must be CLASS=MIN:MAX (mm3, one of them may be left out), not {text!r}."
            )
        wrong = f"--size {text}: {{!r}} is no volume in mm3."
        least, most = (
            _number(end, math.inf, wrong.format(end)) if end.strip() else None
            for end in (low, high)
        )
        if least is not None and most is not None and least > most:
            raise PluginError(f"--size {text}: the least volume is larger than the most.")
        fields.setdefault(known(name, text), {}).update(min_mm3=least, max_mm3=most)
    return {name: Rule(**given) for name, given in fields.items()}


def probability(text: str, option: str) -> float:
    """Return a number from 0 to 1; raise PluginError if it is none."""
    return _number(text, 1.0, f"{option} must be a number from 0 to 1, not {text!r}.")


def _number(text: str, most: float, wrong: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value <= most and math.isfinite(value)):
        raise PluginError(wrong)
    return value
