"""Arguments of ``stunet rank``. Imports nothing heavy: every ``stunet`` command reads it."""

from __future__ import annotations

import argparse

DEFAULT_CASES, DEFAULT_LEVELS = 10, 3
DEFAULT_STEP = 0.5
VARIETIES = ("energy", "spread")


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        nargs="+",
        metavar="[NAME=]WEIGHTS",
        help=(
            "model folder of nnU-Net, a checkpoint of one, or pretrained weights; 'random' adds"
            " random weights for comparison, 'random:TRAINER' those of a trainer's network"
            " (with -p)"
        ),
    )
    parser.add_argument(
        "-d", dest="dataset", required=True, help="labelled dataset in nnUNet_raw: ID, name or path"
    )
    parser.add_argument(
        "-p",
        dest="plans",
        default=None,
        help=(
            "plans of the dataset to fine-tune with; if not given, each model sees the images as in"
            " its own training"
        ),
    )
    parser.add_argument(
        "-c", dest="configuration", default="3d_fullres", help="of the plans given with -p"
    )
    parser.add_argument(
        "--cases",
        type=int,
        default=DEFAULT_CASES,
        metavar="N",
        help="how many to look at, drawn with the seed",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        default=None,
        metavar="CASE",
        help="look at these cases instead, those of a training fold perhaps",
    )
    parser.add_argument(
        "--levels",
        type=int,
        default=None,
        metavar="N",
        help=f"finest levels of the decoder; {DEFAULT_LEVELS} if not given",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the drawn cases, voxels and random weights",
    )
    parser.add_argument(
        "--step-size",
        type=float,
        default=DEFAULT_STEP,
        metavar="X",
        help="of the sliding window, in patches",
    )
    parser.add_argument(
        "--published-sums",
        action="store_true",
        help="add distances up as the published script does, not average",
    )
    parser.add_argument(
        "--variety",
        choices=VARIETIES,
        default=VARIETIES[0],
        help=(
            "energy: as in the published code; spread: its inverse, which does not depend on the"
            " scale of the features"
        ),
    )
    parser.add_argument(
        "--device",
        "-device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto takes a GPU where there is one",
    )
    parser.add_argument(
        "--json", default=None, metavar="FILE", help="write everything that was computed"
    )
    parser.add_argument(
        "--figure", default=None, metavar="FILE", help="write the ranking as a bar chart, .png"
    )
