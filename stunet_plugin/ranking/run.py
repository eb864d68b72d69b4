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
from stunet_plugin.heads.by_name import Outputs
from stunet_plugin.heads.patches import Patch
from stunet_plugin.heads.regression import held_out_dice
from stunet_plugin.heads.start import SampledFeatures
from stunet_plugin.networks.features import (
    head_modules,
    read_features,
    sample_voxels,
    samples_of_levels,
)
from stunet_plugin.ranking.candidates import Candidate, Plan, find_candidates
from stunet_plugin.ranking.ccfv import MINIMUM_SAMPLES, Gaussian, LevelScore, score_level
from stunet_plugin.ranking.options import FEWEST_CASES, Inputs
from stunet_plugin.ranking.target import class_names, prepared_cases
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.figures import saved_figure
from stunet_plugin.utils.files import write_atomically

if TYPE_CHECKING:
    from stunet_plugin.commands.rank import Rank

BACKGROUND = 0
HEADS = "heads"
"""The score that architectures share; the others depend on the number of channels."""
DEFAULT_LEVELS = 3


@dataclass
class LevelFeatures:
    """What is kept of a level: Gaussians per class, and a mean vector per case."""

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

    @property
    def compared(self) -> dict[int, list[Gaussian]]:
        """Classes that make pairs, in the order of the labels: the published sums depend on it."""
        return {x: y for x, y in sorted(self.classes.items()) if len(y) >= FEWEST_CASES}

    def score(self, options: Rank) -> LevelScore:
        if not self.finite:
            return LevelScore()
        return score_level(self.compared, self.means, options.published_sums)


@dataclass(frozen=True)
class Result:
    """The scores of a candidate, None where it has none. CCFV and its inverse are sums over the
    levels (coarsest first), ``heads`` is the held-out Dice of a fitted head."""

    candidate: Candidate
    levels: tuple[LevelScore, ...]
    heads: float | None
    seconds: float

    @property
    def scores(self) -> dict[str, float | None]:
        return {
            "heads": self.heads,
            "inverse": _sum([level.inverse for level in self.levels]),
            "ccfv": _sum([level.score for level in self.levels]),
        }


def _sum(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return float(sum(known)) if len(known) == len(scores) else None


def run_rank(options: Rank, inputs: Inputs) -> int:
    """Rank, and print the table; return 0. A PluginError (wrong input) comes before any writing."""
    # What nnU-Net and the networks have to say is no part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        results = _rank(options, inputs)
    print(ranking_table(results, options.score))
    if options.json is not None:
        report = json.dumps(_report(options, inputs, results), indent=1)
        write_atomically(Path(options.json), f"{report}\n")
    if options.figure is not None:
        save_ranking(results, options.score, inputs.raw.name, Path(options.figure))
    return 0


def by_architecture(results: Sequence[Result]) -> list[list[str]]:
    """Return the names of the candidates with one architecture, for each architecture."""
    groups: dict[Any, list[str]] = {}
    for result in results:
        groups.setdefault(result.candidate.shapes, []).append(result.candidate.name)
    return list(groups.values())


def _rank(options: Rank, inputs: Inputs) -> list[Result]:
    """Score all candidates and return them, the best first. Progress goes to stderr."""
    device, raw = torch.device(choose_device(options.device)), inputs.raw
    plan = None if inputs.plans is None else Plan(inputs.plans, options.configuration)
    if plan is not None:
        plan.check(f"-p {options.plans}")
    candidates = find_candidates(inputs.candidates, plan)
    for candidate in candidates:
        expected = len(candidate.plan.chosen.normalization_schemes)
        if expected != len(raw.channels):
            raise PluginError(
                f"{raw.name} has {len(raw.channels)} channel(s), the plan {candidate.plan.name} is"
                f" for {expected}. Give the dataset's own plans: -p PLANS"
            )
    fewest = min(candidates, key=lambda candidate: candidate.levels)
    levels = options.levels or min(DEFAULT_LEVELS, fewest.levels)
    if levels > fewest.levels:
        raise PluginError(f"--levels must be 1 to {fewest.levels} for {fewest.name}, not {levels}.")
    cases = f"{len(inputs.cases)} of {len(raw.cases)} cases"
    print(f"{raw.name}: {cases}, {len(candidates)} candidates, {levels} levels", flush=True)
    results = []
    for candidate in candidates:
        result = _score(candidate, inputs, levels, options, device)
        results.append(result)
        score = result.scores[options.score]
        print(f"  {candidate.name}: {_number(score)} ({result.seconds:.0f} s)", flush=True)

    def place(result: Result) -> float:
        score = result.scores[options.score]
        return np.inf if score is None else -score

    # Without a score last; equal ones as they were given.
    return sorted(results, key=place)


def _score(
    candidate: Candidate, inputs: Inputs, levels: int, options: Rank, device: torch.device
) -> Result:
    """Run the network over the cases, one in memory at a time."""
    started = time.monotonic()
    network = candidate.build(len(inputs.raw.channels), options.seed).to(device)
    collected = [LevelFeatures() for _ in range(levels)]
    patch, step = candidate.plan.chosen.patch_size, options.step_size
    labels, heads = list(class_names(inputs.raw)), head_modules(network)[-levels:]
    description = inputs.raw.description
    finest = SampledFeatures(Outputs.of(description, f"of {inputs.raw.name}"), labels)
    for number, (case, image, segmentation) in enumerate(prepared_cases(inputs, candidate.plan)):
        voxels = sample_voxels(segmentation, labels, case, options.seed)
        if set(voxels) - {BACKGROUND}:
            features = read_features(network, image, voxels, patch, step, heads)
            for level, of_case in zip(collected, features, strict=True):
                level.add(of_case)
            finest.add(Patch(case, number, image, segmentation), features[-1:])
    if all(level.finite for level in collected) and not collected[-1].compared:
        raise PluginError(
            f"No class has {MINIMUM_SAMPLES} voxels in two of the cases {', '.join(inputs.cases)},"
            " so nothing can be compared. Take more cases (--cases), or others (--seed)."
        )
    scores = tuple(level.score(options) for level in collected)
    dice = held_out_dice(finest.of_level(0, options.seed)) if finest.finite else None
    return Result(candidate, scores, dice, time.monotonic() - started)


def ranking_table(results: Sequence[Result], by: str) -> str:
    """Return the ranking by a score, the best first, as aligned text: that score, the others, name;
    and which can be compared."""
    order = [by, *(name for name in results[0].scores if name != by)]
    names = "  ".join(f"{name:>8}" for name in order)
    lines = [f"{'rank':>4}  {names}  weights"]
    for rank, result in enumerate(results, start=1):
        place = "-" if result.scores[by] is None else str(rank)
        cells = "  ".join(f"{_number(result.scores[name]):>8}" for name in order)
        lines.append(f"{place:>4}  {cells}  {result.candidate.name}")
    if any(None in result.scores.values() for result in results):
        lines.append("n/a: features that do not vary, or are not finite (broken weights).")
    if by != HEADS and len(alike := by_architecture(results)) > 1:
        groups = " | ".join(", ".join(names) for names in alike)
        lines.append(f"These are {len(alike)} architectures; compare within each: {groups}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def save_ranking(results: Sequence[Result], by: str, dataset: str, path: Path) -> None:
    """Write a PNG with a bar per candidate, the best on top."""
    scores = [result.scores[by] for result in results]
    known = [score for score in scores if score is not None] or [0.0]
    # Differences matter, the zero does not: bars begin below the lowest.
    reach = (max(known) - min(known)) or 1.0
    floor = min(known) - 0.15 * reach
    with saved_figure(path, 8, 1.2 + 0.4 * len(results)) as figure:
        axis = figure.subplots()
        widths = [0.0 if score is None else score - floor for score in scores]
        bars = axis.barh([x.candidate.name for x in results], widths, left=floor, color="tab:blue")
        axis.bar_label(bars, [_number(score) for score in scores], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.set_xlim(floor, floor + 1.25 * reach)
        axis.set(xlabel=f"{by} (higher ranks better)", title=f"Pretrained weights for {dataset}")
        axis.spines[["top", "right"]].set_visible(False)


def _report(options: Rank, inputs: Inputs, results: Sequence[Result]) -> dict[str, Any]:
    left_out = ("json", "figure", "weights", "names")
    names = class_names(inputs.raw)
    return {
        "method": "CCFV, arXiv:2307.11958, its inverse, and the Dice of fitted heads",
        "dataset": inputs.raw.name,
        "cases": list(inputs.cases),
        "samples": samples_of_levels(len(results[0].levels)),
        "options": {key: x for key, x in asdict(options).items() if key not in left_out},
        "by_architecture": by_architecture(results),
        "candidates": [
            {
                "rank": None if result.scores[options.score] is None else rank,
                "name": result.candidate.name,
                "score": result.scores[options.score],
                "scores": result.scores,
                "file": None if (file := result.candidate.file) is None else str(file.absolute()),
                "trainer": result.candidate.trainer,
                "plan": result.candidate.plan.name,
                "levels": [_level_report(level, names) for level in result.levels],
                "seconds": round(result.seconds, 1),
            }
            for rank, result in enumerate(results, start=1)
        ],
    }


def _level_report(level: LevelScore, names: Mapping[int, str]) -> dict[str, Any]:
    distances = {names[label]: x for label, x in level.class_distances.items()}
    return {**asdict(level), "class_distances": distances}
