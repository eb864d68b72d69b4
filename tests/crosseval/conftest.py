from __future__ import annotations

import json
from pathlib import Path

import pytest

from stunet_plugin.cli import main

from crosseval_helpers import KIDNEYS, Run, make_model, write_cases


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one that tells the kidneys apart and one that does not; a raw dataset, and
    folders with FLARE22's labels."""
    folder = tmp_path_factory.mktemp("subjects")
    make_model(folder, "apart", ["background", "spleen", "left kidney", "right kidney"], seed=1)
    make_model(folder, "joint", ["background", "kidney", "spleen", "gallbladder"], seed=2)
    write_cases(folder / "raw" / "imagesTr", folder / "raw" / "labelsTr", (1, 2, 3), seed=3)
    description = {"channel_names": {"0": "CT"}, "labels": KIDNEYS, "file_ending": ".nii.gz"}
    (folder / "raw" / "dataset.json").write_text(json.dumps(description))
    write_cases(
        folder / "flare" / "images", folder / "flare" / "references", (2, 3, 13), seed=4, channel=""
    )
    return folder


@pytest.fixture
def crosseval(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; returns what it says, or its error where one is expected."""

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        options = ("--device", "cpu", "-np", "1")
        assert main(["crosseval", *options, *map(str, arguments)]) == code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.err if code else said.out

    return run
