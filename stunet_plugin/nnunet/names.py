"""Names and defaults that the commands share. Imports nothing: ``stunet --help`` reads it."""

from __future__ import annotations

CONFIGURATION = "3d_fullres"
PLANS_NAME = "nnUNetPlans"
"""nnU-Net's default, so that nnUNetv2_predict finds an imported model without ``-p``."""

TO_RAS, AS_IN_FILE = "NibabelIOWithReorient", "SimpleITKIO"
"""The reader that turns every image to RAS and back, and the one that takes it as it lies."""
READERS = (TO_RAS, "NibabelIO", AS_IN_FILE, "Tiff3DIO")
"""Readers and writers of nnU-Net that an imported model may use."""
NIFTI_ENDINGS = (".nii.gz", ".nii")

CHECKPOINT = "checkpoint_final.pth"
UNFINISHED_CHECKPOINTS = ("checkpoint_best.pth", "checkpoint_latest.pth")
"""What a training writes before the final one, the most wanted first."""

RESULTS, RAW, PREPROCESSED = "nnUNet_results", "nnUNet_raw", "nnUNet_preprocessed"
EXTERNAL = "nnUNet_extTrainer"
"""nnU-Net's environment variables: its folders, and the folder of trainers of others."""

DEFAULT_DATASET_ID = 101
DEFAULT_FOLD = "0"
FOLDS = 5
SPLITS = "splits_final.json"
