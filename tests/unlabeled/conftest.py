from __future__ import annotations

from pathlib import Path

import pytest

from stunet_plugin.cli import main

from unlabeled_helpers import Run, arguments


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process, with a nnUNet_raw of its own; options by name."""
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    (tmp_path / "raw").mkdir()
    return lambda *folders, **options: main(arguments(*folders, **options))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tmp_path / "raw" / "Dataset900_Scans"
