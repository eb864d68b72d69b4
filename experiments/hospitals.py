"""Models at two "hospitals": trained at one, at both, and on pseudo-labels; tested at both.

Hospital A has the hippocampus scans with real-valued intensities, as they are. Hospital B has those
with 8 bits, and differs in what hospitals differ in: thicker slices, storage order, contrast, and
label numbers. Every network (STU-Net, PCT-Net, nnU-Net's own) is trained on A, on B, on both
(``stunet merge-datasets``), and on A with pseudo-labels for B's training images from its own model
of A (``stunet pseudo-label``); no label of B is used then. ``stunet crosseval`` runs all of them on
held-out cases of both, and on those of B turned into A's storage order, which tells that difference
from the others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from common import (
    SPLIT_SEED,
    Dataset,
    Experiment,
    Network,
    build_parser,
    cases_in,
    copy_cases,
    describe,
    draw_labelled,
    networks,
    relabel,
    run_script,
)

from stunet_plugin.datasets.draws import hold_out
from stunet_plugin.utils.files import write_atomically

A, B, BOTH = Dataset(911, "HospitalA"), Dataset(912, "HospitalB"), Dataset(913, "BothHospitals")
TURNED, PUBLISHED_ORIENTATION = "HospitalB_turned", "RAS"
"""Test cases of B in the order that A's are stored in."""
PSEUDO_FROM, MIXED_FROM = 914, 917
"""IDs of the datasets with pseudo-labels, and of those merged with A: one per network, as each has
its own teacher."""
NETWORKS, ARMS = ("stunet", "pctnet", "nnunet"), ("A", "B", "both", "pseudo")
OTHER_LABELS = {"background": 0, "Posterior": 1, "Anterior": 2}
"""Hospital B's; hospital A has the published ones, the other way round."""
THICK_AXIS, THICKNESS, ORIENTATION, GAMMA = 1, 2.0, "LPS", 2.0
"""What is changed in B's scans: slices along an axis (x, y, z) in mm, storage order, and gray
values to this power."""
BRIGHT = 5000.0
"""Scans with values beyond are from a third source and are left out."""
TOLERANCE = 1.0
"""Of the surface Dice, in mm; the voxels are 1 mm."""
FILES = ("report.html", "matrix.md", "matrix.png", "boxes.png", "worst_cases.png")


class Hospitals(Experiment):
    """The work folder of this experiment."""

    def write_hospitals(self) -> None:
        """Write both raw datasets: training cases in imagesTr, test cases in imagesTs."""
        for dataset in (A, B):
            folder, at_b = self.raw / dataset.folder, dataset is B
            if (folder / "dataset.json").is_file():
                continue
            cases = cases_of(self.data, eight_bits=at_b)
            test, pool = hold_out(cases, self.options.test_cases, SPLIT_SEED)
            train = draw_labelled(pool, self.options.seed, self.options.train_cases)
            print(f"{dataset.folder}: {len(train)} training cases, {len(test)} test cases")
            changes = {"image": other_scanner, "label": other_labels} if at_b else {}
            copy_cases(self.data, folder, train, "Tr", **changes)
            copy_cases(self.data, folder, test, "Ts", **changes)
            describe(self.data, folder, len(train), OTHER_LABELS if at_b else None)
        source, target = self.raw / B.folder, self.raw / TURNED
        for part in ("imagesTs", "labelsTs"):
            (target / part).mkdir(parents=True, exist_ok=True)
            for file in sorted((source / part).iterdir()):
                turned = sitk.DICOMOrient(sitk.ReadImage(str(file)), PUBLISHED_ORIENTATION)
                sitk.WriteImage(turned, str(target / part / file.name))
        shutil.copyfile(source / "dataset.json", target / "dataset.json")

    def train_on(self, name: str, network: Network, arm: str, dataset: Dataset) -> Path:
        """Train a network on a dataset unless that is done; return the model folder."""
        cases = cases_in(self.raw / dataset.folder / "labelsTr")
        # All cases train; nnU-Net wants some to validate on, and what counts are the test cases.
        self.preprocess(dataset, network, [{"train": cases, "val": cases[:2]}])
        options = self.training_options(self.options.iterations, self.options.seed)
        results = self.work / "training" / f"{name}_{arm}"
        return self.train(results, dataset, network, 0, options).parent

    def train_arm(self, place: int, name: str, network: Network, arm: str) -> Path:
        """Make the dataset of an arm and train a network on it; return the model folder."""
        if arm == "both":
            self.make(BOTH, "stunet merge-datasets", A.number, B.number)
        if arm != "pseudo":
            return self.train_on(name, network, arm, {"A": A, "B": B, "both": BOTH}[arm])
        pseudo = Dataset(PSEUDO_FROM + place, f"PseudoB_{name}")
        mixed = Dataset(MIXED_FROM + place, f"AWithPseudoB_{name}")
        teacher = self.train_on(name, network, "A", A)
        fast = "" if self.options.mirroring else "--no-mirroring"
        images = ["-i", self.raw / B.folder / "imagesTr", "--device", self.options.device]
        self.make(pseudo, "stunet pseudo-label", teacher, images, fast)
        sources = A.number, pseudo.number, "--train-only", pseudo.number
        self.make(mixed, "stunet merge-datasets", *sources)
        return self.train_on(name, network, arm, mixed)

    def make(self, dataset: Dataset, *command: object) -> None:
        if not (self.raw / dataset.folder / "dataset.json").is_file():
            self.run(*command, "-d", dataset.number, "-n", [dataset.name])

    def evaluate(self, models: dict[str, Path]) -> Path:
        """Run all models on the test cases of both hospitals; return the folder of the report."""
        out, file = self.work / "crosseval", self.work / "crosseval.json"
        shared = {"mirroring": self.options.mirroring}
        tested = {"hospital A": A.folder, "hospital B": B.folder, "hospital B turned": TURNED}
        sources = {name: self.raw / folder for name, folder in tested.items()}
        setup = {
            "models": [{"name": name, "folder": str(models[name]), **shared} for name in models],
            "datasets": [
                {"name": name, "folder": str(sources[name]), "part": "Ts"} for name in sources
            ],
            "default_tolerance": TOLERANCE,
            "output": str(out),
        }
        if not self.dry_run:
            write_atomically(file, json.dumps(setup, indent=1))
        self.run("stunet crosseval -np 1 --device", self.options.device, file)
        return out


def cases_of(data: Path, eight_bits: bool) -> list[str]:
    """Return the cases of a hospital, by the type and the range of their voxels."""
    found = []
    for file in sorted((data / "imagesTr").glob("*_0000.nii.gz")):
        image = sitk.ReadImage(str(file))
        dark = sitk.GetArrayViewFromImage(image).max() < BRIGHT
        if dark and eight_bits == (image.GetPixelID() == sitk.sitkUInt8):
            found.append(file.name.removesuffix("_0000.nii.gz"))
    return found


def other_scanner(
    image: sitk.Image,
    thickness: float = THICKNESS,
    orientation: str = ORIENTATION,
    gamma: float = GAMMA,
    inverted_below: float = 0.0,
) -> sitk.Image:
    """Return a scan as hospital B has it: contrast, thick slices, another storage order.

    Args:
        gamma: exponent of gray values.
        inverted_below: part of the range of gray values, from the darkest on, in which dark and
            bright change places, as fluid shines in another sequence.
    """
    values = sitk.GetArrayFromImage(image).astype(np.float32)
    low, high = values.min(), values.max()
    scaled = np.abs((values - low) / max(high - low, 1) - inverted_below) ** gamma
    changed = sitk.GetImageFromArray(low + (high - low) * scaled)
    changed.CopyInformation(image)
    # A thick slice is the mean of the tissue in it.
    variances = [(0.5 * thickness) ** 2 if axis == THICK_AXIS else 1e-6 for axis in range(3)]
    thick = thick_slices(sitk.DiscreteGaussian(changed, variances), sitk.sitkLinear, thickness)
    return sitk.Cast(sitk.DICOMOrient(thick, orientation), sitk.sitkUInt8)


def other_labels(labels: sitk.Image) -> sitk.Image:
    """Return labels on the voxels of :func:`other_scanner`, with 1 and 2 swapped."""
    swapped = relabel((0, 2, 1))(labels)
    thick = thick_slices(swapped, sitk.sitkNearestNeighbor, THICKNESS)
    return sitk.DICOMOrient(thick, ORIENTATION)


def thick_slices(image: sitk.Image, interpolation: int, thickness: float) -> sitk.Image:
    """Resample to thick slices; the outermost are centred in the slab that they take in."""
    size, spacing = list(image.GetSize()), list(image.GetSpacing())
    factor = thickness / spacing[THICK_AXIS]
    direction = np.reshape(image.GetDirection(), (3, 3))[:, THICK_AXIS]
    origin = np.array(image.GetOrigin()) + direction * spacing[THICK_AXIS] * (factor - 1) / 2
    size[THICK_AXIS], spacing[THICK_AXIS] = max(int(size[THICK_AXIS] / factor), 1), thickness
    grid = origin.tolist(), spacing, image.GetDirection()
    return sitk.Resample(image, size, sitk.Transform(), interpolation, *grid)


def carry_out(options: argparse.Namespace) -> None:
    experiment = Hospitals(options)
    if not options.dry_run:
        experiment.write_hospitals()
    known, models = networks(options.size), {}
    for place, name in enumerate(NETWORKS):
        for arm in options.arms if name in options.networks else ():
            models[f"{name} {arm}"] = experiment.train_arm(place, name, known[name], arm)
    out = experiment.evaluate(models)
    if options.report is not None and not options.dry_run:
        options.report.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            # A report to be shown tells what was compared, not where it was on this machine.
            content = (out / file).read_bytes().replace(f"{experiment.work}/".encode(), b"")
            (options.report / file).write_bytes(content)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser(__file__, __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="to train")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what each is trained on")
    add("--size", default="small", help="of STU-Net")
    add("--iterations", type=int, default=300, help="of each training")
    add("--train-cases", type=int, default=30, help="of each hospital")
    add("--test-cases", type=int, default=20, help="of each hospital")
    add("--seed", type=int, default=1, help="of the training cases and the initial weights")
    add("--report", type=Path, metavar="FOLDER", help="for a copy of report and pictures")
    return run_script(parser, carry_out, arguments)


if __name__ == "__main__":
    sys.exit(main())
