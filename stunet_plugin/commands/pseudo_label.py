"""``stunet pseudo-label``: a dataset of a model's predictions on unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import DATA, RESUMES, Command, Section, argument

WHAT_TO_TRUST = Section(
    "what to trust",
    "Confidence is the probability of the predicted class (with regions, of the least certain one);"
    " that of a class in a case is the mean over its voxels. What is not trusted becomes the ignore"
    " label, which training passes over.",
)
HOW_TO_PREDICT = Section("how to predict")


@dataclass(frozen=True)
class PseudoLabel(Command):
    """Options of ``stunet pseudo-label``."""

    command: ClassVar = "pseudo-label"
    group: ClassVar = DATA
    summary: ClassVar = (
        "Make a dataset of a model's predictions on unlabelled images, with doubtful voxels as"
        " nnU-Net's ignore label."
    )
    example: ClassVar = (
        "stunet pseudo-label MODEL_FOLDER -i IMAGES -d 910 -n Pseudo --min-confidence 0.8"
        " --ignore-below 0.6"
    )
    interrupted: ClassVar = RESUMES

    model: str = argument(
        metavar="MODEL", help="model folder of nnU-Net (TRAINER__PLANS__CONFIGURATION)"
    )
    images: str = argument(
        "-i",
        metavar="IMAGES",
        help=(
            "folder of images named as nnU-Net has them (CASE_0000.nii.gz), or a dataset in"
            " nnUNet_raw (ID, name or path)"
        ),
    )
    dataset_id: int = argument("-d", type=int, metavar="ID", help="ID of the new dataset, 1 to 999")
    name: str = argument(
        "-n", default="PseudoLabels", metavar="NAME", help="name of the new dataset"
    )
    copy: bool = argument("--copy", action="store_true", help="copy files instead of linking them")
    ignore_below: float | None = argument(
        "--ignore-below",
        default=None,
        type=float,
        metavar="P",
        section=WHAT_TO_TRUST,
        help="voxels of lower confidence become ignore",
    )
    min_confidence: tuple[str, ...] = argument(
        "--min-confidence",
        action="append",
        default=(),
        metavar="[CLASS=]P",
        section=WHAT_TO_TRUST,
        help=(
            "a class of lower mean confidence in a case becomes ignore there; for one class or for"
            " all, may be repeated"
        ),
    )
    size: tuple[str, ...] = argument(
        "--size",
        action="append",
        default=(),
        metavar="CLASS=MIN:MAX",
        section=WHAT_TO_TRUST,
        help=(
            "volume in mm3 of a class in a case, either end may be left out; outside of it the"
            " class becomes ignore there, and a case that lacks a class with a MIN is left out; may"
            " be repeated"
        ),
    )
    drop_cases: bool = argument(
        "--drop-cases",
        action="store_true",
        section=WHAT_TO_TRUST,
        help="leave out cases of which a class is not trusted",
    )
    folds: tuple[str, ...] | None = argument(
        "-f",
        default=None,
        nargs="+",
        metavar="FOLD",
        section=HOW_TO_PREDICT,
        help="folds; all that are trained if not given",
    )
    checkpoint: str = argument(
        "-chk",
        default="checkpoint_final.pth",
        metavar="FILE",
        section=HOW_TO_PREDICT,
        help="checkpoint of each fold",
    )
    step_size: float = argument(
        "--step-size",
        default=0.5,
        type=float,
        metavar="X",
        section=HOW_TO_PREDICT,
        help="of the sliding window, in patches",
    )
    mirroring: str = argument(
        "--no-mirroring",
        default=True,
        section=HOW_TO_PREDICT,
        help="up to eight times as fast, less exact",
    )
    device: str = argument(
        "--device",
        "-device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        section=HOW_TO_PREDICT,
        help="auto takes a GPU where there is one",
    )

    def run(self) -> int:
        from stunet_plugin.datasets.pseudo_label import PseudoLabelOptions, run_pseudo_label

        return run_pseudo_label(PseudoLabelOptions.from_arguments(self))
