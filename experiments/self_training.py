"""Self-training between hospitals: its arms against the source alone and against labels.

Hospital A is that of hospitals.py, and so are B's cases; images are coarser, so that three seeds
fit an hour. Two targets are made of B, both with thick slices and another contrast: in one of them
dark tissue becomes bright as well, which no augmentation of nnU-Net's does. A model of A goes on at
each target for equally many iterations in each arm; no label of a target is used but by the arm
"labels", which says what there is to be gained.

Trainings and tests run in this process, as starting the stock commands would take most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import SimpleITK as sitk
import torch
from coarser_images import resample
from common import (
    CONFIGURATION,
    SPLIT_SEED,
    Dataset,
    Experiment,
    Network,
    build_parser,
    cases_in,
    copy_cases,
    describe,
    draw_labelled,
    run_script,
    write_json,
)
from hospitals import PUBLISHED_ORIENTATION, cases_of, other_scanner, thick_slices
from report import about, markdown

from stunet_plugin.datasets.draws import hold_out
from stunet_plugin.networks.from_plan import architecture_entry
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.utils.files import read_json, write_atomically
from stunet_plugin.utils.measures import DSC, NSD, score
from stunet_plugin.utils.paired_tests import holm, wilcoxon

matplotlib.use("agg")

A = Dataset(951, "SourceA")
TARGETS = {
    "near": (Dataset(952, "TargetNear"), {"gamma": 2.0}),
    "far": (Dataset(953, "TargetFar"), {"gamma": 1.0, "inverted_below": 0.35}),
}
"""Dataset, and what its scanner does to gray values."""
LABELLED, PSEUDO, MIXED = 954, 960, 980
"""IDs of the datasets: A with a target's labels; pseudo-labels, and A with them, of each target and
seed."""
START, SOURCE, CEILING = "start", "source", "labels"
SELF_TRAINED = ("plain", "mean-teacher")
ARMS = (SOURCE, *SELF_TRAINED, CEILING)
TRAINER = "PlannedTrainer_ft"
PLANS = Network(TRAINER)
SPACING, PATCH = 2.0, [16, 24, 16]
"""Of the coarser images, in mm; slices of the targets are twice as thick."""
STAGES, WIDEST = 4, 64
CLASSES = {"anterior": 1, "posterior": 2}
TOLERANCE = 2.0
"""Of the surface Dice, in mm: a voxel."""


class Study(Experiment):
    """The folders and steps of this experiment."""

    def write_hospitals(self) -> None:
        """Write all raw datasets: training cases in imagesTr, test cases in imagesTs."""
        coarse = partial(resample, spacing=SPACING, smooth=True)
        labels = partial(resample, spacing=SPACING, smooth=False)
        for dataset, contrast in ((A, None), *TARGETS.values()):
            folder = self.raw / dataset.folder
            if (folder / "dataset.json").is_file():
                continue
            cases = cases_of(self.data, eight_bits=contrast is not None)
            test, pool = hold_out(cases, self.options.test_cases, SPLIT_SEED)
            train = draw_labelled(pool, 1, self.options.train_cases)
            changes = (coarse, labels)
            if contrast is not None:
                changed = {"orientation": PUBLISHED_ORIENTATION, **contrast}
                scanner = partial(other_scanner, thickness=2 * SPACING, **changed)
                changes = (
                    lambda image, scanner=scanner: scanner(coarse(image)),
                    lambda image: thick_slices(
                        labels(image), sitk.sitkNearestNeighbor, 2 * SPACING
                    ),
                )
            for part, listed in (("Tr", train), ("Ts", test)):
                copy_cases(self.data, folder, listed, part, *changes)
            describe(self.data, folder, len(train))

    def prepare_source(self) -> None:
        """Plan A with a narrow STU-Net, and preprocess it."""
        folder = self.preprocessed / A.folder
        cases = [] if self.dry_run else cases_in(self.raw / A.folder / "labelsTr")
        splits = [{"train": cases, "val": cases[:2]}]
        self.preprocess(A, PLANS, splits)
        if self.dry_run:
            return
        plans = read_json(folder / f"{PLANS.plans}.json")
        widths = [min(self.options.width * 2**stage, WIDEST) for stage in range(STAGES)]
        strides = [[1, 1, 1], *[[2, 2, 2]] * (STAGES - 1)]
        blocks = [1] * STAGES
        network = architecture_entry(widths, blocks, blocks[:-1], strides)
        plans["configurations"][CONFIGURATION]["architecture"] = network
        write_atomically(folder / f"{PLANS.plans}.json", json.dumps(plans, indent=1))

    def prepare(self, dataset: Dataset) -> None:
        """Preprocess a dataset by A's plans."""
        folder = self.preprocessed / dataset.folder
        done = folder / "prepared"
        if done.is_file():
            return
        if not self.dry_run:
            folder.mkdir(parents=True, exist_ok=True)
            # The plan is A's, and so is what it was made from.
            name = "dataset_fingerprint.json"
            shutil.copyfile(self.preprocessed / A.folder / name, folder / name)
            shutil.copyfile(self.raw / dataset.folder / "dataset.json", folder / "dataset.json")
        where = f"-s {A.number} -t {dataset.number} -sp {PLANS.plans}"
        self.run("nnUNetv2_move_plans_between_datasets", where)
        self.run("nnUNetv2_preprocess -np 1 -c 3d_fullres -d", dataset.number)
        if not self.dry_run:
            cases = cases_in(self.raw / dataset.folder / "labelsTr")
            split = {"train": cases, "val": [x for x in cases if x.startswith("951")][:2]}
            write_atomically(folder / "splits_final.json", json.dumps([split]))
            done.touch()

    def make(self, dataset: Dataset, *command: object) -> Dataset:
        """Make a dataset in nnUNet_raw with a command unless it is there, and preprocess it."""
        if not (self.raw / dataset.folder / "dataset.json").is_file():
            self.run(*command, "-d", dataset.number, "-n", dataset.name)
        return dataset

    def mixed(self, target: str, seed: int) -> Dataset:
        """Return A with pseudo-labels of a target from the seed's model of A."""
        place = 10 * list(TARGETS).index(target) + seed
        name = target.capitalize()
        images = self.raw / TARGETS[target][0].folder / "imagesTr"
        pseudo = self.make(
            Dataset(PSEUDO + place, f"Pseudo{name}{seed}"),
            "stunet pseudo-label",
            self.start(seed).parent,
            f"--ignore-below {self.options.ignore_below} --no-mirroring --device cpu",
            "--allow-missing -i",
            images,
        )
        command = f"stunet merge-datasets {A.number} {pseudo.number} --train-only {pseudo.number}"
        mixed = self.make(Dataset(MIXED + place, f"AWith{name}{seed}"), command)
        self.prepare(mixed)
        return mixed

    def labelled(self, target: str) -> Dataset:
        """Return A with the labels of a target."""
        place = list(TARGETS).index(target)
        command = f"stunet merge-datasets {A.number} {TARGETS[target][0].number}"
        name = f"ALabelled{target.capitalize()}"
        dataset = self.make(Dataset(LABELLED + place, name), command)
        self.prepare(dataset)
        return dataset

    def start(self, seed: int) -> Path:
        """Return the fold's folder of a model of A."""
        variables = self.training_options(self.options.source_iterations, seed)
        results = self.work / "training" / f"start_{seed}"
        return self.train_here(results, A, "PlannedTrainer", variables, None, ())

    def arm(self, target: str, arm: str, seed: int) -> Path:
        """Train an arm at a target; return the fold's folder."""
        variables = self.training_options(self.options.iterations, seed)
        results = self.work / "training" / f"{arm}_{target}_{seed}"
        trainer, dataset = TRAINER, A
        if arm == CEILING:
            dataset = self.labelled(target)
        elif arm in SELF_TRAINED:
            trainer, dataset = "SelfTrainingTrainer", self.mixed(target, seed)
            variables["STUNET_SELF_TRAINING"] = arm
        weights, targets = self.start(seed) / CHECKPOINT, [target]
        if arm == SOURCE:
            # The same for all targets.
            results, targets = self.work / "training" / f"{arm}_{seed}", [*TARGETS]
        return self.train_here(results, dataset, trainer, variables, weights, targets)

    def train_here(
        self,
        results: Path,
        dataset: Dataset,
        trainer: str,
        variables: dict[str, str],
        weights: Path | None,
        targets: Sequence[str],
    ) -> Path:
        """Train in this process as nnUNetv2_train does, without its validation; write the Dice at
        targets after every epoch into curves.json."""
        fold = results / dataset.folder / f"{trainer}__{PLANS.plans}__{CONFIGURATION}" / "fold_0"
        if (fold / CHECKPOINT).is_file():
            return fold
        line = " ".join(f"{name}={value}" for name, value in variables.items())
        start = f" -pretrained_weights {weights}" if weights else ""
        names = f"{dataset.number} {CONFIGURATION} 0 -tr {trainer} -p {PLANS.plans}"
        told = f"{line} nnUNetv2_train {names}{start} > {results}"
        if told not in self.shown:
            print(told, flush=True)
        self.shown.add(told)
        if self.dry_run:
            return fold
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir(parents=True)
        from nnunetv2.run.run_training import maybe_load_checkpoint

        from stunet_plugin.inference.build_network import find_trainer

        before = sys.argv
        curves: dict[str, list[float]] = {target: [] for target in targets}
        sys.argv = ["nnUNetv2_train", *(["-pretrained_weights", str(weights)] if weights else [])]
        variables = {**variables, "nnUNet_results": str(results)}
        log = results / "log.txt"
        try:
            with _variables(variables), log.open("w") as file, contextlib.redirect_stdout(file):
                np.random.seed(int(variables["STUNET_SEED"]))
                device = torch.device(self.options.device)
                folder = self.preprocessed / dataset.folder
                plans = read_json(folder / f"{PLANS.plans}.json") | {"continue_training": False}
                described = read_json(folder / "dataset.json")
                one: Any = find_trainer(trainer)(plans, CONFIGURATION, 0, described, device)
                maybe_load_checkpoint(one, False, False, str(weights) if weights else None)
                end = one.on_epoch_end

                def measure_and_end() -> None:
                    for target, curve in curves.items():
                        curve.append(self.quick_dice(one, target))
                    end()

                one.on_epoch_end = measure_and_end
                one.run_training()
        finally:
            sys.argv = before
        write_atomically(results / "curves.json", json.dumps(curves))
        return fold

    @cached_property
    def arrays(self) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Test cases of the targets as the network sees them, images and labels, padded."""
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        manager = PlansManager(str(self.preprocessed / A.folder / f"{PLANS.plans}.json"))
        description = read_json(self.raw / A.folder / "dataset.json")
        found = {}
        for name, (dataset, _) in TARGETS.items():
            raw, cases = self.raw / dataset.folder, []
            for case in cases_in(raw / "labelsTs"):
                files = [str(raw / "imagesTs" / f"{case}_0000.nii.gz")]
                image, label, _ = DefaultPreprocessor(verbose=False).run_case(
                    files,
                    str(raw / "labelsTs" / f"{case}.nii.gz"),
                    manager,
                    manager.get_configuration(CONFIGURATION),
                    description,
                )
                step = 2 ** (STAGES - 1)
                margins = [(0, 0), *((0, -size % step) for size in image.shape[1:])]
                padded = [np.pad(x, margins) for x in (image, np.maximum(label, 0))]
                cases.append((torch.from_numpy(padded[0])[None], torch.from_numpy(padded[1])[0]))
            found[name] = cases
        return found

    @torch.no_grad()
    def quick_dice(self, trainer: Any, target: str) -> float:
        """Return the mean Dice of the test cases of a target, each in one pass."""
        network = trainer._bare_network()
        network.eval()
        dice = []
        for image, label in self.arrays[target]:
            predicted = network(image.float())[0].argmax(1)[0]
            for value in CLASSES.values():
                one, other = predicted == value, label == value
                both = int(one.sum() + other.sum())
                dice.append(2 * int((one & other).sum()) / both if both else 1.0)
        return float(np.mean(dice))

    def scores(self, fold: Path, target: str, results: Path) -> list[dict[str, Any]]:
        """Return the measures of a model on the test cases of a target and of A."""
        file = results / f"scores_{target}.json"
        if file.is_file():
            found: list[dict[str, Any]] = json.loads(file.read_text())
            return found
        from stunet_plugin.inference.predictor import Model

        model = Model(fold.parent, mirroring=False, device="cpu")
        found = []
        for hospital, dataset in ((target, TARGETS[target][0]), ("A", A)):
            raw = self.raw / dataset.folder
            for case in cases_in(raw / "labelsTs"):
                image = raw / "imagesTs" / f"{case}_0000.nii.gz"
                predicted = model.predict((image,)).labels
                label = sitk.ReadImage(str(raw / "labelsTs" / f"{case}.nii.gz"))
                reference = sitk.GetArrayFromImage(label)
                for name, value in CLASSES.items():
                    masks = reference == value, predicted == value
                    measures = score(*masks, label.GetSpacing()[::-1], TOLERANCE)
                    kept = {x: measures[x] for x in (DSC, NSD)}
                    found.append({"hospital": hospital, "case": case, "class": name, **kept})
        write_json(file, found)
        return found

    def records(self, targets: Sequence[str], seed: int) -> list[dict[str, Any]]:
        """Train and test every arm of a seed; what is done is not done again."""
        found = []
        for target in targets:
            for arm in (START, *ARMS):
                fold = self.start(seed) if arm == START else self.arm(target, arm, seed)
                if self.dry_run:
                    continue
                results = fold.parents[2]
                curve = json.loads((results / "curves.json").read_text()).get(target, [])
                of_all = self.scores(fold, target, results)
                record = {"target": target, "arm": arm, "seed": seed, "curve": curve}
                found.append({**record, "scores": of_all})
                mean = np.mean([x[DSC] for x in of_all if x["hospital"] == target])
                print(f"  {target}, {arm}, seed {seed}: Dice {mean:.3f}", flush=True)
        return found


@contextlib.contextmanager
def _variables(given: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def as_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return a row per target, arm, seed, hospital and case, means over classes."""
    rows = [
        {**{x: record[x] for x in ("target", "arm", "seed")}, **one}
        for record in records
        for one in record["scores"]
    ]
    keys = ["target", "arm", "seed", "hospital", "case"]
    return pd.DataFrame(rows).groupby(keys, sort=False)[[DSC, NSD]].mean().reset_index()


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over cases of each target, arm, seed and hospital."""
    keys = ["target", "arm", "seed", "hospital"]
    return table.groupby(keys, sort=False)[[DSC, NSD]].mean().reset_index()


def paired_tests(table: pd.DataFrame) -> pd.DataFrame:
    """Return what each arm gains over each of the source, plain labels and the mean teacher at a
    target: differences of cases, means over seeds, and Wilcoxon's p, corrected for all of a
    measure."""
    own = table[table["hospital"] == table["target"]]
    rows = []
    for target, part in own.groupby("target", sort=False):
        for measure in (DSC, NSD):
            means = part.pivot_table(index="case", columns="arm", values=measure)
            for arm in SELF_TRAINED:
                for other in (SOURCE, "plain", "mean-teacher"):
                    # Each two once.
                    later = ARMS.index(arm) > ARMS.index(other)
                    if later and {arm, other} <= set(means):
                        apart = (means[arm] - means[other]).to_numpy()
                        rows.append((target, measure, arm, other, apart.mean(), wilcoxon(apart)))
    names = ["target", "measure", "arm", "against", "difference", "p"]
    tests = pd.DataFrame(rows, columns=names)
    tests["corrected"] = tests.groupby("measure")["p"].transform(holm)
    return tests


def summary(table: pd.DataFrame) -> str:
    """Return the mean measures of each arm and seed as Markdown."""
    rows = []
    for (target, arm), part in table.groupby(["target", "arm"], sort=False):
        own, at_a = part[part["hospital"] == target], part[part["hospital"] == "A"]
        seeds = own.groupby("seed")[DSC].mean()
        cells = [f"{own[DSC].mean():.3f}", ", ".join(f"{x:.3f}" for x in seeds)]
        rows.append([target, arm, *cells, f"{own[NSD].mean():.3f}", f"{at_a[DSC].mean():.3f}"])
    return markdown(["target", "arm", "DSC", "of each seed", "NSD", "DSC at A"], rows)


def save_figure(records: Sequence[dict[str, Any]], step: int, path: Path) -> None:
    """Write the Dice at the targets against the iterations as a PNG."""
    rows = [
        {"target": record["target"], "arm": record["arm"], "iterations": step * number, "DSC": dice}
        for record in records
        for number, dice in enumerate(record["curve"], 1)
    ]
    matplotlib.rcdefaults()  # nnU-Net's own curves make seaborn's fonts large
    matplotlib.use("agg")
    axes = {"x": "iterations", "y": "DSC", "hue": "arm", "col": "target"}
    looks: dict[str, Any] = {"errorbar": ("pi", 100), "height": 4}
    grid = sns.relplot(
        pd.DataFrame(rows), **axes, **looks, kind="line", facet_kws={"sharey": False}
    )
    grid.set_axis_labels("iterations", "mean Dice of the test cases").set_titles("{col_name}")
    grid.figure.savefig(path, dpi=110)


def carry_out(options: argparse.Namespace) -> None:
    study = Study(options)
    folders = {"nnUNet_raw": study.raw, "nnUNet_preprocessed": study.preprocessed}
    os.environ.update({name: str(path) for name, path in folders.items()})
    os.environ.update(nnUNet_results=str(study.work / "training"), nnUNet_n_proc_DA="0")
    os.environ["STUNET_CPU"] = "torch"
    if not study.dry_run:
        study.write_hospitals()
    study.prepare_source()
    records: list[dict[str, Any]] = []
    for seed in options.seeds:
        records += study.records(options.targets, seed)
        if study.dry_run:
            continue
        table = as_table(records)
        tests = paired_tests(table)
        settings = {x: y for x, y in vars(options).items() if x not in ("data", "work")}
        facts = {
            **about(note=options.machine),
            "settings": json.loads(json.dumps(settings, default=str)),
        }
        found = {"tests": tests.to_dict("records"), "means": means(table).to_dict("records")}
        curves = [{x: y for x, y in record.items() if x != "scores"} for record in records]
        write_json(options.json, {**facts, **found, "curves": curves})
        if options.figure is not None:
            save_figure(records, options.iterations_per_epoch, options.figure)
        print(summary(table), tests.to_string(), sep="\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser(__file__, __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--width", type=int, default=8, help="of the STU-Net's first stage, of four")
    add("--source-iterations", type=int, default=300, help="of each model of A")
    add("--iterations", type=int, default=150, help="of each arm")
    add("--ignore-below", type=float, default=0.6, help="confidence of pseudo-labels")
    add("--train-cases", type=int, default=30, help="of each hospital")
    add("--test-cases", type=int, default=20, help="of each hospital")
    add("--targets", nargs="+", choices=TARGETS, default=[*TARGETS], help="to go on at")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of weights and batches")
    add("--machine", default="", help="what it runs on, in words")
    add("--figure", type=Path, metavar="FILE", help="for the curves, .png")
    add("--json", type=Path, required=True, help="file for the numbers")
    parser.set_defaults(iterations_per_epoch=25, patch=PATCH, mirroring=False)
    return run_script(parser, carry_out, arguments)


if __name__ == "__main__":
    sys.exit(main())
