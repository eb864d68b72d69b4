"""CCFV of pretrained weights on hippocampus against the Dice after fine-tuning on few cases.

Candidates of each size of STU-Net: pretrained with labels (the whole hippocampus, on cases that
nothing else is done with), pretrained without (Volume Fusion), each also for a part of the
iterations, and random weights. ``stunet rank`` scores them on the labelled cases that they are then
fine-tuned on, for two classes (anterior, posterior); the Dice of held-out cases says who was right.
Data and way of training are those of ``volume_fusion.py``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from common import (
    CONFIGURATION,
    Dataset,
    Network,
    build_parser,
    copy_cases,
    describe,
    networks,
    relabel,
    run_script,
    write_json,
)
from report import about, markdown
from scipy.stats import kendalltau, pearsonr, weightedtau
from volume_fusion import LABELLED, UNLABELLED, FusionExperiment
from volume_fusion_report import DSC, mean_scores

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import folder_name, read_json, write_atomically

matplotlib.use("agg")

UPSTREAM, PLANS = Dataset(906, "HippocampusWhole"), "nnUNetPlans"
RANDOM, SUPERVISED, FUSION = "random", "supervised", "Volume Fusion"
VARIANTS = {
    "ccfv": "CCFV, averages",
    "published_sums": "CCFV, published sums",
    "spread": "CCFV, inverse energy",
    "consistency": "consistency alone, -log W",
    "heads": "fitted heads",
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
        return folder_name(self.name)

    @property
    def network(self) -> Network:
        return networks(self.size)["stunet"]


class RankingExperiment(FusionExperiment):
    """The work folder of this experiment."""

    def prepare(self) -> None:
        """Make the three datasets, plan them alike, and preprocess."""
        if not self.dry_run:
            (self.work / "ranking").mkdir(exist_ok=True)
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
            return self.pretrain(candidate.folder, options, candidate.network)
        results = self.work / "pretraining" / candidate.folder
        fold = self.train(results, UPSTREAM, candidate.network, 0, options)
        return fold / "checkpoint_final.pth"

    def dice_of(self, candidate: Candidate, seed: int) -> float | None:
        """Fine-tune on the labelled cases; return the mean Dice of the test cases."""
        results = self.work / "fine_tuning" / candidate.folder / f"seed_{seed}"
        options = self.training_options(self.options.fine_tune_iterations, seed)
        draw, weights = (seed, self.options.cases[0]), self.weights(candidate)
        self.train_labelled(results, candidate.network, draw, options, weights)
        if self.dry_run:
            return None
        return mean_scores(read_json(results / "scores.json"))[DSC]

    def rank(self, candidates: Sequence[Candidate], seed: int) -> dict[str, Any]:
        """Score all candidates on the labelled cases of a seed, unless that is done."""
        cases = self.folds()[(seed, self.options.cases[0])]
        weights = {one: self.weights(one) or f"random:{one.network.trainer}" for one in candidates}
        given = [f"{one.name}={file}" for one, file in weights.items()]
        found: list[dict[str, Any]] = []
        for variant, more in (("averages", ""), ("sums", "--published-sums")):
            file = self.work / "ranking" / f"{variant}_seed_{seed}.json"
            present = read_json(file)["candidates"] if file.is_file() else []
            if {entry["name"] for entry in present} != {one.name for one in candidates}:
                where = f"-d {LABELLED.number} -p {PLANS} -c {CONFIGURATION} --seed {seed} {more}"
                device = f"--device {self.options.device}"
                self.run("stunet rank", given, where, device, "--names", cases, "--json", file)
            found.append({} if self.dry_run else read_json(file))
        return {} if self.dry_run else scores_of_ranking(*found)


def candidates_of(options: argparse.Namespace) -> list[Candidate]:
    """Return what is ranked: per size random weights and two kinds of pretraining."""
    found = []
    for size in options.sizes:
        pretrained = itertools.product((SUPERVISED, FUSION), options.shares)
        found += [Candidate(size, RANDOM), *(Candidate(size, *one) for one in pretrained)]
    return found


def scores_of_ranking(averages: Mapping[str, Any], sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variants of the score of each candidate (None where it has no score).

    Args:
        averages, sums: what ``stunet rank --json`` wrote, without and with ``--published-sums``.
    """
    by_sums = {entry["name"]: entry["scores"]["ccfv"] for entry in sums["candidates"]}
    found = {}
    for entry in averages["candidates"]:
        given = entry["scores"]
        scores = {"ccfv": given["ccfv"], "published_sums": by_sums[entry["name"]]}
        scores |= {"spread": given["inverse"], "heads": given["heads"], "consistency": None}
        if given["ccfv"] is not None:
            logarithms = np.log(pd.DataFrame(entry["levels"])["consistency"])
            scores["consistency"] = -float(logarithms.sum())
        found[entry["name"]] = scores
    return found


def average(runs: pd.DataFrame) -> pd.DataFrame:
    """Average over seeds: name, size, dice, a column per variant, dice_spread."""
    groups = runs.groupby(["name", "size"], sort=False)
    means = groups[["dice", *VARIANTS]].agg(lambda one: one.mean(skipna=False))
    return means.assign(dice_spread=groups["dice"].std(ddof=0)).reset_index()


def correlate(candidates: pd.DataFrame) -> pd.DataFrame:
    """Correlate each variant with the Dice, over all candidates and within a size: group, variant,
    candidates, kendall_tau, kendall_p, weighted_tau, pearson_r."""
    rows = []
    for group, members in (("all", candidates), *candidates.groupby("size", sort=False)):
        for variant in VARIANTS:
            known = members[[variant, "dice"]].dropna()
            # Three points have a tau of 1 by chance once in six.
            if len(known) >= 3:
                pair = known[variant], known["dice"]
                tau, p = kendalltau(*pair)
                found = {"group": group, "variant": variant, "candidates": len(known)}
                found |= {"kendall_tau": tau, "kendall_p": p}
                found["weighted_tau"] = weightedtau(*pair).statistic
                found["pearson_r"] = pearsonr(*pair).statistic
                rows.append(found)
    return pd.DataFrame(rows)


def write_report(
    runs: list[dict[str, Any]], options: argparse.Namespace, out: Path, figure: Path | None
) -> None:
    """Write the numbers of all finished runs as JSON, tables beside it, and a scatter plot."""
    candidates = average(pd.DataFrame(runs).astype(dict.fromkeys(VARIANTS, float)))
    found = {
        "candidates": candidates.to_dict("records"),
        "correlations": correlate(candidates).to_dict("records"),
    }
    rows = [
        [one["name"], f"{one['dice']:.3f} ± {one['dice_spread']:.3f}"]
        + ["n/a" if np.isnan(one[key]) else f"{one[key]:.2f}" for key in VARIANTS]
        for one in sorted(found["candidates"], key=itemgetter("dice"), reverse=True)
    ]
    text = markdown(["weights", "Dice", *VARIANTS.values()], rows)
    rows = [
        [f"{one['group']} ({one['candidates']}), {VARIANTS[one['variant']]}"]
        + [f"{value:.2f}" for value in list(one.values())[3:]]
        for one in found["correlations"]
    ]
    header = ["candidates, score", "Kendall's tau", "p", "weighted tau", "Pearson's r"]
    write_atomically(out.with_suffix(".md"), f"{text}\n\n{markdown(header, rows)}\n")
    settings = {name: str(value) for name, value in vars(options).items()}
    report = {**about(), "settings": settings, **found, "runs": runs}
    write_json(out, report)
    if figure is not None:
        long = candidates.melt(["name", "size", "dice"], list(VARIANTS), "variant", "score")
        axes = {"x": "score", "y": "dice", "hue": "name", "style": "size", "col": "variant"}
        grid = sns.relplot(long, **axes, facet_kws={"sharex": False})
        grid.set_titles("{col_name}").figure.savefig(figure, dpi=130)


def carry_out(options: argparse.Namespace) -> None:
    """Prepare, pretrain, rank, fine-tune; report after every fine-tuning."""
    options.size = options.sizes[0]
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
    parser = build_parser(__file__, __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["tiny", "small"], help="of STU-Net")
    add("--shares", type=float, nargs="+", default=[1.0, 0.1], help="of the pretraining")
    add("--cases", type=int, nargs=1, default=[8], help="labelled cases to fine-tune and rank on")
    add("--seeds", type=int, nargs="+", default=[1, 2], help="of labelled cases and weights")
    add("--test-cases", type=int, default=40, help="held out")
    add("--pretrain-iterations", type=int, default=1000, help="of each pretraining at share 1")
    add("--fine-tune-iterations", type=int, default=100, help="of each fine-tuning")
    add("--json", type=Path, metavar="FILE", help="for the numbers; the tables go to .md")
    add("--figure", type=Path, metavar="FILE", help="for the scatter plot, .png")
    return run_script(parser, carry_out, arguments)


if __name__ == "__main__":
    sys.exit(main())
