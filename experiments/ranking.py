"""CCFV of pretrained weights on hippocampus against the Dice after fine-tuning on few cases.

Candidates of each size of STU-Net: pretrained with labels (the whole hippocampus, on cases that
nothing else is done with), pretrained without (Volume Fusion), each also for a part of the
iterations, and random weights. ``stunet rank`` scores them on the labelled cases that they are then
fine-tuned on, for two classes (anterior, posterior); the Dice of held-out cases says who was right.
Data and way of training are those of ``volume_fusion.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from common import (
    CONFIGURATION,
    Dataset,
    about,
    add_common_options,
    copy_cases,
    describe,
    markdown,
    relabel,
    run_script,
    without_nan,
)
from scipy.stats import kendalltau, pearsonr, weightedtau
from volume_fusion import LABELLED, UNLABELLED, FusionExperiment
from volume_fusion_report import DSC, mean_scores

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import write_atomically

matplotlib.use("agg")

UPSTREAM, PLANS = Dataset(906, "HippocampusWhole"), "nnUNetPlans"
RANDOM, SUPERVISED, FUSION = "random", "supervised", "Volume Fusion"
VARIANTS = {
    "ccfv": "CCFV, averages",
    "published_sums": "CCFV, published sums",
    "spread": "CCFV, inverse energy",
    "consistency": "consistency alone, -log W",
}
"""Key in the JSON to name in the tables; a high value promises a high Dice."""


@dataclass(frozen=True)
class Candidate:
    """Weights to start from: size, kind of pretraining, share of its iterations."""

    size: str
    kind: str
    share: float = 1.0

    @property
    def name(self) -> str:
        share = "" if self.share == 1 else f" {self.share:g}"
        return f"{self.size} {self.kind}{share}"

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.name)


class RankingExperiment(FusionExperiment):
    """The work folder of this experiment."""

    def prepare(self) -> None:
        """Make the three datasets, plan them alike, and preprocess."""
        taken = {case for labelled in self.folds().values() for case in labelled}
        cases = [case for case in self.cases()[1] if case not in taken]
        if len(cases) < 2:
            raise PluginError("No cases are left to pretrain on. Lower --test-cases or --cases.")
        self.prepare_data()
        self.prepare_plans(self.networks["stunet"])
        target = self.raw / UPSTREAM.folder
        if not self.dry_run:
            copy_cases(self.data, target, cases, label=relabel((0, 1, 1)))
            describe(self.data, target, len(cases), {"background": 0, "hippocampus": 1})
        # One case to validate on: nnU-Net predicts them all at the end.
        splits = [{"train": cases[1:], "val": cases[:1]}]
        self.preprocess(UPSTREAM, self.networks["stunet"], splits, plans_of=UNLABELLED)

    def weights(self, candidate: Candidate) -> Path | None:
        """Pretrain unless that is done; return the checkpoint, None for random weights."""
        if candidate.kind == RANDOM:
            return None
        iterations = max(int(self.options.pretrain_iterations * candidate.share), 1)
        options = self.training_options(iterations, 1)
        if candidate.kind == FUSION:
            trainer = f"VolumeFusionTrainer_STUNet_{candidate.size}"
            return self.pretrain(candidate.folder, options, trainer, PLANS)
        results = self.work / "pretraining" / candidate.folder
        trainer = f"STUNetTrainer_{candidate.size}"
        return self.train(results, UPSTREAM, trainer, PLANS, 0, options) / "checkpoint_final.pth"

    def dice_of(self, candidate: Candidate, seed: int) -> float | None:
        """Fine-tune on the labelled cases; return the mean Dice of the test cases."""
        results = self.work / "fine_tuning" / candidate.folder / f"seed_{seed}"
        options = self.training_options(self.options.fine_tune_iterations, seed)
        draw, weights = (seed, self.options.cases[0]), self.weights(candidate)
        trainer = f"STUNetTrainer_{candidate.size}"
        self.train_labelled(results, trainer, PLANS, draw, options, weights)
        if self.dry_run:
            return None
        return mean_scores(json.loads((results / "scores.json").read_text()))[DSC]

    def rank(self, candidates: Sequence[Candidate], seed: int) -> dict[str, Any]:
        """Score all candidates on the labelled cases of a seed, unless that is done."""
        cases = self.folds()[(seed, self.options.cases[0])]
        given = [
            f"{one.name}={self.weights(one) or f'random:STUNetTrainer_{one.size}'}"
            for one in candidates
        ]
        found: list[dict[str, Any]] = []
        for variant, more in (("averages", ""), ("sums", "--published-sums")):
            file = self.work / "ranking" / f"{variant}_seed_{seed}.json"
            present = json.loads(file.read_text())["candidates"] if file.is_file() else []
            if {entry["name"] for entry in present} != {one.name for one in candidates}:
                if not self.dry_run:
                    file.parent.mkdir(parents=True, exist_ok=True)
                where = f"-d {LABELLED.number} -p {PLANS} -c {CONFIGURATION} --seed {seed} {more}"
                device = f"--device {self.options.device}"
                self.run("stunet rank", given, where, device, "--names", cases, "--json", file)
            found.append({} if self.dry_run else json.loads(file.read_text()))
        return {} if self.dry_run else scores_of_ranking(*found)


def candidates_of(options: argparse.Namespace) -> list[Candidate]:
    """Return what is ranked: per size random weights and two kinds of pretraining."""
    found = []
    for size in options.sizes:
        found.append(Candidate(size, RANDOM))
        kinds = (SUPERVISED, FUSION)
        found += [Candidate(size, kind, share) for kind in kinds for share in options.shares]
    return found


def scores_of_ranking(averages: Mapping[str, Any], sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variants of the score of each candidate (None where it has no score).

    Args:
        averages, sums: what ``stunet rank --json`` wrote, without and with ``--published-sums``.
    """
    by_sums = {entry["name"]: entry["score"] for entry in sums["candidates"]}
    found = {}
    for entry in averages["candidates"]:
        name, score = entry["name"], entry["score"]
        found[name] = {"ccfv": score, "published_sums": by_sums[name], "spread": None}
        found[name]["consistency"] = None
        if score is not None:
            consistency = np.array([level["consistency"] for level in entry["levels"]])
            energy = np.array([level["energy"] for level in entry["levels"]])
            found[name]["spread"] = -float(np.log(energy * consistency).sum())
            found[name]["consistency"] = -float(np.log(consistency).sum())
    return found


def summarise(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Average scores and Dice over seeds, and correlate them: over all, and within a size.

    Returns:
        candidates (name, size, dice, dice_spread, one column per variant), and correlations
        (group, variant, candidates, kendall_tau, kendall_p, weighted_tau, pearson_r).
    """
    groups = runs.groupby(["name", "size"], sort=False)
    keys = list(VARIANTS)
    spread = groups["dice"].std(ddof=0).rename("dice_spread")
    candidates = pd.concat(
        [groups[["dice", *keys]].agg(lambda one: one.mean(skipna=False)), spread], axis=1
    ).reset_index()
    rows = []
    sizes = {size: candidates[candidates["size"] == size] for size in candidates["size"].unique()}
    for group, members in {"all": candidates, **sizes}.items():
        for key in keys:
            known = members[[key, "dice"]].dropna()
            # Three points have a tau of 1 by chance once in six.
            if len(known) >= 3:
                pair = known[key], known["dice"]
                tau, p = kendalltau(*pair)
                others = weightedtau(*pair).statistic, pearsonr(*pair).statistic
                rows.append((group, key, len(known), tau, p, *others))
    header = [
        "group",
        "variant",
        "candidates",
        "kendall_tau",
        "kendall_p",
        "weighted_tau",
        "pearson_r",
    ]
    return candidates, pd.DataFrame(rows, columns=header)


def write_report(
    runs: list[dict[str, Any]], options: argparse.Namespace, out: Path, figure: Path | None
) -> None:
    """Write the numbers of all finished runs as JSON, tables beside it, and a scatter plot."""
    frame = pd.DataFrame(runs).astype(dict.fromkeys(VARIANTS, float))
    candidates, correlations = summarise(frame)
    shown = candidates.sort_values("dice", ascending=False)
    rows = [
        [one["name"], f"{one['dice']:.3f} ± {one['dice_spread']:.3f}"]
        + ["n/a" if np.isnan(one[key]) else f"{one[key]:.2f}" for key in VARIANTS]
        for one in shown.to_dict("records")
    ]
    text = markdown(["weights", "Dice", *VARIANTS.values()], rows)
    rows = [
        [f"{one['group']} ({one['candidates']}), {VARIANTS[one['variant']]}"]
        + [f"{one[key]:.2f}" for key in correlations.columns[3:]]
        for one in correlations.to_dict("records")
    ]
    header = ["candidates, score", "Kendall's tau", "p", "weighted tau", "Pearson's r"]
    write_atomically(out.with_suffix(".md"), f"{text}\n{markdown(header, rows)}")
    tables = {"candidates": candidates, "correlations": correlations}
    settings = {name: str(value) for name, value in vars(options).items()}
    found = {name: one.to_dict("records") for name, one in tables.items()}
    report = about(settings=settings, **found, runs=runs)
    write_atomically(out, json.dumps(without_nan(report), indent=1))
    if figure is not None:
        long = candidates.melt(["name", "size", "dice"], list(VARIANTS), "variant", "score")
        grid = sns.relplot(
            long,
            x="score",
            y="dice",
            hue="name",
            style="size",
            col="variant",
            facet_kws={"sharex": False},
        )
        grid.set_titles("{col_name}").figure.savefig(figure, dpi=130)


def carry_out(options: argparse.Namespace) -> None:
    """Prepare, pretrain, rank, fine-tune; report after every fine-tuning."""
    candidates, experiment = candidates_of(options), RankingExperiment(options)
    experiment.prepare()
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        scores = experiment.rank(candidates, seed)
        for candidate in candidates:
            dice = experiment.dice_of(candidate, seed)
            if dice is None:
                continue
            about_run = {"name": candidate.name, "size": candidate.size, "seed": seed, "dice": dice}
            runs.append({**about_run, **scores[candidate.name]})
            if options.json is not None:
                write_report(runs, options, options.json, options.figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = add_common_options(parser)
    add("--sizes", nargs="+", default=["tiny", "small"], help="of STU-Net")
    add("--shares", type=float, nargs="+", default=[1.0, 0.1], help="of the pretraining")
    add("--cases", type=int, nargs=1, default=[8], help="labelled cases to fine-tune and rank on")
    add("--seeds", type=int, nargs="+", default=[1, 2], help="of labelled cases and weights")
    add("--test-cases", type=int, default=40, help="held out")
    add("--pretrain-iterations", type=int, default=1000, help="of each pretraining at share 1")
    add("--fine-tune-iterations", type=int, default=100, help="of each fine-tuning")
    add("--json", type=Path, metavar="FILE", help="for the numbers; the tables go to .md")
    add("--figure", type=Path, metavar="FILE", help="for the scatter plot, .png")
    options = parser.parse_args(arguments)
    options.size = options.sizes[0]
    return run_script(lambda: carry_out(options), __file__)


if __name__ == "__main__":
    sys.exit(main())
