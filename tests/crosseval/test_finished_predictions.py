"""`stunet crosseval --predictions`: label maps of any tool, beside models or alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from crosseval_helpers import SHAPE, Run, rows_of, setup_file
from dataset_helpers import write_array


def test_finished_predictions_of_two_tools(tmp_path: Path, crosseval: Run) -> None:
    """References and predictions alone, each with label values of its own: no model, no images."""
    out, folders = tmp_path / "out", [tmp_path / name for name in ("truth", "good", "poor")]
    truth = np.zeros(SHAPE, np.uint8)
    truth[2:8, 2:7, 2:10], truth[2:8, 8:12, 2:10] = 1, 2
    good, poor = (truth > 0) * (3 - truth), np.roll(truth, 2, axis=2)
    for folder, labels in zip(folders, (truth, good.astype(np.uint8), poor), strict=True):
        for case in ("a", "b"):
            write_array(folder / f"{case}.nii.gz", labels)
    write_array(folders[2] / "c.nii.gz", truth)
    (tmp_path / "labels.yaml").write_text("labels: {liver: 1, spleen: 2}")
    turned = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1, "liver": 2}}
    (folders[1] / "dataset.json").write_text(json.dumps(turned))
    references = f"{folders[0]},labels={tmp_path / 'labels.yaml'}"
    tools = ("--predictions", f"good={folders[1]}", "--predictions", f"poor={folders[2]}")
    said = crosseval(*tools, "--references", references, "-o", out)
    assert "Label values of poor: taken to be as in truth." in said
    assert "Files of poor that have no reference: c." in said
    rows = rows_of(out)
    assert {float(rows["good", "truth", x, "liver", "DSC"]) for x in "ab"} == {1.0}
    shifted = float(rows["poor", "truth", "a", "spleen", "DSC"])
    assert shifted == pytest.approx(2 * 6 / (8 + 8))
    page = (out / "report.html").read_text()
    assert "finished predictions" in page
    assert not (out / "predictions").exists()
    # A case without a prediction is refused, or left out where that is asked for.
    write_array(folders[0] / "c.nii.gz", truth)
    more = (*tools, "--references", references, "-o", out)
    assert "1 of 3 cases of dataset truth have no prediction" in crosseval(*more, code=2)
    said = crosseval(*more, "--predicted-only")
    assert "Cases of truth without a prediction: 1, left out." in said
    (folders[0] / "c.nii.gz").unlink()
    # A prediction that changes is scored again, alone.
    write_array(folders[2] / "b.nii.gz", truth)
    assert "Scores: 3 of 4 are there." in crosseval(*tools, "--references", references, "-o", out)
    assert float(rows_of(out)["poor", "truth", "b", "spleen", "DSC"]) == 1


def test_finished_predictions_beside_a_model(
    subjects: Path, tmp_path: Path, crosseval: Run
) -> None:
    """What a model predicted, scored as another tool's, has the scores of the model."""
    out, file = tmp_path / "out", setup_file(subjects, tmp_path)
    setup = json.loads(file.read_text())
    setup["models"] = setup["models"][:1]
    file.write_text(json.dumps(setup))
    crosseval(file, "-o", out)
    labels = subjects / "apart" / "dataset.json"
    own = out / "predictions" / "apart"
    said = crosseval(file, "--predictions", f"again={own},labels={labels}", "-o", out)
    assert "Predictions: 6 of 6 are there." in said
    rows = rows_of(out)
    first = {key[1:]: value for key, value in rows.items() if key[0] == "apart"}
    assert first == {key[1:]: value for key, value in rows.items() if key[0] == "again"}
    tests = json.loads((out / "summary.json").read_text())["tests"]
    assert {(x["first"], x["second"], x["difference"]) for x in tests} == {("apart", "again", 0)}


M, D = "--model M={apart} ", "--dataset D={own} "
P, R = "--predictions T={own}/labelsTr ", "--references {flare}/references"
WRONG_PREDICTIONS = {
    R: "finished predictions by --predictions NAME=FOLDER",
    P: "references of finished predictions by --references FOLDER",
    P + R: "which says what label values mean. Add ,labels=FILE",
    P + R + ",labels=FLARE22 " + M: "references has no images, which model M needs",
    P + R + "/none,labels=FLARE22": "there is no folder of references {flare}/references/none",
    P + R + ",label=FLARE22": "Did you mean labels?",
    "--predictions T={flare}/none " + R + ",labels=FLARE22": "{flare}/none is not a folder",
    "--predictions T={own} " + R + ",labels=FLARE22": "3 of 3 cases of dataset references have no"
    " prediction in {own}, such as case0.nii.gz. It holds no label maps.",
    "--predictions T={flare} " + R + ",labels=FLARE22": "holds the references of references themse",
    P + D + R + ",labels=FLARE22": "{own}/labelsTr has no folder D. With several datasets",
    P + "--predictions t={own} " + R + ",labels=FLARE22": "Two models are called 'T' and 't'",
    P + "--references {small},labels=FLARE22": "1 of 1 references do not lie on the voxels of their"
    " prediction of T. case0: reference 9 x 9",
}


def test_wrong_predictions_are_refused(subjects: Path, tmp_path: Path, crosseval: Run) -> None:
    out = tmp_path / "out"
    write_array(tmp_path / "small" / "case0.nii.gz", np.zeros((9, 9, 9), np.uint8))
    places = {"apart": subjects / "apart", "own": subjects / "raw", "flare": subjects / "flare"}
    places["small"] = tmp_path / "small"
    for arguments, message in WRONG_PREDICTIONS.items():
        said = crosseval(*shlex.split(arguments.format(**places)), "-o", out, code=2)
        assert message.format(**places) in " ".join(said.split()), arguments
        assert not out.exists(), "a refused run left something behind"
    wrong = write_array(tmp_path / "wrong" / "case0.nii.gz", np.full((9, 9, 9), 7, np.uint8))
    references = f"{tmp_path / 'small'},labels=MSD-Liver"
    given = ("--predictions", f"T={wrong.parent}", "--references", references)
    said = crosseval(*given, "-o", out, "--check", code=2)
    assert "T on small, case0: " in said
    assert "undeclared label values (7 " in said
