"""Fixtures: two datasets in nnUNet_raw."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_helpers import write_dataset


@pytest.fixture
def raw(nnunet_folders: Path) -> Path:
    """nnUNet_raw with two datasets with cases of the same names."""
    folder = nnunet_folders / "nnUNet_raw"
    write_dataset(folder / "Dataset001_A", {"background": 0, "liver": 1, "spleen": 2}, 4)
    write_dataset(folder / "Dataset002_B", {"background": 0, "stomach": 1, "liver": 2}, 3)
    return folder
