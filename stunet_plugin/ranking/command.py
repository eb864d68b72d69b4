"""``stunet rank``: scores pretrained weights on a labelled dataset with CCFV, without training, and ranks them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stunet_plugin.datasets.raw_dataset import find_raw, read_raw
from stunet_plugin.devices import choose_device
from stunet_plugin.errors import PluginError
from stunet_plugin.importing.names import PREPROCESSED
from stunet_plugin.importing.plan_readers import read_json
from stunet_plugin.ranking.arguments import DEFAULT_LEVELS
from stunet_plugin.ranking.candidates import Candidate, Plan, count_levels, find_candidates
from stunet_plugin.ranking.ccfv import MINIMUM_SAMPLES, Definition, Gaussian, LevelScore, score_level
from stunet_plugin.ranking.features import read_features, sample_voxels, samples_of_levels
from stunet_plugin.ranking.figure import save_ranking
from stunet_plugin.ranking.target import FEWEST_CASES, Target, check_channels
from stunet_plugin.registration import write_atomically

BACKGROUND = 0


@dataclass(frozen=True)
class RankOptions:
    """What the user asked for; see ``stunet rank --help``."""

    weights: Sequence[str]
    dataset: str
    plans: str | None = None
    configuration: str = "3d_fullres"
    cases: int = 10
    names: Sequence[str] | None = None
    levels: int | None = None
    seed: int = 0
    step_size: float = 0.5
    published_sums: bool = False
    variety: str = "energy"
    device: str = "auto"
    json: str | None = None
    figure: str | None = None

    @classmethod
    def from_arguments(cls, given: argparse.Namespace) -> RankOptions:
        return cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})


@dataclass
class LevelFeatures:
    """What is kept of the features of one level: Gaussians per class, and a mean vector per case."""

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
        # In the order of the labels: the script's sums depend on it.
        scored = {label: self.classes[label] for label in sorted(self.classes) if len(self.classes[label]) >= FEWEST_CASES}
        return score_level(scored, self.means, definition)


@dataclass(frozen=True)
class Result:
    """The score of a candidate: the sum over its levels (coarsest first), None where a level has none."""

    candidate: Candidate
    levels: tuple[LevelScore, ...]
    seconds: float

    @property
    def score(self) -> float | None:
        scores = [level.score for level in self.levels]
        return None if any(score is None for score in scores) else float(sum(score for score in scores if score is not None))


def run_rank(options: RankOptions) -> int:
    """Rank, and print the table; return 0.

    Raises:
        PluginError: wrong input; nothing was written.
    """
    device = torch.device(choose_device(options.device))
    if not 0 < options.step_size <= 1:
        raise PluginError(f"--step-size must be above 0 and at most 1 patch, not {options.step_size:g}.")
    if options.seed < 0:
        raise PluginError(f"--seed must be at least 0, not {options.seed}.")
    for name, file in (("--json", options.json), ("--figure", options.figure)):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise PluginError(f"{name} {file}: there is no folder {Path(file).parent}.")
    raw = read_raw(find_raw(options.dataset))
    preprocessed = _preprocessed(raw.name)
    plan = _target_plan(options, raw.name, preprocessed)
    candidates = find_candidates(list(options.weights), plan)
    check_channels(raw, [candidate.plan for candidate in candidates])
    levels = count_levels(candidates, options.levels, DEFAULT_LEVELS)
    if options.names is None:
        target = Target.draw(raw, options.cases, options.seed, preprocessed)
    else:
        target = Target.of_names(raw, options.names, preprocessed)
    print(f"{raw.name}: {len(target.chosen)} of {len(raw.cases)} cases, {len(candidates)} candidates, {levels} levels", flush=True)
    results = []
    for candidate in candidates:
        result = _score(candidate, target, levels, options, device)
        results.append(result)
        print(f"  {candidate.name}: {_number(result.score)} ({result.seconds:.0f} s)", file=sys.stderr, flush=True)
    # Without a score last; equal ones as they were given.
    results.sort(key=lambda result: -float("inf") if result.score is None else result.score, reverse=True)
    print(f"\n{ranking_table(results)}")
    if options.json is not None:
        write_atomically(Path(options.json), json.dumps(_report(options, target, results), indent=1) + "\n")
    if options.figure is not None:
        save_ranking([(result.candidate.name, result.score) for result in results], raw.name, Path(options.figure))
    return 0


def _preprocessed(name: str) -> Path | None:
    root = os.environ.get(PREPROCESSED)
    folder = Path(root, name) if root else None
    return folder if folder and folder.is_dir() else None


def _target_plan(options: RankOptions, dataset: str, preprocessed: Path | None) -> Plan | None:
    """The plan given with -p, None where there is none."""
    if options.plans is None:
        return None
    file = preprocessed / f"{options.plans}.json" if preprocessed else None
    if file is None or not file.is_file():
        raise PluginError(
            f"-p {options.plans}: {dataset} has no such plans in {PREPROCESSED}. Plan it (nnUNetv2_plan_and_preprocess, "
            f"`stunet plan` or `stunet plan-like`), or leave -p out: each model then sees the images as in its own training."
        )
    plan = Plan(read_json(file), options.configuration)
    plan.check(f"-p {options.plans}")
    return plan


def _score(candidate: Candidate, target: Target, levels: int, options: RankOptions, device: torch.device) -> Result:
    """Run the network over the cases, one in memory at a time."""
    started = time.monotonic()
    network = candidate.build(len(target.raw.channels), options.seed).to(device)
    collected = [LevelFeatures() for _ in range(levels)]
    labels = list(target.labels)
    patch_size = candidate.plan.chosen.patch_size
    for case, image, segmentation in target.cases(candidate.plan):
        voxels = sample_voxels(segmentation, labels, case, options.seed)
        if not set(voxels) - {BACKGROUND}:
            continue
        for level, features in zip(
            collected, read_features(network, image, voxels, patch_size, options.step_size, levels), strict=True
        ):
            level.add(features)
    if all(level.finite for level in collected) and not any(
        len(cases) >= FEWEST_CASES for cases in collected[-1].classes.values()
    ):
        raise PluginError(
            f"No class has {MINIMUM_SAMPLES} voxels in two of the cases {', '.join(target.chosen)}, so nothing can be compared. "
            f"Take more cases (--cases), or others (--seed)."
        )
    scores = tuple(level.score(Definition(options.published_sums, options.variety)) for level in collected)
    return Result(candidate, scores, time.monotonic() - started)


def ranking_table(results: Sequence[Result]) -> str:
    """Return the ranking as aligned text: score, score per level from coarse to fine, name."""
    levels = len(results[0].levels)
    names = ["level " + ("1/1" if step == 0 else f"1/{2**step}") for step in range(levels)][::-1]
    lines = [f"{'rank':>4}  {'CCFV':>8}  {'  '.join(f'{name:>9}' for name in names)}  weights"]
    for rank, result in enumerate(results, start=1):
        place = "-" if result.score is None else str(rank)
        cells = "  ".join(f"{_number(level.score):>9}" for level in result.levels)
        lines.append(f"{place:>4}  {_number(result.score):>8}  {cells}  {result.candidate.name}")
    if any(result.score is None for result in results):
        lines.append("n/a: features that do not vary, or are not finite: weights that are broken, or random behind batch norm.")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _report(options: RankOptions, target: Target, results: Sequence[Result]) -> dict[str, Any]:
    names = target.labels
    return {
        "method": "CCFV, arXiv:2307.11958",
        "dataset": target.raw.name,
        "cases": list(target.chosen),
        "samples": samples_of_levels(len(results[0].levels)),
        "options": {key: value for key, value in asdict(options).items() if key not in ("json", "figure", "weights", "names")},
        "candidates": [
            {
                "rank": None if result.score is None else rank,
                "name": result.candidate.name,
                "score": result.score,
                "file": None if result.candidate.file is None else str(result.candidate.file.absolute()),
                "trainer": result.candidate.trainer,
                "plan": result.candidate.plan.name,
                "levels": [
                    {
                        "score": level.score,
                        "consistency": _finite(level.consistency),
                        "energy": _finite(level.energy),
                        "class_distances": {names[label]: value for label, value in level.class_distances.items()},
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
