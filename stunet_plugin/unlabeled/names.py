"""Names and defaults of ``stunet unlabeled``. Imports nothing: every ``stunet`` command reads
it."""

from __future__ import annotations

CT, MR = "CT", "MR"
MODALITIES = (CT, MR)

NIFTI_GZ, NIFTI, NRRD, METAIMAGE, METAIMAGE_HEADER = ".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"
SCAN_ENDINGS = (NIFTI_GZ, NIFTI, NRRD, METAIMAGE, METAIMAGE_HEADER)
"""Files that are taken for scans, in any case of letters."""
DATASET_ENDINGS = (NIFTI_GZ, METAIMAGE, NRRD, NIFTI)
"""What a dataset may consist of; where a folder holds as many of two kinds, the first here wins."""

EXCLUDED = ("labelsTr", "labelsTs", "gt_segmentations")
"""Folders of labels in nnU-Net's layout."""

CANNOT_OPEN = "cannot be opened"
"""A reason that the next run looks at again."""
DUPLICATE = "duplicate"
"""Of a case that is in the dataset, which the record names."""
