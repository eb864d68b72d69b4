"""Fixtures: nnU-Net's folders, two datasets in nnUNet_raw, commands that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stunet_plugin.cli import main

from dataset_helpers import write_dataset


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty nnUNet_raw, nnUNet_preprocessed and nnUNet_results in a folder."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def raw(nnunet_folders: Path) -> Path:
    """nnUNet_raw with two datasets with cases of the same names."""
    folder = nnunet_folders / "nnUNet_raw"
    write_dataset(folder / "Dataset001_A", {"background": 0, "liver": 1, "spleen": 2}, 4)
    write_dataset(folder / "Dataset002_B", {"background": 0, "stomach": 1, "liver": 2}, 3)
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with 2, and return what it says."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 2
        return capsys.readouterr().err

    return run
