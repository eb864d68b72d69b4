"""Arguments of ``stunet crosseval``. Imports nothing heavy: every ``stunet`` command reads it."""

from __future__ import annotations

import argparse


def add_crosseval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        default=None,
        metavar="FILE",
        help="YAML or JSON file with models, datasets and what follows here",
    )
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="NAME=FOLDER[,KEY=VALUE...]",
        help=(
            "a model folder of nnU-Net v2; keys: fold (0, 0+1, all), checkpoint, mirroring,"
            " step_size, labels. Again for more"
        ),
    )
    parser.add_argument(
        "--dataset",
        dest="datasets",
        action="append",
        default=[],
        metavar="NAME=FOLDER[,KEY=VALUE...]",
        help=(
            "a raw dataset of nnU-Net with references; keys: labels (a system's name or file), part"
            " (Tr, Ts), images, references. Again for more"
        ),
    )
    parser.add_argument(
        "-o",
        dest="out",
        default=None,
        metavar="FOLDER",
        help="of everything that is written; resumes in it",
    )
    parser.add_argument(
        "--classes",
        type=_classes,
        default=None,
        metavar="WHICH",
        help=(
            "shared: those of all models and datasets; pair: those of each pair; or names, with"
            " commas (if not given: shared)"
        ),
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=None,
        metavar="MM",
        help="of the NSD where FLARE22's protocol has none (if not given: 2)",
    )
    parser.add_argument(
        "--sliced",
        action="store_true",
        help="score aorta, vena cava, esophagus between the reference's end slices alone",
    )
    parser.add_argument(
        "--resample",
        action="store_true",
        help="resample predictions to their references where the voxels differ",
    )
    parser.add_argument(
        "--device",
        "-device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto takes a GPU if there is one",
    )
    parser.add_argument(
        "-np",
        dest="processes",
        type=int,
        default=None,
        metavar="N",
        help="processes; half the cores if not given",
    )
    parser.add_argument(
        "--check", action="store_true", help="check everything, say what would be scored, and stop"
    )


def _classes(text: str) -> str | list[str]:
    return (
        text
        if text in ("shared", "pair")
        else [name.strip() for name in text.split(",") if name.strip()]
    )
