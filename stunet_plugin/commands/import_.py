"""``stunet import``: published weights become a model folder of nnU-Net v2."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, flag, option, required
from stunet_plugin.nnunet.names import DEFAULT_DATASET_ID, DEFAULT_FOLD, READERS


@dataclass(frozen=True)
class Import(Command):
    """Turn weights of STU-Net, PCT-Net, FMUNet or nnU-Net's own U-Nets (file, model folder, or
    hf://owner/repository/file) into a model folder of nnU-Net v2; SAM-Med2D or SAM for prompts."""

    command = "import"
    example = "stunet import hf://ziyanhuang/STU-Net/base_ep4k.model"
    runs = "stunet_plugin.weights.import_model:import_checkpoint"

    source: str = required(
        metavar="SOURCE",
        help="checkpoint file, model folder, or hf://owner/repository[@revision]/file",
    )

    out: str | None = option(
        "--out",
        heading=("where the model folder goes",),
        metavar="FOLDER",
        help="this folder, instead of one in nnUNet_results",
    )
    dataset_id: int = option(
        "--dataset-id", default=DEFAULT_DATASET_ID, metavar="ID", help="ID for nnUNetv2_predict -d"
    )
    name: str | None = option(
        "--name", help="of the dataset; if not given, TotalSegmentator or the file's name"
    )
    fold: str = option(
        "--fold", default=DEFAULT_FOLD, help="fold for nnUNetv2_predict -f, a number or 'all'"
    )
    force: bool = flag("--force", "replace a folder that an import wrote")

    plans: str | None = option(
        "--plans",
        heading=(
            "how its images were prepared and what its outputs mean",
            "Known for the four published TotalSegmentator weights, and where a .model.pkl or plan"
            " comes with the file; each option replaces that part of what is known. Axes in"
            " nnU-Net's order (z, y, x).",
        ),
        metavar="FILE",
        help="plans.json of nnU-Net v2, or the .pkl of nnU-Net v1",
    )
    spacing: tuple[float, ...] | None = option(
        "--spacing", nargs=3, metavar="MM", help="target spacing"
    )
    patch_size: tuple[int, ...] | None = option(
        "--patch-size", nargs=3, metavar="N", help="voxels per axis"
    )
    strides: tuple[str, ...] | None = option(
        "--strides", nargs="+", metavar="Z,Y,X", help="of each pooling: 2,2,2 2,2,2 2,2,2 1,1,2"
    )
    mask_for_norm: bool = flag("--mask-for-norm", "normalise within the nonzero region alone")
    labels: tuple[str, ...] | None = option(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="of the outputs, background first; or a JSON file",
    )
    reader: str | None = option(
        "--reader", choices=READERS, help="of images; NibabelIOWithReorient turns them to RAS"
    )

    mode: int | None = option(
        "--mode",
        heading=(
            "PCT-Net and FMUNet",
            "Checkpoints of PyMIC, such as the published pctnet_ct10k_volf.pt. Without --spacing,"
            " --patch-size, --plans or --labels, five outputs are taken for those of pretraining.",
        ),
        metavar="N",
        help="of the three in a PCT-Net file: 0 (all axes alike, such as 1 x 1 x 1 mm), 1 (slices"
        " about twice as far apart as voxels within them), 2 (three times or more)",
    )
    pretext: bool = flag("--pretext", "write a checkpoint without heads for -pretrained_weights")

    in_channels: int | None = option(
        "--in-channels",
        heading=(
            "other image channels",
            "repeat: the published way: every channel gets the mean kernel over the old channels,"
            " undivided; mean: the same divided by (new channels / old channels), so that channels"
            " that all show one image give what that image gave; zeros: the old channels keep their"
            " kernels, new ones start at zero",
        ),
        metavar="N",
        help="adapt the first convolutions to N channels",
    )
    stem: str | None = option(
        "--stem",
        choices=("repeat", "mean", "zeros"),
        help="how; if not given, repeat for STU-Net, mean for others",
    )
