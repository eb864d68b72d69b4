"""Network options on real images, each against its control, after as many steps and as much time.

For docs/network_options.md, evidence on real images, on Dataset004_Hippocampus: GRC against
the plain network (which is GRC with portion 0), SPM against the plain network and against its
convolutions without a prior, pruned tokens of UNETR against all tokens and against tokens pruned at
random, which are assembled likewise. Every arm of a seed has the same training and test cases.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
import torch
from common import (
    CONFIGURATION,
    Dataset,
    Experiment,
    Network,
    build_parser,
    copy_cases,
    describe,
    draw_labelled,
    read_run,
    run_script,
    write_json,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from report import about, markdown
from scipy.stats import ttest_rel

from stunet_plugin import trainers
from stunet_plugin.networks.from_plan import resolve
from stunet_plugin.networks.presets import PRESETS, STP_RATIO, UNETR_PRESETS
from stunet_plugin.utils.files import read_json, write_atomically

matplotlib.use("agg")

DATASET = Dataset(23, "HippocampusOptions")
EPOCHS = 10
"""Of every training, whatever its iterations."""
STEPS, ROUNDS, OUTPUTS = 3, 7, 3
"""Steps per round of the measurement of time; labels of the dataset."""
SAME_TIME = 0.1
"""Arms whose steps take as long as the control's, but for this share, are not trained again."""
STEPS_ALIKE, TIME_ALIKE = "iterations", "time"
DICE = "validation_dice", "mean_validation_dice"


@dataclass(frozen=True)
class Arm:
    """A network: a trainer and, where its numbers differ from the trainer's own, a plan for them.

    Attributes:
        trainer: with the size to be filled in.
        controls: arms that it is compared with; at equal time, with as much as the first took.
        options: network options that the plan holds.
        numbers: ``arch_kwargs`` of the network that the plan holds.
        for_time: is also trained for the time of its first control, where its steps take longer or
            shorter.
    """

    trainer: str
    controls: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    for_time: bool = True


STUNET, UNETR = "STUNetTrainer_{size}", "UNETRTrainer_{size}"
FAST = "_Fast"
"""Of ``trainers/fast_unetr.py``."""
TOKENS = {"strides": [[1, 1, 1], [1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]}
"""Of 4 voxels: of 8, as planned, these small images have too few."""
RANDOM = {"pruning": {"after": [3, 6, 9], "ratio": STP_RATIO, "random": True}}
ARMS = {
    "plain": Arm(STUNET),
    "GRC": Arm(f"{STUNET}_GRC", ("plain",)),
    "SPM": Arm(f"{STUNET}_SPM", ("plain", "SPM without prior")),
    "SPM without prior": Arm(STUNET, ("plain",), options={"spm": {"prior": False}}),
    "UNETR": Arm(f"{UNETR}{FAST}", numbers=TOKENS),
    "UNETR STP": Arm(f"{UNETR}_STP{FAST}", ("UNETR", "UNETR random"), numbers=TOKENS),
    "UNETR random": Arm(f"{UNETR}_STP{FAST}", ("UNETR",), {}, TOKENS | RANDOM, for_time=False),
}


class Study(Experiment):
    """The folders and steps of this experiment."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.test, self.pool = self.cases()
        self.draws = {
            seed: draw_labelled(self.pool, seed, options.training_cases) for seed in options.seeds
        }
        self.networks = {name: self.network(name, arm) for name, arm in ARMS.items()}

    def network(self, name: str, arm: Arm) -> Network:
        own = f"nnUNetPlans_{name.replace(' ', '_')}" if arm.options or arm.numbers else ""
        return Network(arm.trainer.format(size=self.options.size), plans=own or "nnUNetPlans")

    def make_dataset(self) -> None:
        cases = self.test + self.pool
        if not self.dry_run:
            copy_cases(self.data, self.raw / DATASET.folder, cases)
            describe(self.data, self.raw / DATASET.folder, len(cases))
        splits = [{"train": cases, "val": self.test} for cases in self.draws.values()]
        self.preprocess(DATASET, self.networks["plain"], splits)
        for name, arm in ARMS.items():
            if (arm.options or arm.numbers) and not self.dry_run:
                self.write_plans(name, arm)

    def plans(self, name: str) -> dict[str, Any]:
        file = self.preprocessed / DATASET.folder / f"{self.networks[name].plans}.json"
        plans: dict[str, Any] = read_json(file)
        return plans

    def write_plans(self, name: str, arm: Arm) -> None:
        """Write the plans of an arm, with its network in them."""
        plans = self.plans("plain")
        entry = resolved(plans, self.networks[name].trainer)
        entry = {**entry, "arch_kwargs": {**entry["arch_kwargs"], **arm.numbers}}
        if arm.options:
            chosen, size = planned(plans), PRESETS[self.options.size]
            entry = resolve(chosen, size, name, arm.options).architecture
        plans["plans_name"] = self.networks[name].plans
        plans["configurations"][CONFIGURATION]["architecture"] = entry
        file = self.preprocessed / DATASET.folder / f"{plans['plans_name']}.json"
        write_atomically(file, json.dumps(plans, indent=2))

    def step_seconds(self) -> dict[str, float]:
        """Return the seconds of a training step of every arm, measured once, in turns."""
        file = self.work / "step_seconds.json"
        if not file.is_file():
            entries = {
                name: resolved(self.plans(name), network.trainer)
                for name, network in self.networks.items()
            }
            patch = planned(self.plans("plain"))["patch_size"]
            measured = measure_steps(entries, patch, self.options.batch)
            write_atomically(file, json.dumps(measured, indent=1))
        found: dict[str, float] = read_json(file)
        return found

    def budgets(self) -> dict[str, dict[str, int]]:
        """Return for each arm its iterations at equal steps and at equal time, which are the same
        where its steps take as long as its control's."""
        steps = self.options.iterations
        seconds = dict.fromkeys(ARMS, 1.0) if self.dry_run else self.step_seconds()
        found: dict[str, dict[str, int]] = {}
        for name, arm in ARMS.items():
            control = arm.controls[0] if arm.controls else name
            ratio = seconds[control] / seconds[name]
            found[name] = {STEPS_ALIKE: steps}
            if arm.for_time:
                alike = abs(ratio - 1) <= SAME_TIME
                scaled = steps if alike else round(steps * ratio / EPOCHS) * EPOCHS
                found[name][TIME_ALIKE] = max(scaled, EPOCHS)
        return found

    def run_arm(self, name: str, seed: int, iterations: int) -> Path:
        """Train on the cases of a seed; return the fold's folder."""
        options = self.training_options(EPOCHS, seed)
        options |= {"STUNET_EPOCHS": str(EPOCHS), "STUNET_ITERATIONS": str(iterations // EPOCHS)}
        # Batches are made in the training's own process, on the one core that it has.
        options["nnUNet_n_proc_DA"] = "0"
        results = self.work / "results" / f"{name.replace(' ', '_')}_{iterations}"
        fold = list(self.draws).index(seed)
        return self.train(results, DATASET, self.networks[name], fold, options)

    def runs(self, seed: int, alike: str) -> list[dict[str, Any]]:
        """Return a record of the training of each arm with the cases of a seed; what is done is not
        done again."""
        found = []
        for name, budgets in self.budgets().items():
            if alike in budgets:
                iterations = budgets[alike]
                fold = self.run_arm(name, seed, iterations)
                run = {} if self.dry_run else read_run(fold)
                reached = {x: run[x] for x in DICE if x in run}
                found.append({"arm": name, "seed": seed, "iterations": iterations, **reached})
        return found


def planned(plans: dict[str, Any]) -> dict[str, Any]:
    """Return the experiment's configuration of plans, inheritance resolved."""
    found: dict[str, Any] = PlansManager(plans).get_configuration(CONFIGURATION).configuration
    return found


def resolved(plans: dict[str, Any], trainer: str) -> dict[str, Any]:
    """Return the ``architecture`` entry that a trainer builds for plans."""
    network = getattr(trainers, trainer.removesuffix(FAST))
    found: dict[str, Any] = network.resolve_architecture(planned(plans))
    return found


def measure_steps(
    entries: dict[str, dict[str, Any]], patch: Sequence[int], batch: int
) -> dict[str, float]:
    """Return the median seconds of a forward and backward pass of each network, on one thread; they
    take turns, so that slow minutes meet all."""
    torch.set_num_threads(1)
    x = torch.randn(batch, 1, *patch)
    networks = {
        name: get_network_from_plans(*entry.values(), 1, OUTPUTS, deep_supervision=True)
        for name, entry in entries.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(ROUNDS + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                network.zero_grad()
                sum(output.square().mean() for output in network(x)).backward()
            if number:  # the first warms up
                seconds[name].append((time.perf_counter() - started) / STEPS)
    return {name: statistics.median(values) for name, values in seconds.items()}


def comparisons(
    runs: list[dict[str, Any]], budgets: dict[str, dict[str, int]]
) -> list[dict[str, Any]]:
    """Return the differences of mean Dice between each arm and each control, paired by the seeds
    that both have."""
    dice: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for run in runs:
        dice[run["arm"], run["iterations"]][run["seed"]] = float(run["mean_validation_dice"])
    found = []
    for alike, (name, arm) in itertools.product((STEPS_ALIKE, TIME_ALIKE), ARMS.items()):
        for control in arm.controls:
            if not all(alike in budgets[one] for one in (name, control)):
                continue
            ours, others = (dice[one, budgets[one][alike]] for one in (name, control))
            if seeds := [seed for seed in ours if seed in others]:
                found.append(
                    {"arm": name, "control": control, "alike": alike, "seeds": seeds}
                    | {"iterations": budgets[name][alike]}
                    | {"control_iterations": budgets[control][alike]}
                    | paired([ours[seed] for seed in seeds], [others[seed] for seed in seeds])
                )
    return found


def paired(ours: list[float], control: list[float]) -> dict[str, Any]:
    """Return the differences of pairs, their mean, and its 95 % interval and p by the paired t-test
    (Wilcoxon's cannot reach 0.05 with five pairs)."""
    differences = [one - other for one, other in zip(ours, control, strict=True)]
    result: dict[str, Any] = {"differences": differences, "mean": statistics.mean(differences)}
    if len(differences) > 1 and any(differences):
        test = ttest_rel(ours, control)
        result["interval"] = [float(bound) for bound in test.confidence_interval()]
        result["p"] = float(test.pvalue)
    return result


def arm_table(runs: list[dict[str, Any]], seconds: dict[str, float]) -> str:
    """Return the mean Dice of the test cases of each seed, as Markdown."""
    rows = []
    frame = pd.DataFrame(runs)
    for (name, iterations), group in frame.groupby(["arm", "iterations"], sort=False):
        dice = group["mean_validation_dice"]
        per_seed = ", ".join(f"{value:.3f}" for value in dice)
        step = f"{1000 * seconds[str(name)]:.0f} ms"
        rows.append([name, step, iterations, per_seed, f"{dice.mean():.3f}"])
    return markdown(["arm", "step", "iterations", "mean Dice per seed", "mean"], rows)


def comparison_table(found: list[dict[str, Any]]) -> str:
    """Return the comparisons as Markdown."""
    rows = []
    for one in found:
        low, high = one.get("interval", [one["mean"]] * 2)
        better = sum(value > 0 for value in one["differences"])
        rows.append(
            [
                f"{one['arm']} - {one['control']}",
                f"{one['alike']} ({one['iterations']} / {one['control_iterations']})",
                f"{one['mean']:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                f"{better} of {len(one['differences'])}",
                f"{one['p']:.2f}" if "p" in one else "",
            ]
        )
    header = ["difference", "equal", "mean", "95 % interval", "seeds ahead", "p"]
    return markdown(header, rows, 2)


def save_figure(found: list[dict[str, Any]], path: Path) -> None:
    """Write the differences of each seed and their means as a PNG, a panel per kind of equality."""
    rows = [
        {"pair": f"{one['arm']}\n- {one['control']}", "equal": one["alike"], "difference": value}
        for one in found
        for value in one["differences"]
    ]
    frame = pd.DataFrame(rows)
    axes = {"x": "difference", "y": "pair", "col": "equal", "hue": "pair"}
    grid = sns.catplot(frame, **axes, kind="strip", jitter=False, legend=False, height=4.5)
    for axis, (_, part) in zip(grid.axes.flat, frame.groupby("equal", sort=False), strict=True):
        axis.axvline(0, color="0.6", linewidth=0.8)
        sns.pointplot(
            part, x="difference", y="pair", ax=axis, errorbar=None, color="black", marker="|",
            linestyle="none", markersize=16,
        )  # fmt: skip
    grid.set_titles("equal {col_name}").set_axis_labels("difference of mean Dice", "")
    grid.figure.savefig(path, dpi=110)


def carry_out(options: argparse.Namespace) -> None:
    study = Study(options)
    study.make_dataset()
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for alike, seed in itertools.product((STEPS_ALIKE, TIME_ALIKE), options.seeds):
        found = study.runs(seed, alike)
        runs |= {(run["arm"], run["iterations"], seed): run for run in found}
        if not options.dry_run:
            report(study, [*runs.values()])


def report(study: Study, runs: list[dict[str, Any]]) -> None:
    """Write what was found so far, and print it."""
    options, budgets, seconds = study.options, study.budgets(), study.step_seconds()
    found = comparisons(runs, budgets)
    content = {**about(note=options.machine, threads=1), "step_seconds": seconds}
    content |= {"budgets": budgets, "comparisons": found, "runs": runs}
    write_json(options.json, content)
    if options.figure is not None:
        save_figure(found, options.figure)
    print(arm_table(runs, seconds), comparison_table(found), sep="\n\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser(__file__, __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--size", default="tiny", choices=[one.size for one in UNETR_PRESETS[:2]], help="of all")
    add("--test-cases", type=int, default=20, help="held out")
    add("--training-cases", type=int, default=60, help="drawn for each seed")
    add("--iterations", type=int, default=200, help=f"of a training, a multiple of {EPOCHS}")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of cases and weights")
    add("--machine", default="", help="what it runs on, in words")
    add("--figure", type=Path, metavar="FILE", help="for the differences, .png")
    add("--json", type=Path, required=True, help="file for the numbers")
    return run_script(parser, carry_out, arguments)


if __name__ == "__main__":
    sys.exit(main())
