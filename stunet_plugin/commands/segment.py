"""``stunet segment``: a scan in, named structures out."""

from dataclasses import dataclass

from stunet_plugin.commands.command import RESUMES, Command, device_option, flag, option, required


@dataclass(frozen=True)
class Segment(Command):
    """Segment scans with published weights or any model folder of nnU-Net: label maps, volumes and
    a picture."""

    command = "segment"
    example = "stunet segment ct.nii.gz -o segmented --model totalsegmentator-base"
    runs = "stunet_plugin.segmentation.run:run_segment"
    interrupted = RESUMES
    failure = "nothing was found in a scan, or the disk is full"
    notes = "\n\nModels by name: stunet models. Python: stunet_plugin.segment. See docs/segment.md."

    scan: str = required(
        help="a file, or a folder of files; several channels as nnU-Net names them, SCAN_0000,"
        " SCAN_0001, ..."
    )
    out: str = required("-o", "--out", metavar="OUT", help="folder for the results")
    model: str = option(
        "--model",
        "-m",
        default="totalsegmentator-base",
        help="a published model's name, a folder TRAINER__PLANS__CONFIGURATION, or hf://...",
    )
    structures: tuple[str, ...] | None = option(
        "--structures",
        nargs="+",
        metavar="NAME",
        help="compute and write only these, by names of any label system",
    )
    crop: bool = flag(
        "--crop", "find the structures in a coarse pass (3 mm), run the network only around them"
    )
    separate: bool = flag("--separate", "write one file per structure, OUT/SCAN/STRUCTURE")
    fast: bool = flag("--fast", "larger steps of the sliding window (0.8 patches, not 0.5)")
    mirror: bool = flag("--mirror", "average over mirrored images: 8 times as long")
    all_windows: bool = flag("--all-windows", "run the network on the air of a CT, too")
    precision: str = option(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="on the CPU; auto takes bfloat16 if the processor has it and the first window agrees",
    )
    folds: tuple[str, ...] | None = option(
        "-f", nargs="+", metavar="FOLD", help="folds to average; if not given, all that are trained"
    )
    checkpoint: str = option("-chk", default="checkpoint_final.pth", help="file in each fold")
    num_parts: int = option("-num_parts", default=1, metavar="N", help="for a job array: N jobs")
    part_id: int = option("-part_id", default=0, metavar="I", help="number of this job, 0 first")
    force: bool = flag("--force", "take scans of another modality than the model's")
    device: str = device_option()
    quiet: bool = flag("--quiet", "no progress bars")
