"""``stunet unlabeled``: scans without labels become a dataset for pretraining."""

from dataclasses import dataclass

from stunet_plugin.commands.command import RESUMES, Command, flag, option, repeated, required


@dataclass(frozen=True)
class Unlabeled(Command):
    """Make a dataset for pretraining in nnUNet_raw of folders of scans without labels."""

    command = "unlabeled"
    example = (
        "stunet unlabeled -i /data/scans -d 900 -n Scans --modality CT &&"
        " nnUNetv2_plan_and_preprocess -d 900 -c 3d_fullres"
    )
    runs = "stunet_plugin.unlabeled.run:run_unlabeled"
    interrupted = RESUMES
    failure = "no scan could be used, or the disk is full"

    folders: tuple[str, ...] = required(
        "-i",
        action="append",
        metavar="FOLDER",
        help="folder of scans, searched to any depth: .nii, .nii.gz, .nrrd, .mha, .mhd and DICOM"
        " series; may be repeated",
    )
    dataset_id: int = required("-d", metavar="ID", help="dataset ID, 1 to 999")
    name: str = required("-n", metavar="NAME", help="name of the dataset")
    modality: str | None = option(
        "--modality", choices=("CT", "MR"), help="of all scans; if not given, that of the first few"
    )
    processes: int | None = option("-np", metavar="N", help="processes; if not given, one per core")
    file_ending: str | None = option(
        "--file-ending",
        choices=(".nii.gz", ".mha", ".nrrd", ".nii"),
        help="of the dataset, which has only one; if not given, the most frequent. Files of other"
        " kinds are converted",
    )
    copy: bool = flag("--copy", "copy the scans instead of linking them")
    exclude: tuple[str, ...] = repeated(
        "--exclude",
        metavar="PATTERN",
        help="leave out files and folders whose name matches, such as '*_seg.nii.gz'; always left"
        " out: labelsTr, labelsTs, gt_segmentations",
    )
    num_parts: int = option("-num_parts", default=1, metavar="N", help="for a job array: N jobs")
    part_id: int = option("-part_id", default=0, metavar="I", help="number of this job, 0 first")
