"""Ranking of pretrained weights on a labelled dataset with CCFV, without training."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.ranking.candidates import (
    Candidate,
    Plan,
    count_levels,
    find_candidates,
    same_networks,
)
from stunet_plugin.ranking.ccfv import (
    MINIMUM_SAMPLES,
    Definition,
    Gaussian,
    LevelScore,
    score_level,
)
from stunet_plugin.ranking.features import read_features, sample_voxels, samples_of_levels
from stunet_plugin.ranking.figure import save_ranking
from stunet_plugin.ranking.options import FEWEST_CASES, Inputs
from stunet_plugin.ranking.target import Target, check_channels
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.files import write_atomically

if TYPE_CHECKING:
    from stunet_plugin.commands.rank import Rank

BACKGROUND = 0
DEFAULT_LEVELS = 3


@dataclass
class LevelFeatures:
    """What is kept of the features of one level: Gaussians per class, and a mean vector per
    case."""

    classes: dict[int, list[Gaussian]] = field(default_factory=dict)
    means: list[np.ndarray] = field(default_factory=list)
    finite: bool = True

    def add(self, features: Mapping[int, np.ndarray]) -> None:
        """Add a case: label to features (voxel, channel)."""
        everything = np.concatenate(list(features.values())).astype(np.float64)
        if not np.isfinite(everything).all():
            self.finite = False
            return
        # The published code's mean is over the samples of all classes, background included.
        self.means.append(everything.mean(axis=0))
        for label, values in features.items():
            if label != BACKGROUND and len(values) >= MINIMUM_SAMPLES:
                self.classes.setdefault(label, []).append(Gaussian.fit(values))

    def score(self, definition: Definition) -> LevelScore:
        if not self.finite:
            return LevelScore(float("nan"), {}, float("nan"), None)
        # In the order of the labels: the published sums depend on it.
        pairs = sorted(
            (x, cases) for x, cases in self.classes.items() if len(cases) >= FEWEST_CASES
        )
        return score_level(dict(pairs), self.means, definition)


@dataclass(frozen=True)
class Result:
    """The score of a candidate: the sum over its levels (coarsest first), None where a level has
    none."""

    candidate: Candidate
    levels: tuple[LevelScore, ...]
    seconds: float

    @property
    def score(self) -> float | None:
        scores = [level.score for level in self.levels if level.score is not None]
        return float(sum(scores)) if len(scores) == len(self.levels) else None


def run_rank(options: Rank, inputs: Inputs) -> int:
    """Rank, and print the table; return 0.

    Raises:
        PluginError: wrong input; nothing was written.
    """
    # What nnU-Net and the networks have to say is no part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        target, results, alike = _rank(options, inputs)
    print(ranking_table(results, alike))
    if options.json is not None:
        report = json.dumps(_report(options, target, results, alike), indent=1)
        write_atomically(Path(options.json), f"{report}\n")
    if options.figure is not None:
        scores = [(result.candidate.name, result.score) for result in results]
        save_ranking(scores, target.raw.name, Path(options.figure))
    return 0


def _rank(options: Rank, inputs: Inputs) -> tuple[Target, list[Result], list[list[str]]]:
    """Score all candidates; return them with the best first, and their names by architecture.
    Progress goes to stderr."""
    device = torch.device(choose_device(options.device))
    plan = None if inputs.plans is None else Plan(inputs.plans, options.configuration)
    if plan is not None:
        plan.check(f"-p {options.plans}")
    candidates = find_candidates(inputs.candidates, plan)
    check_channels(inputs.raw, [candidate.plan for candidate in candidates])
    levels, alike = (
        count_levels(candidates, options.levels, DEFAULT_LEVELS),
        same_networks(candidates),
    )
    target = Target(inputs.raw, inputs.cases, inputs.preprocessed)
    print(
        f"{target.raw.name}: {len(target.chosen)} of {len(target.raw.cases)} cases,"
        f" {len(candidates)} candidates, {levels} levels",
        flush=True,
    )
    results = []
    for candidate in candidates:
        result = _score(candidate, target, levels, options, device)
        results.append(result)
        print(f"  {candidate.name}: {_number(result.score)} ({result.seconds:.0f} s)", flush=True)
    # Without a score last; equal ones as they were given.
    results.sort(key=lambda x: np.inf if x.score is None else -x.score)
    return target, results, alike


def _score(
    candidate: Candidate, target: Target, levels: int, options: Rank, device: torch.device
) -> Result:
    """Run the network over the cases, one in memory at a time."""
    started = time.monotonic()
    network = candidate.build(len(target.raw.channels), options.seed).to(device)
    collected = [LevelFeatures() for _ in range(levels)]
    patch, step = candidate.plan.chosen.patch_size, options.step_size
    for case, image, segmentation in target.cases(candidate.plan):
        voxels = sample_voxels(segmentation, list(target.labels), case, options.seed)
        if set(voxels) - {BACKGROUND}:
            features = read_features(network, image, voxels, patch, step, levels)
            for level, of_case in zip(collected, features, strict=True):
                level.add(of_case)
    shown = any(len(cases) >= FEWEST_CASES for cases in collected[-1].classes.values())
    if all(level.finite for level in collected) and not shown:
        raise PluginError(
            f"No class has {MINIMUM_SAMPLES} voxels in two of the cases {', '.join(target.chosen)},"
            " so nothing can be compared. Take more cases (--cases), or others (--seed)."
        )
    definition = Definition(options.published_sums, options.variety)
    scores = tuple(level.score(definition) for level in collected)
    return Result(candidate, scores, time.monotonic() - started)


def ranking_table(results: Sequence[Result], alike: Sequence[Sequence[str]]) -> str:
    """Return the ranking as aligned text: score, score per level from coarse to fine, name.

    Args:
        results: the best first.
        alike: names of the candidates with one architecture, for each architecture.
    """
    steps = range(len(results[0].levels))[::-1]
    names = "  ".join(f"{f'level 1/{2**step}':>9}" for step in steps)
    lines = [f"{'rank':>4}  {'CCFV':>8}  {names}  weights"]
    for rank, result in enumerate(results, start=1):
        place = "-" if result.score is None else str(rank)
        cells = "  ".join(f"{_number(level.score):>9}" for level in result.levels)
        lines.append(f"{place:>4}  {_number(result.score):>8}  {cells}  {result.candidate.name}")
    if any(result.score is None for result in results):
        lines.append(
            "n/a: features that do not vary, or are not finite: weights that are broken, or random"
            " behind batch norm."
        )
    if len(alike) > 1:
        groups = " | ".join(", ".join(names) for names in alike)
        lines.append(
            f"These are {len(alike)} architectures, across which scores hardly compare. Compare"
            f" within each: {groups}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _report(
    options: Rank, target: Target, results: Sequence[Result], alike: Sequence[Sequence[str]]
) -> dict[str, Any]:
    left_out = ("json", "figure", "weights", "names")
    return {
        "method": "CCFV, arXiv:2307.11958",
        "dataset": target.raw.name,
        "cases": list(target.chosen),
        "samples": samples_of_levels(len(results[0].levels)),
        "options": {key: x for key, x in asdict(options).items() if key not in left_out},
        "by_architecture": alike,
        "candidates": [
            {
                "rank": None if result.score is None else rank,
                "name": result.candidate.name,
                "score": result.score,
                "file": None if (file := result.candidate.file) is None else str(file.absolute()),
                "trainer": result.candidate.trainer,
                "plan": result.candidate.plan.name,
                "levels": [
                    {
                        "score": level.score,
                        "consistency": _finite(level.consistency),
                        "energy": _finite(level.energy),
                        "class_distances": {
                            target.labels[x]: value for x, value in level.class_distances.items()
                        },
                    }
                    for level in result.levels
                ],
                "seconds": round(result.seconds, 1),
            }
            for rank, result in enumerate(results, start=1)
        ],
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
