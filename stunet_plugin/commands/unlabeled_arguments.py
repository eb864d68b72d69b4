"""Arguments of ``stunet unlabeled``. Imports nothing heavy: every ``stunet`` command reads it."""

from __future__ import annotations

import argparse

from stunet_plugin.unlabeled.names import DATASET_ENDINGS, EXCLUDED, MODALITIES


def add_unlabeled_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i",
        dest="folders",
        action="append",
        required=True,
        metavar="FOLDER",
        help=(
            "folder of scans, searched to any depth: .nii, .nii.gz, .nrrd, .mha, .mhd and DICOM"
            " series; -i again for more folders"
        ),
    )
    parser.add_argument(
        "-d", dest="dataset_id", type=int, required=True, metavar="ID", help="dataset ID, 1 to 999"
    )
    parser.add_argument(
        "-n", dest="name", required=True, metavar="NAME", help="name of the dataset"
    )
    parser.add_argument(
        "--modality",
        choices=MODALITIES,
        default=None,
        help="of all scans; if not given, what the first few look like",
    )
    parser.add_argument(
        "-np",
        dest="processes",
        type=int,
        default=None,
        metavar="N",
        help="processes; if not given, one per core",
    )
    parser.add_argument(
        "--file-ending",
        choices=DATASET_ENDINGS,
        default=None,
        help=(
            "of the dataset, which has only one; if not given, the most frequent. Files of other"
            " kinds are converted"
        ),
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy the scans instead of linking them"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help=(
            "leave out files and folders whose name matches, such as '*_seg.nii.gz'; always left"
            f" out: {', '.join(EXCLUDED)}"
        ),
    )
