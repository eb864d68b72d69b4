"""Promptable models from scratch and from a supervised STU-Net, and objects they never saw.

Makes the numbers of docs/prompts.md. On Dataset004_Hippocampus: ``whole`` (both parts are one
object), ``parts``, and ``unseen`` (trained with the anterior part alone, then clicked on both). On
a labelled CT: ``ct``, trained with every second of its structures, then clicked on all, in the same
scan. For each an STU-Net is trained on labels, a promptable one from its weights and another from
scratch; hippocampus is measured on cases in neither. The same line resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from common import (
    CONFIGURATION,
    Dataset,
    Experiment,
    Network,
    build_parser,
    copy_cases,
    describe,
    relabel,
    run_script,
    write_json,
)
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from report import about, markdown

from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Model
from stunet_plugin.interactive.session import PromptSession
from stunet_plugin.prompts import curve
from stunet_plugin.prompts.channels import ENTRY
from stunet_plugin.sam.curve import dice_of
from stunet_plugin.utils.figures import saved_figure
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.images import read_label_array

FOLD = 0


class Task(NamedTuple):
    """What a model is trained on, and clicked on afterwards.

    Attributes:
        labels: names of the values 0, 1, 2, ... that it is trained with.
        values: what becomes of the values in the original label maps.
        all_objects: the task whose objects are clicked on, if it is another one.
    """

    dataset: Dataset
    labels: tuple[str, ...]
    values: tuple[int, ...]
    all_objects: Task | None = None


PARTS = Task(Dataset(42, "HippocampusParts"), ("background", "anterior", "posterior"), (0, 1, 2))
TASKS = {
    "whole": Task(Dataset(41, "HippocampusWhole"), ("background", "hippocampus"), (0, 1, 1)),
    "parts": PARTS,
    "unseen": Task(
        Dataset(43, "HippocampusAnterior"), ("background", "anterior"), (0, 1, 0), PARTS
    ),
}
CT, CT_CASE, CT_NAME = "ct", "ct", "example_ct_sm"
LEAST_VOXELS = 200
"""Of a structure in the CT."""
SCRATCH, PRETRAINED = "scratch", "supervised"
STEPS = ("no prompt", "box", *(f"{x} click{'s' * (x > 1)}" for x in curve.CLICKS))


class Study(Experiment):
    """The folders and steps of this experiment."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.test, self.pool = self.cases()
        self.supervised = Network(f"STUNetTrainer_{options.size}")

    def task(self, name: str) -> Task:
        """Return a task; that of the CT from the structures in it."""
        if name != CT:
            return TASKS[name]
        folder = self.options.ct
        if folder is None:
            raise PluginError("--tasks ct needs --ct: the folder of the scan and its labels.")
        names = read_json(folder / "example_seg_labels.json")
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "example_seg.nii.gz")))
        counts = np.bincount(labels.ravel().astype(int), minlength=256)
        there = [int(x) for x in np.argsort(-counts) if x and counts[x] >= LEAST_VOXELS]

        def task_of(number: int, suffix: str, kept: list[int], other: Task | None = None) -> Task:
            values = np.zeros(256, int)
            values[kept] = np.arange(1, len(kept) + 1)
            named = ("background", *(names[str(x)] for x in kept))
            return Task(Dataset(number, f"CT{suffix}"), named, tuple(values.tolist()), other)

        return task_of(45, "Half", there[::2], task_of(44, "All", there))

    def make_dataset(self, task: Task) -> None:
        """Write and preprocess a task's dataset, and that of all objects, with the same plans."""
        planned = None
        for one in filter(None, (task.all_objects, task)):
            target = self.raw / one.dataset.folder
            scan = task.dataset.name.startswith("CT")
            cases = [CT_CASE] if scan else self.test + self.pool
            if not self.dry_run:
                if scan:
                    self.copy_ct(target, one.values)
                else:
                    copy_cases(self.data, target, cases, label=relabel(one.values))
                numbered = {name: value for value, name in enumerate(one.labels)}
                describe(self.data, target, len(cases), numbered)
            split = {"train": cases, "val": cases}
            split = split if scan else {"train": self.pool, "val": self.test}
            self.preprocess(one.dataset, self.supervised, [split], planned)
            planned = planned or one.dataset

    def copy_ct(self, target: Path, values: Sequence[int]) -> None:
        sources = {"images": (CT_NAME, "_0000", None), "labels": ("example_seg", "", values)}
        for kind, (name, ending, table) in sources.items():
            file = target / f"{kind}Tr" / f"{CT_CASE}{ending}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = sitk.ReadImage(str(self.options.ct / f"{name}.nii.gz"))
            sitk.WriteImage(relabel(table)(image) if table else image, str(file))

    def results(self, seed: int) -> Path:
        return self.work / f"results_seed_{seed}"

    def source(self, task: Task, seed: int) -> Path:
        """Train on labels; return the fold's folder."""
        options = self.training_options(self.options.source_iterations, seed)
        return self.train(self.results(seed), task.dataset, self.supervised, FOLD, options)

    def prompted(self, task: Task, start: str, seed: int) -> Path:
        """Train a promptable model; return the fold's folder."""
        options, weights, suffix = self.options, None, ""
        if start == PRETRAINED:
            weights = self.source(task, seed) / "checkpoint_final.pth"
            suffix = "_ft" if options.fine_tuning_rate else ""
        network = Network(f"PromptTrainer_STUNet_{options.size}{suffix}")
        variables = self.training_options(options.iterations, seed)
        results = self.results(seed) if start == PRETRAINED else self.work / f"scratch_seed_{seed}"
        return self.train(results, task.dataset, network, FOLD, variables, weights)

    def curve_of(self, fold: Path, task: Task) -> dict[str, Any]:
        """Return the interaction curve of a model on a task's objects, whatever it was trained
        with."""
        model = Model(fold.parent, (str(FOLD),))
        configuration = model.predictor.configuration_manager
        radii = model.predictor.dataset_json[ENTRY]["radii"]
        network, device = model.predictor.network.eval(), torch.device("cpu")
        stored = self.preprocessed / task.dataset.folder / configuration.data_identifier
        cases = held_out(stored.parent)
        dataset = infer_dataset_class(str(stored))(str(stored), cases)
        objects = []
        for case in cases:
            data, label, *_ = dataset.load_case(case)
            image = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
            values = torch.from_numpy(np.asarray(label[0]))
            masks = {name: values == value for value, name in enumerate(task.labels) if value}
            objects += curve.measure_case(network, image, masks, configuration, radii, device, case)
        return curve.summarise(objects)

    def run_task(self, name: str, seed: int) -> list[dict[str, Any]]:
        """Return a record of both promptable models of a task; what is done is not done again."""
        task, found = self.task(name), []
        for start in self.options.starts:
            fold = self.prompted(task, start, seed)
            if self.dry_run:
                continue
            reached = read_json(fold / "validation" / "interaction_curve.json")
            if task.all_objects:
                reached |= self.curve_of(fold, task.all_objects)
                reached["trained_with"] = task.labels[1:]
            checkpoint = torch.load(fold / "checkpoint_final.pth", "cpu", weights_only=False)
            log = checkpoint["logging"]
            seconds = np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"])
            found.append(
                {"task": name, "start": start, "seed": seed}
                | {"iterations": self.options.iterations, "epoch_seconds": seconds.tolist()}
                | {"train_loss": [float(x) for x in log["train_losses"]], "curve": reached}
            )
        return found


def held_out(preprocessed: Path) -> list[str]:
    """Return the cases of a preprocessed dataset that its models were not trained on."""
    cases: list[str] = json.loads((preprocessed / "splits_final.json").read_text())[FOLD]["val"]
    return cases


def save_three_clicks(model: Path, scan: Path, labels: Path, path: Path) -> None:
    """Draw what a model finds after each of three clicks on the first label of a scan, in the slice
    of the first click: the reference in green, what is found in red, clicks in it in yellow."""
    session = PromptSession(model)
    session.set_image(scan)
    image = session.model.reader.read_images([str(scan)])[0][0]
    label, _, _ = read_label_array(labels, session.model.reader)
    target, index = torch.from_numpy(label == 1), None
    found = torch.zeros_like(target)
    spacing = [float(x) for x in session.model.predictor.configuration_manager.spacing]
    with saved_figure(path, 9, 3.3) as figure:
        axes = figure.subplots(1, 3)
        for number, axis in enumerate(axes, 1):
            place, positive = curve.middle_of_largest_error(target, found, spacing)
            if place is not None:
                mask = session.add_point(place[::-1], positive)
                found = torch.from_numpy(mask > 0)
                index = place[0] if index is None else index
            axis.imshow(image[index], cmap="gray")
            for outline, colour in ((target, "tab:green"), (found, "tab:red")):
                if outline[index].any():
                    axis.contour(outline[index].numpy(), [0.5], colors=colour, linewidths=1.5)
            if place is not None and place[0] == index:
                axis.plot(place[2], place[1], "+" if positive else "x", color="yellow", ms=9)
            dice = dice_of(found, target)
            axis.set_title(f"{number} click{'s' * (number > 1)}: Dice {dice:.2f}", fontsize=9)
            axis.axis("off")


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the mean Dice by prompts, as Markdown."""
    rows = []
    for run in runs:
        for name, one in run["curve"]["classes"].items():
            dice = [f"{one['dice'][step]:.3f}" for step in STEPS]
            who = [run["task"], run["start"], str(run["seed"]), name]
            rows.append([*who, *dice, f"{one['reach_enough']:.0%}"])
    return markdown(["task", "start", "seed", "object", *STEPS, "reach 0.9"], rows)


def carry_out(options: argparse.Namespace) -> None:
    study = Study(options)
    wanted = dict.fromkeys(options.tasks)
    for name in wanted:
        study.make_dataset(study.task(name))
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in wanted:
            runs += study.run_task(name, seed)
            if options.dry_run:
                continue
            settings = {"size": options.size, "configuration": CONFIGURATION}
            settings |= {"source_iterations": options.source_iterations}
            write_json(options.json, {**about(note=options.machine), **settings, "runs": runs})
            print(table(runs), flush=True)
    if options.figure and not options.dry_run:
        task = study.task(next(iter(wanted)))
        fold = study.prompted(task, options.starts[0], options.seeds[0])
        raw = study.raw / task.dataset.folder
        name = held_out(study.preprocessed / task.dataset.folder)[0]
        files = raw / "imagesTr" / f"{name}_0000.nii.gz", raw / "labelsTr" / f"{name}.nii.gz"
        save_three_clicks(fold.parent, *files, options.figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser(__file__, __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--size", default="tiny", help="of STU-Net")
    add("--tasks", nargs="+", choices=[*TASKS, CT], default=["whole"], help="what is trained")
    add("--starts", nargs="+", choices=[PRETRAINED, SCRATCH], default=[PRETRAINED, SCRATCH])
    add("--ct", type=Path, metavar="FOLDER", help="TotalSegmentator's example scan and labels")
    add("--test-cases", type=int, default=20, help="held out")
    add("--source-iterations", type=int, default=800, help="of the models on labels")
    add("--iterations", type=int, default=2000, help="of the promptable models")
    help_text = "train from weights with a rate of 0.001 (trainer _ft), not 0.01"
    add("--fine-tuning-rate", action="store_true", help=help_text)
    add("--seeds", type=int, nargs="+", default=[1], help="of the first weights")
    add("--machine", default="", help="what it runs on, in words")
    add(
        "--figure", type=Path, metavar="FILE", help="three clicks on a scan of the first task, .png"
    )
    add("--json", type=Path, required=True, help="file for the numbers")
    return run_script(parser, carry_out, arguments)


if __name__ == "__main__":
    sys.exit(main())
