"""The tutorial: its notebook runs as a script, with a tiny network, and holds its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"
TINY = 'SIZE, PRETRAINING_EPOCHS, EPOCHS, ITERATIONS = "tiny", 1, 1, 1'


def cells() -> list[dict[str, Any]]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in content if cell["cell_type"] == "code"]


def test_was_executed_without_an_error_and_shows_a_picture() -> None:
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "WORK/nnUNet_results" in text  # no folder of a machine
    assert "/tmp" not in text
    assert [cell["execution_count"] for cell in cells()] == [*range(1, len(cells()) + 1)]


@pytest.mark.slow
def test_runs(tmp_path: Path) -> None:
    first, *others = ("".join(cell["source"]) for cell in cells())
    assert first.split("=")[0] == TINY.split("=")[0]
    script = tmp_path / "tutorial.py"
    script.write_text("\n".join([TINY, *others]), encoding="utf-8")
    clean = {x: y for x, y in os.environ.items() if not x.startswith(("nnUNet", "STUNET"))}
    # Nothing is drawn on a screen, and everything is written below the test's folder. One process
    # for exports and evaluations, not eight, each of which imports torch.
    clean |= {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path), "PYTHONPATH": ""}
    clean["nnUNet_def_n_proc"] = "1"
    done = subprocess.run(
        [sys.executable, script], env=clean, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nnUNetv2_plan_and_preprocess" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("liver")]
