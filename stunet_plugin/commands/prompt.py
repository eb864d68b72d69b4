"""``stunet prompt``: one object of a scan, by clicks, boxes, drawings or a mask."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, device_option, flag, option, repeated, required


@dataclass(frozen=True)
class Prompt(Command):
    """Segment the object that you point at, with a model of a PromptTrainer; refine a mask that
    another model made."""

    command = "prompt"
    example = "stunet prompt MODEL -i scan.nii.gz -o object.nii.gz --point 31,22,14 --state s.npz"
    runs = "stunet_plugin.interactive.run:run_prompt"
    failure = "nothing was found, or the disk is full"
    notes = (
        "\n\nA prompt ending in ',-' says where the object is not. Numbers that begin with a minus"
        " need '=': --point=-12.5,30,8. Prompts are taken in this order: mask, boxes, lassos,"
        " scribbles, points. Python: stunet_plugin.interactive.session.PromptSession. See"
        " docs/prompts.md."
    )

    scan: tuple[str, ...] = required(
        "-i", "--scan", nargs="+", metavar="SCAN", help="a file; several channels: one file each"
    )
    out: str = required("-o", "--out", metavar="OUT", help="label map to write: 1 in the object")
    model: str | None = option(
        metavar="MODEL",
        nargs="?",
        help="a folder TRAINER__PLANS__CONFIGURATION of a PromptTrainer or a SAMMed2DTrainer; or"
        " sam-med2d, once it is imported",
    )
    named_model: str | None = option("--model", "-m", metavar="MODEL", help="the same, by a flag")
    coordinates: str = option(
        "--coordinates",
        default="voxel",
        choices=("voxel", "ras", "lps"),
        help="of points and boxes: indices in the file, the first 0; mm towards right, anterior,"
        " superior (3D Slicer); mm towards left, posterior, superior (ITK, DICOM)",
    )
    points: tuple[str, ...] = repeated("--point", metavar="X,Y,Z[,-]", help="a click")
    boxes: tuple[str, ...] = repeated(
        "--box", metavar="X,Y,Z,X,Y,Z[,-]", help="two opposite corners, both inside of the box"
    )
    lassos: tuple[str, ...] = repeated(
        "--lasso", metavar="FILE[,-]", help="a label map with the filled outline in a slice"
    )
    scribbles: tuple[str, ...] = repeated(
        "--scribble", metavar="FILE[,-]", help="a label map with lines drawn inside of the object"
    )
    mask: str | None = option("--mask", metavar="FILE", help="a segmentation to start from")
    label: int | None = option("--label", metavar="N", help="which label of --mask")
    state: str | None = option(
        "--state", metavar="FILE", help="go on where this file ends, if it is there; then write it"
    )
    undo: bool = flag("--undo", "take the last prompt of --state back first")
    overwrite: bool = flag("--overwrite", "replace OUT (with an existing --state that is done)")
    folds: str | None = option("-f", metavar="FOLD", help="if several are trained: which")
    checkpoint: str = option("-chk", default="checkpoint_final.pth", help="file in the fold")
    device: str = device_option()
