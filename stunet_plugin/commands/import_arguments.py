"""Arguments of ``stunet import``. Imports nothing heavy: every ``stunet`` command reads it."""

from __future__ import annotations

import argparse

from stunet_plugin.networks.misfm_presets import MODE_PURPOSES
from stunet_plugin.nnunet.names import DEFAULT_DATASET_ID, DEFAULT_FOLD, READERS, TO_RAS
from stunet_plugin.weights.input_channels import MEAN, REPEAT, STEMS


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them, in three groups: where it goes, what the file may not say itself, and the stem."""
    parser.add_argument(
        "source", metavar="SOURCE", help="checkpoint file, or hf://owner/repository[@revision]/file"
    )

    target = parser.add_argument_group("where the model folder goes")
    target.add_argument(
        "--out",
        default=None,
        metavar="FOLDER",
        help="this folder, instead of one in nnUNet_results",
    )
    target.add_argument(
        "--dataset-id",
        type=int,
        default=DEFAULT_DATASET_ID,
        metavar="ID",
        help="ID for nnUNetv2_predict -d",
    )
    target.add_argument(
        "--name",
        default=None,
        help="of the dataset; if not given, TotalSegmentator or the file's name",
    )
    target.add_argument(
        "--fold", default=DEFAULT_FOLD, help="fold for nnUNetv2_predict -f, a number or 'all'"
    )
    target.add_argument(
        "--force", action="store_true", help="replace a folder that an import wrote"
    )

    plan = parser.add_argument_group(
        "how its images were prepared and what its outputs mean",
        "Known for the four published TotalSegmentator weights, and where a .model.pkl or a plan"
        " comes with the file; each option replaces that part of what is known. Axes in nnU-Net's"
        " order (z, y, x).",
    )
    plan.add_argument(
        "--plans",
        default=None,
        metavar="FILE",
        help="plans.json of nnU-Net v2, or the .pkl of nnU-Net v1",
    )
    plan.add_argument(
        "--spacing", type=float, nargs=3, default=None, metavar="MM", help="target spacing"
    )
    plan.add_argument(
        "--patch-size", type=int, nargs=3, default=None, metavar="N", help="voxels per axis"
    )
    plan.add_argument(
        "--strides",
        nargs="+",
        default=None,
        metavar="Z,Y,X",
        help="one per pooling: 2,2,2 2,2,2 2,2,2 2,2,2 1,1,2",
    )
    plan.add_argument(
        "--mask-for-norm", action="store_true", help="normalise within the nonzero region alone"
    )
    plan.add_argument(
        "--labels",
        nargs="+",
        default=None,
        metavar="NAME",
        help="of the outputs in their order, background first; or a JSON file",
    )
    plan.add_argument(
        "--reader",
        choices=READERS,
        default=None,
        help=f"image reader; {TO_RAS} turns images to RAS and back",
    )

    pymic = parser.add_argument_group(
        "PCT-Net and FMUNet",
        "Checkpoints of PyMIC, such as the published pctnet_ct10k_volf.pt. Without --spacing,"
        " --patch-size, --plans or --labels, five outputs are taken for those of pretraining.",
    )
    pymic.add_argument(
        "--mode",
        type=int,
        default=None,
        metavar="N",
        help=f"of the three in a PCT-Net file: {MODE_PURPOSES}",
    )
    pymic.add_argument(
        "--pretext",
        action="store_true",
        help="leave the heads out and write a checkpoint for -pretrained_weights",
    )

    stem = parser.add_argument_group(
        "other image channels", "; ".join(f"{name}: {meaning}" for name, meaning in STEMS.items())
    )
    stem.add_argument(
        "--in-channels",
        type=int,
        default=None,
        metavar="N",
        help="fit the first convolutions to N channels",
    )
    stem.add_argument(
        "--stem",
        choices=list(STEMS),
        default=None,
        help=f"how; {REPEAT} for STU-Net, {MEAN} for others",
    )
