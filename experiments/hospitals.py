"""How well do models travel? Two "hospitals" out of the hippocampus data; trained at one, at both,
and on pseudo-labels.

Hospital A has the scans with real-valued intensities, as they are. Hospital B has those with 8
bits, and then differs in what
hospitals differ in: thicker slices, another storage order, another contrast, and other label
    numbers. Every network (STU-Net,
PCT-Net, nnU-Net's own) is trained on A, on B, on both (``stunet merge-datasets``), and on A with
pseudo-labels for B's training images from its own model of A (``stunet pseudo-label``); no label of
B is used then. ``stunet crosseval`` runs all of them on held out cases of both, and on those of B
turned into the storage order of A, which tells that difference from the others. Everything else is
stock commands; what is finished stays finished: run the same line again.

Exit codes: 0 done, 1 a command failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from common import (
    BASE_CONFIGURATION,
    CONFIGURATION,
    Experiment,
    Settings,
    add_common_options,
    common_settings,
    draw_labelled,
    exit_code_of,
    hold_out,
    keep_settings,
    link_all,
)
from volume_fusion_arms import Network

from stunet_plugin.nnunet.registration import trainers_folder
from stunet_plugin.utils.files import write_atomically

HOST = Path(__file__).parent / "trainers"
A, B, BOTH = (
    (911, "Dataset911_HospitalA"),
    (912, "Dataset912_HospitalB"),
    (913, "Dataset913_BothHospitals"),
)
TURNED, PUBLISHED_ORIENTATION = "HospitalB_turned", "RAS"
"""Test cases of B in the order that A's are stored in."""
PSEUDO_FROM, MIXED_FROM = 914, 917
"""IDs of the datasets with pseudo-labels, and of those merged with A: one per network, as each has
its own teacher."""
ARMS = ("A", "B", "both", "pseudo")
OTHER_LABELS = {"background": 0, "Posterior": 1, "Anterior": 2}
"""Hospital B's; hospital A has the published ones, the other way round."""
THICK_AXIS, THICKNESS, ORIENTATION, GAMMA = 1, 2.0, "LPS", 2.0
"""What is changed in B's scans: slices along an axis (x, y, z) in mm, storage order, and gray
values to this power."""
BRIGHT = 5000.0
"""Scans with values beyond are from a third source and are left out."""
TOLERANCE = 1.0
"""Of the surface Dice, in mm; the voxels are 1 mm."""
FILES = (
    "report.html",
    "scores.csv",
    "summary.json",
    "matrix.md",
    "matrix.png",
    "boxes.png",
    "worst_cases.png",
)


class Hospitals(Experiment):
    """The work folder, and commands in its environment."""

    def __init__(
        self, settings: Settings, data: Path, work: Path, dry_run: bool, names: Sequence[str]
    ) -> None:
        super().__init__(settings, data, work, dry_run)
        known = {**self.networks, "nnunet": Network("", "nnUNetTrainerBudget", None, "nnUNetPlans")}
        self.networks = {name: known[name] for name in names}
        self.log = work / "logs" / "prepare.log"
        self.shown: list[Sequence[object]] = []

    def run(self, arguments: Sequence[object], log: Path, **options: str) -> None:
        if self.dry_run and arguments in self.shown:
            # It would be done by now.
            return
        self.shown.append(arguments)
        super().run(
            arguments,
            log,
            **{
                "nnUNet_extTrainer": os.pathsep.join((str(trainers_folder()), str(HOST))),
                **options,
            },
        )

    # --- data

    def write_hospitals(self) -> None:
        """Write both raw datasets: training cases in imagesTr and labelsTr, test cases in imagesTs
        and labelsTs."""
        for (_, name), cases, changed in (
            (A, self._cases_of("A"), False),
            (B, self._cases_of("B"), True),
        ):
            folder = self.raw / name
            if (folder / "dataset.json").is_file():
                continue
            test, pool = hold_out(cases, self.settings)
            train = draw_labelled(pool, self.settings.seeds[0], self.settings.cases[0])
            print(f"{name}: {len(train)} training cases, {len(test)} test cases of {len(cases)}")
            for part, names in (("Tr", train), ("Ts", test)):
                self._write_part(folder, part, names, changed)
            description = json.loads((self.data / "dataset.json").read_text())
            if changed:
                description["labels"] = OTHER_LABELS
            write_atomically(
                folder / "dataset.json",
                json.dumps({**description, "numTraining": len(train)}, indent=1),
            )

        self._write_turned(self.raw / B[1], self.raw / TURNED)

    @staticmethod
    def _write_turned(source: Path, target: Path) -> None:
        if (target / "dataset.json").is_file():
            return
        for part in ("imagesTs", "labelsTs"):
            (target / part).mkdir(parents=True, exist_ok=True)
            for file in sorted((source / part).iterdir()):
                turned = sitk.DICOMOrient(sitk.ReadImage(str(file)), PUBLISHED_ORIENTATION)
                sitk.WriteImage(turned, str(target / part / file.name))
        shutil.copyfile(source / "dataset.json", target / "dataset.json")

    def _cases_of(self, hospital: str) -> list[str]:
        """Return the cases of a hospital, by the type and the range of their voxels."""
        found = []
        for file in sorted((self.data / "imagesTr").glob("*_0000.nii.gz")):
            image = sitk.ReadImage(str(file))
            eight_bits = image.GetPixelID() == sitk.sitkUInt8
            if eight_bits == (hospital == "B") and sitk.GetArrayViewFromImage(image).max() < BRIGHT:
                found.append(file.name.removesuffix("_0000.nii.gz"))
        return found

    def _write_part(self, folder: Path, part: str, cases: Sequence[str], changed: bool) -> None:
        for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
            source, target = self.data / f"{kind}Tr", folder / f"{kind}{part}"
            if not changed:
                link_all(
                    ((source / f"{case}{ending}", target / f"{case}{ending}") for case in cases),
                    target,
                )
                continue
            target.mkdir(parents=True, exist_ok=True)
            for case in cases:
                image = sitk.ReadImage(str(source / f"{case}{ending}"))
                sitk.WriteImage(
                    other_scanner(image) if kind == "images" else other_labels(image),
                    str(target / f"{case}{ending}"),
                )

    # --- training

    def prepare(self, dataset: tuple[int, str], network: Network) -> None:
        """Plan a dataset for a network, with a configuration of the batch size that is wanted, and
        preprocess it."""
        (number, name), folder = dataset, self.preprocessed / dataset[1]
        done = folder / f"prepared_{network.plans}"
        if done.is_file():
            return
        if not (folder / "dataset_fingerprint.json").is_file():
            self.run(["nnUNetv2_extract_fingerprint", "-d", number, "-np", 2], self.log)
        self.plan(dataset, network, self.log)
        self.run(
            [
                "nnUNetv2_preprocess",
                "-d",
                number,
                "-plans_name",
                network.plans,
                "-c",
                BASE_CONFIGURATION,
                "-np",
                2,
            ],
            self.log,
        )
        if not self.dry_run:
            # All cases train; nnU-Net wants some to validate on, and what counts are the test
            # cases.
            cases = sorted(
                path.name.removesuffix(".nii.gz")
                for path in (self.raw / name / "labelsTr").glob("*.nii.gz")
            )
            write_atomically(
                folder / "splits_final.json", json.dumps([{"train": cases, "val": cases[:2]}])
            )
            done.touch()

    def model_folder(self, name: str, arm: str, dataset: tuple[int, str]) -> Path:
        network = self.networks[name]
        trained = f"{network.segmentation_trainer}__{network.plans}__{CONFIGURATION}"
        return self.work / "training" / f"{name}_{arm}" / dataset[1] / trained

    def train_on(self, name: str, arm: str, dataset: tuple[int, str]) -> Path:
        """Train a network on a dataset unless that is done; return the model folder."""
        network, model = self.networks[name], self.model_folder(name, arm, dataset)
        self.prepare(dataset, network)
        options = self.training_options(self.settings.fine_tune_iterations, self.settings.seeds[0])
        arguments = [
            dataset[0],
            CONFIGURATION,
            0,
            "-tr",
            network.segmentation_trainer,
            "-p",
            network.plans,
        ]
        fold = model / "fold_0"
        self.train(
            arguments,
            fold,
            fold / "validation" / "summary.json",
            model.parents[1] / "log.txt",
            options,
        )
        return model

    def train_arm(self, name: str, arm: str) -> Path:
        """Make the dataset of an arm and train a network on it; return the model folder."""
        if arm in ("A", "B"):
            return self.train_on(name, arm, A if arm == "A" else B)
        if arm == "both":
            self._make(BOTH, ["stunet", "merge-datasets", A[0], B[0]])
            return self.train_on(name, arm, BOTH)
        place = list(self.networks).index(name)
        pseudo = (PSEUDO_FROM + place, f"Dataset{PSEUDO_FROM + place}_PseudoB_{name}")
        mixed = (MIXED_FROM + place, f"Dataset{MIXED_FROM + place}_AWithPseudoB_{name}")
        teacher = self.train_on(name, "A", A)
        fast = [] if self.settings.mirroring else ["--no-mirroring"]
        images = self.raw / B[1] / "imagesTr"
        self._make(
            pseudo,
            [
                "stunet",
                "pseudo-label",
                teacher,
                "-i",
                images,
                *fast,
                "--device",
                self.settings.device,
            ],
        )
        self._make(mixed, ["stunet", "merge-datasets", A[0], pseudo[0], "--train-only", pseudo[0]])
        return self.train_on(name, arm, mixed)

    def _make(self, dataset: tuple[int, str], command: list[object]) -> None:
        number, name = dataset
        if not (self.raw / name / "dataset.json").is_file():
            self.run([*command, "-d", number, "-n", name.partition("_")[2]], self.log)

    # --- evaluation

    def evaluate(self, models: dict[str, Path]) -> Path:
        """Run all models on the test cases of both hospitals; return the folder of the report."""
        out = self.work / "crosseval"
        setup: dict[str, Any] = {
            "models": [
                {"name": name, "folder": str(folder), "mirroring": self.settings.mirroring}
                for name, folder in models.items()
            ],
            "datasets": [
                {"name": f"hospital {key}", "folder": str(self.raw / name), "part": "Ts"}
                for key, name in (("A", A[1]), ("B", B[1]), ("B turned", TURNED))
            ],
            "default_tolerance": TOLERANCE,
            "output": str(out),
        }
        file = self.work / "crosseval.json"
        if not self.dry_run:
            write_atomically(file, json.dumps(setup, indent=1))
        # One after the other here; a scoring process costs more to start than 40 small cases take.
        self.run(
            ["stunet", "crosseval", file, "--device", self.settings.device, "-np", 1],
            self.work / "logs" / "crosseval.log",
        )
        return out


def other_scanner(image: sitk.Image) -> sitk.Image:
    """Return a scan as hospital B has it: gray values to a power, thick slices, stored in another
    order."""
    values = sitk.GetArrayFromImage(image).astype(np.float32)
    low, high = values.min(), values.max()
    changed = sitk.GetImageFromArray(
        low + (high - low) * ((values - low) / max(high - low, 1)) ** GAMMA
    )
    changed.CopyInformation(image)
    # A thick slice is the mean of the tissue in it.
    variances = [(0.5 * THICKNESS) ** 2 if axis == THICK_AXIS else 1e-6 for axis in range(3)]
    thick = _thick(sitk.DiscreteGaussian(changed, variances), sitk.sitkLinear)
    return sitk.Cast(sitk.DICOMOrient(thick, ORIENTATION), sitk.sitkUInt8)


def other_labels(labels: sitk.Image) -> sitk.Image:
    """Return labels on the voxels of :func:`other_scanner`, with hospital B's numbers (1 and 2
    swapped)."""
    values = sitk.GetArrayFromImage(labels).astype(int)
    swapped = sitk.GetImageFromArray(np.array([0, 2, 1], np.uint8)[values])
    swapped.CopyInformation(labels)
    return sitk.DICOMOrient(_thick(swapped, sitk.sitkNearestNeighbor), ORIENTATION)


def _thick(image: sitk.Image, interpolation: int) -> sitk.Image:
    """Resample to thick slices; the first and the last are centred in the slab of voxels that they
    take in."""
    size, spacing, origin = (
        list(image.GetSize()),
        list(image.GetSpacing()),
        np.array(image.GetOrigin()),
    )
    factor = THICKNESS / spacing[THICK_AXIS]
    size[THICK_AXIS] = max(int(size[THICK_AXIS] / factor), 1)
    direction = np.reshape(image.GetDirection(), (3, 3))
    origin += direction[:, THICK_AXIS] * spacing[THICK_AXIS] * (factor - 1) / 2
    spacing[THICK_AXIS] = THICKNESS
    return sitk.Resample(
        image, size, sitk.Transform(), interpolation, origin.tolist(), spacing, image.GetDirection()
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_common_options(parser)
    add = parser.add_argument
    add(
        "--networks",
        nargs="+",
        choices=["stunet", "pctnet", "nnunet"],
        default=["stunet", "pctnet", "nnunet"],
        help="to train",
    )
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what each is trained on")
    add("--size", default="small", help="of STU-Net")
    add("--iterations", type=int, default=300, help="of each training")
    add("--train-cases", type=int, default=30, help="of each hospital")
    add("--test-cases", type=int, default=20, help="of each hospital")
    add(
        "--seed",
        type=int,
        default=1,
        help="of the choice of training cases and of the initial weights",
    )
    add(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="where a copy of the report, its tables and pictures goes",
    )
    return parser


def carry_out(options: argparse.Namespace) -> None:
    settings = Settings(
        **common_settings(options),
        size=options.size,
        pretrain_iterations=0,
        fine_tune_iterations=options.iterations,
        cases=(options.train_cases,),
        seeds=(options.seed,),
    )
    work = options.work.resolve()
    experiment = Hospitals(
        settings, options.data.resolve(), work, options.dry_run, options.networks
    )
    if not options.dry_run:
        keep_settings(work, settings)
        experiment.write_hospitals()
    models = {
        f"{name} {arm}": experiment.train_arm(name, arm)
        for name in options.networks
        for arm in options.arms
    }
    out = experiment.evaluate(models)
    if options.report is not None and not options.dry_run:
        options.report.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            # A report to be shown tells what was compared, not where it lay on this machine.
            content = (out / file).read_bytes()
            (options.report / file).write_bytes(
                content if file.endswith(".png") else content.replace(f"{work}/".encode(), b"")
            )


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: carry_out(options), __file__)


if __name__ == "__main__":
    sys.exit(main())
