"""Names and defaults that the commands share. Imports nothing: ``stunet --help`` reads it."""

from __future__ import annotations

CONFIGURATION = "3d_fullres"
PLANS_NAME = "nnUNetPlans"
"""nnU-Net's default, so that nnUNetv2_predict finds an imported model without ``-p``."""

READERS = ("NibabelIOWithReorient", "NibabelIO", "SimpleITKIO", "Tiff3DIO")
"""Readers and writers of nnU-Net that an imported model may use; the first turns every image to RAS and back."""
NIFTI_ENDINGS = (".nii.gz", ".nii")

CHECKPOINT = "checkpoint_final.pth"

RESULTS, RAW, PREPROCESSED = "nnUNet_results", "nnUNet_raw", "nnUNet_preprocessed"
"""nnU-Net's environment variables."""

DEFAULT_DATASET_ID = 101
DEFAULT_FOLD = "0"
