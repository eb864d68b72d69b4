"""``stunet import``: published weights become a model folder of nnU-Net v2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import WEIGHTS, Command, Section, argument

WHERE_THE_MODEL_FOLDER_GOES = Section("where the model folder goes")
HOW_ITS_IMAGES_WERE_PREPARED_AND_WHAT_ITS_OUTPUTS_MEAN = Section(
    "how its images were prepared and what its outputs mean",
    "Known for the four published TotalSegmentator weights, and where a .model.pkl or a plan comes"
    " with the file; each option replaces that part of what is known. Axes in nnU-Net's order (z,"
    " y, x).",
)
PCT_NET_AND_FMUNET = Section(
    "PCT-Net and FMUNet",
    "Checkpoints of PyMIC, such as the published pctnet_ct10k_volf.pt. Without --spacing,"
    " --patch-size, --plans or --labels, five outputs are taken for those of pretraining.",
)
OTHER_IMAGE_CHANNELS = Section(
    "other image channels",
    "repeat: the published way: every channel gets the mean kernel over the old channels,"
    " undivided; mean: the same divided by (new channels / old channels), so that channels that all"
    " show one image give what that image gave",
)


@dataclass(frozen=True)
class Import(Command):
    """Options of ``stunet import``."""

    command: ClassVar = "import"
    group: ClassVar = WEIGHTS
    summary: ClassVar = (
        "Turn published weights of STU-Net, PCT-Net or FMUNet (file or hf://owner/repository/file)"
        " into a folder for nnU-Net v2."
    )
    example: ClassVar = "stunet import hf://ziyanhuang/STU-Net/base_ep4k.model"

    source: str = argument(
        metavar="SOURCE", help="checkpoint file, or hf://owner/repository[@revision]/file"
    )
    out: str | None = argument(
        "--out",
        default=None,
        metavar="FOLDER",
        section=WHERE_THE_MODEL_FOLDER_GOES,
        help="this folder, instead of one in nnUNet_results",
    )
    dataset_id: int = argument(
        "--dataset-id",
        default=101,
        type=int,
        metavar="ID",
        section=WHERE_THE_MODEL_FOLDER_GOES,
        help="ID for nnUNetv2_predict -d",
    )
    name: str | None = argument(
        "--name",
        default=None,
        section=WHERE_THE_MODEL_FOLDER_GOES,
        help="of the dataset; if not given, TotalSegmentator or the file's name",
    )
    fold: str = argument(
        "--fold",
        default="0",
        section=WHERE_THE_MODEL_FOLDER_GOES,
        help="fold for nnUNetv2_predict -f, a number or 'all'",
    )
    force: bool = argument(
        "--force",
        action="store_true",
        section=WHERE_THE_MODEL_FOLDER_GOES,
        help="replace a folder that an import wrote",
    )
    plans: str | None = argument(
        "--plans",
        default=None,
        metavar="FILE",
        section=HOW_ITS_IMAGES_WERE_PREPARED_AND_WHAT_ITS_OUTPUTS_MEAN,
        help="plans.json of nnU-Net v2, or the .pkl of nnU-Net v1",
    )
    spacing: tuple[float, ...] | None = argument(
        "--spacing",
        default=None,
        type=float,
        nargs=3,
        metavar="MM",
        section=HOW_ITS_IMAGES_WERE_PREPARED_AND_WHAT_ITS_OUTPUTS_MEAN,
        help="target spacing",
    )
    patch_size: tuple[int, ...] | None = argument(
        "--patch-size",
        default=None,
        type=int,
        nargs=3,
        metavar="N",
        section=HOW_ITS_IMAGES_WERE_PREPARED_AND_WHAT_ITS_OUTPUTS_MEAN,
        help="voxels per axis",
    )
    strides: tuple[str, ...] | None = argument(
        "--strides",
        default=None,
        nargs="+",
        metavar="Z,Y,X",
        section=HOW_ITS_IMAGES_WERE_PREPARED_AND_WHAT_ITS_OUTPUTS_MEAN,
        help="one per pooling: 2,2,2 2,2,2 2,2,2 2,2,2 1,1,2",
    )
    mask_for_norm: bool = argument(
        "--mask-for-norm",
        action="store_true",
        section=HOW_ITS_IMAGES_WERE_PREPARED_AND_WHAT_ITS_OUTPUTS_MEAN,
        help="normalise within the nonzero region alone",
    )
    labels: tuple[str, ...] | None = argument(
        "--labels",
        default=None,
        nargs="+",
        metavar="NAME",
        section=HOW_ITS_IMAGES_WERE_PREPARED_AND_WHAT_ITS_OUTPUTS_MEAN,
        help="of the outputs in their order, background first; or a JSON file",
    )
    reader: str | None = argument(
        "--reader",
        default=None,
        choices=("NibabelIOWithReorient", "NibabelIO", "SimpleITKIO", "Tiff3DIO"),
        section=HOW_ITS_IMAGES_WERE_PREPARED_AND_WHAT_ITS_OUTPUTS_MEAN,
        help="image reader; NibabelIOWithReorient turns images to RAS and back",
    )
    mode: int | None = argument(
        "--mode",
        default=None,
        type=int,
        metavar="N",
        section=PCT_NET_AND_FMUNET,
        help=(
            "of the three in a PCT-Net file: 0 (all axes alike, such as 1 x 1 x 1 mm), 1 (slices"
            " about twice as far apart as voxels within them), 2 (three times or more)"
        ),
    )
    pretext: bool = argument(
        "--pretext",
        action="store_true",
        section=PCT_NET_AND_FMUNET,
        help="leave the heads out and write a checkpoint for -pretrained_weights",
    )
    in_channels: int | None = argument(
        "--in-channels",
        default=None,
        type=int,
        metavar="N",
        section=OTHER_IMAGE_CHANNELS,
        help="fit the first convolutions to N channels",
    )
    stem: str | None = argument(
        "--stem",
        default=None,
        choices=("repeat", "mean"),
        section=OTHER_IMAGE_CHANNELS,
        help="how; repeat for STU-Net, mean for others",
    )

    def run(self) -> int:
        from stunet_plugin.weights.import_model import run_import
        from stunet_plugin.weights.import_record import ImportOptions

        return run_import(ImportOptions.from_arguments(self))
