"""Domains of a dataset's cases: the source has labels, the target a model's predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError

PSEUDO_LABELLED = "pseudo_labelled"
"""Entry of dataset.json: what the names of cases begin with whose labels a model predicted."""
MERGE = (
    "Make one: `stunet pseudo-label TEACHER -i IMAGES -d 910`, then `stunet merge-datasets LABELLED"
    " 910 -d 920 --train-only 910` (docs/datasets.md)."
)
TEACHERS_PLANS = "stunet plan-like TEACHER -d ID"
INTENSITIES = "foreground_intensity_properties_per_channel"


@dataclass(frozen=True)
class Domains:
    """Which cases are of the target, by the beginnings of their names."""

    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Mapping[str, Any]) -> Domains:
        """Return those of a dataset.json; raise PluginError if it has no case of a target."""
        given = dataset.get(PSEUDO_LABELLED)
        if not isinstance(given, (list, tuple)) or not all(isinstance(x, str) for x in given):
            given = ()
        if not any(given):
            raise PluginError(
                "Self-training needs a dataset that holds labelled cases of a source and"
                f" pseudo-labelled ones of a target; this one has no target. {MERGE}"
            )
        return cls(tuple(given))

    def is_target(self, case: str) -> bool:
        return case.startswith(self.prefixes)

    def balanced(self, cases: Sequence[str]) -> list[str]:
        """Return the cases with those of the smaller domain repeated, so that of samples drawn
        from them half are of either; raise PluginError if a domain has none."""
        target = [case for case in cases if self.is_target(case)]
        source = [case for case in cases if not self.is_target(case)]
        for name, found in (("source", source), ("target", target)):
            if not found:
                raise PluginError(
                    f"None of the {len(cases)} training cases of the fold is of the {name}"
                    " (`stunet merge-datasets` leaves a scan out of the folds that validate on it"
                    f" under another name). {MERGE}"
                )
        most = max(len(source), len(target))
        return [x for part in (source, target) for x in (part * math.ceil(most / len(part)))[:most]]


def check_teacher(
    teacher: Mapping[str, Any], plans: Mapping[str, Any], configuration: Mapping[str, Any]
) -> None:
    """Raise a PluginError if the teacher saw its images in another way than the plan prepares them.

    Args:
        teacher: checkpoint of the model that training starts from.
        plans: of the training; ``configuration`` is the chosen one, inheritance resolved.
    """
    arguments = teacher.get("init_args")
    if not isinstance(arguments, Mapping) or "plans" not in arguments:
        raise PluginError(
            "-pretrained_weights: the checkpoint does not say by which plans it was trained, so the"
            " images cannot be prepared as the teacher knows them. Give a trained model of nnU-Net."
        )
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    theirs = arguments["plans"]
    other = PlansManager(theirs).get_configuration(arguments["configuration"]).configuration
    differing = [
        f"{key} is {_shown(here.get(key))}, of the teacher {_shown(there.get(key))}"
        for here, there, keys in (
            (configuration, other, ("patch_size", "spacing", "normalization_schemes")),
            (plans, theirs, ("transpose_forward", "image_reader_writer")),
        )
        for key in keys
        if not _alike(here.get(key), there.get(key))
    ]
    schemes = enumerate(configuration.get("normalization_schemes", ()))
    for channel in [str(number) for number, scheme in schemes if scheme == "CTNormalization"]:
        both = [x.get(INTENSITIES, {}).get(channel, {}) for x in (plans, theirs)]
        values = [[one.get(key, 0.0) for key in ("mean", "std")] for one in both]
        if not _alike(*values):
            differing.append(f"CT is normalised by {values[0]}, of the teacher by {values[1]}")
    if differing:
        raise PluginError(
            f"The teacher was trained by another plan: {'; '.join(differing)}. Its labels and its"
            f" features are those of its own plan: {TEACHERS_PLANS}, then preprocess and train with"
            " the plans that this writes."
        )


def _alike(one: Any, other: Any) -> bool:
    mine, theirs = np.asarray(one), np.asarray(other)
    if mine.dtype.kind in "iuf" and theirs.dtype.kind in "iuf":
        return mine.shape == theirs.shape and bool(np.allclose(mine, theirs, rtol=1e-3))
    return bool(one == other)


def _shown(value: Any) -> str:
    return ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in np.atleast_1d(value))
