"""``stunet pseudo-label``: a dataset of a model's predictions on unlabelled images."""

from dataclasses import dataclass

from stunet_plugin.commands.command import (
    RESUMES,
    Command,
    device_option,
    flag,
    option,
    repeated,
    required,
)


@dataclass(frozen=True)
class PseudoLabel(Command):
    """Make a dataset of a model's predictions on unlabelled images, with doubtful voxels as
    nnU-Net's ignore label."""

    command = "pseudo-label"
    example = (
        "stunet pseudo-label MODEL_FOLDER -i IMAGES -d 910 -n Pseudo --min-confidence 0.8"
        " --ignore-below 0.6"
    )
    runs = "stunet_plugin.datasets.pseudo_label:run_pseudo_label"
    interrupted = RESUMES
    failure = "a class is missing in too many cases (see --min-share), or the disk is full"

    model: str = required(metavar="MODEL", help="model folder (TRAINER__PLANS__CONFIGURATION)")
    images: str = required(
        "-i",
        metavar="IMAGES",
        help="folder of images named as nnU-Net has them (CASE_0000.nii.gz), or a dataset in"
        " nnUNet_raw (ID, name or path)",
    )
    dataset_id: int = required("-d", metavar="ID", help="ID of the new dataset, 1 to 999")
    name: str = option("-n", default="PseudoLabels", metavar="NAME", help="name of the new dataset")
    copy: bool = flag("--copy", "copy files instead of linking them")

    ignore_below: float | None = option(
        "--ignore-below",
        heading=(
            "confidence filter",
            "Confidence is the probability of the predicted class (with regions, of the least"
            " certain one); that of a class in a case is the mean over its voxels. What is not"
            " kept becomes the ignore label, which training passes over.",
        ),
        metavar="P",
        help="voxels of lower confidence become ignore",
    )
    min_confidence: tuple[str, ...] = repeated(
        "--min-confidence",
        metavar="[CLASS=]P",
        help="a class of lower mean confidence in a case becomes ignore there; for one class or for"
        " all, may be repeated",
    )
    size: tuple[str, ...] = repeated(
        "--size",
        metavar="CLASS=MIN:MAX",
        help="volume in mm3 of a class in a case, either end may be left out; outside of it the"
        " class becomes ignore there, and a case that lacks a class with a MIN is left out; may"
        " be repeated",
    )
    drop_cases: bool = flag("--drop-cases", "leave out cases with a class that is not kept")
    min_share: float = option(
        "--min-share",
        default=0.0,
        metavar="P",
        help="share of the kept cases, 0 to 1, that must show each class in the end; a class that"
        " none shows is always too few",
    )
    allow_missing: bool = flag("--allow-missing", "accept classes that too few cases show")

    folds: tuple[str, ...] | None = option(
        "-f",
        heading=("how to predict",),
        nargs="+",
        metavar="FOLD",
        help="folds; all that are trained if not given",
    )
    checkpoint: str = option(
        "-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint of each fold"
    )
    step_size: float = option(
        "--step-size", default=0.5, metavar="X", help="of the sliding window, in patches"
    )
    mirroring: bool = flag("--no-mirroring", "up to eight times as fast, less exact", default=True)
    device: str = device_option()
