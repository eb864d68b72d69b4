"""Arguments of ``stunet pseudo-label`` and ``stunet merge-datasets``. Imports nothing heavy: every
``stunet`` command reads it."""

from __future__ import annotations

import argparse


def add_pseudo_label_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model folder of nnU-Net (TRAINER__PLANS__CONFIGURATION)"
    )
    parser.add_argument(
        "-i",
        dest="images",
        required=True,
        metavar="IMAGES",
        help=(
            "folder of images named as nnU-Net has them (CASE_0000.nii.gz), or a dataset in"
            " nnUNet_raw (ID, name or path)"
        ),
    )
    _add_new(parser, "PseudoLabels")

    filters = parser.add_argument_group(
        "what to trust",
        "Confidence is the probability of the predicted class (with regions, of the least certain"
        " one); that of a class in a case is the mean over its voxels. What is not trusted becomes"
        " the ignore label, which training passes over.",
    )
    filters.add_argument(
        "--ignore-below",
        type=float,
        default=None,
        metavar="P",
        help="voxels of lower confidence become ignore",
    )
    filters.add_argument(
        "--min-confidence",
        action="append",
        default=[],
        metavar="[CLASS=]P",
        help=(
            "a class of lower mean confidence in a case becomes ignore there; for one class or for"
            " all, may be repeated"
        ),
    )
    filters.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="CLASS=MIN:MAX",
        help=(
            "volume in mm3 of a class in a case, either end may be left out; outside of it the"
            " class becomes ignore there, and a case that lacks a class with a MIN is left out; may"
            " be repeated"
        ),
    )
    filters.add_argument(
        "--drop-cases", action="store_true", help="leave out cases of which a class is not trusted"
    )

    model = parser.add_argument_group("how to predict")
    model.add_argument(
        "-f",
        dest="folds",
        nargs="+",
        default=None,
        metavar="FOLD",
        help="folds; all that are trained if not given",
    )
    model.add_argument(
        "-chk",
        dest="checkpoint",
        default="checkpoint_final.pth",
        metavar="FILE",
        help="checkpoint of each fold",
    )
    model.add_argument(
        "--step-size",
        type=float,
        default=0.5,
        metavar="X",
        help="of the sliding window, in patches",
    )
    model.add_argument(
        "--no-mirroring",
        dest="mirroring",
        action="store_false",
        help="up to eight times as fast, less exact",
    )
    model.add_argument(
        "--device",
        "-device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto takes a GPU where there is one",
    )


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "datasets",
        nargs="+",
        metavar="DATASET[=LABELS]",
        help=(
            "datasets in nnUNet_raw, by ID, name or path; LABELS says what their labels mean (a"
            " published label system by name, or a file) where their dataset.json does not"
        ),
    )
    _add_new(parser, "Merged")
    parser.add_argument(
        "--classes",
        nargs="+",
        default=None,
        metavar="CLASS",
        help="to learn; if not given, all classes of all datasets",
    )
    parser.add_argument(
        "--not-shown",
        action="append",
        default=[],
        metavar="DATASET=CLASS,...",
        help=(
            "classes that no image of a dataset shows, so that what it does not annotate need not"
            " become ignore"
        ),
    )
    parser.add_argument(
        "--train-only",
        action="append",
        default=[],
        metavar="DATASET",
        help=(
            "cases of this dataset (pseudo-labels, perhaps) are trained on in every fold and"
            " validated on in none"
        ),
    )
    parser.add_argument(
        "--channel-names",
        nargs="+",
        default=None,
        metavar="NAME",
        help="of the new dataset, where those of the datasets differ",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the folds")


def _add_new(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "-d",
        dest="dataset_id",
        type=int,
        required=True,
        metavar="ID",
        help="ID of the new dataset, 1 to 999",
    )
    parser.add_argument(
        "-n", dest="name", default=name, metavar="NAME", help="name of the new dataset"
    )
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking them")
