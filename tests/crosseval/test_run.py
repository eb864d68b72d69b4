"""`stunet crosseval` from end to end on tiny models: what it writes, what it does not do twice,
what it refuses."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stunet_plugin.crosseval import predictions
from stunet_plugin.inference.predictor import Model as TrainedModel

from crosseval_helpers import SHAPE, Run, rows_of, setup_file, write_cases
from dataset_helpers import read_array, write_array


def test_two_models_on_two_datasets(
    subjects: Path, tmp_path: Path, crosseval: Run, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    setup = setup_file(subjects, tmp_path)
    said = crosseval(setup, "-o", out)
    assert "Classes (2): kidney, spleen." in said
    assert "Not scored, as it has no counterpart: dataset Own: bone." in said
    assert "model joint: gallbladder" in said
    dropped, report = said.splitlines()[-2:]
    assert dropped.startswith("Dropped, without a counterpart: Own: bone; FLARE: liver, ")
    assert report == f"Report: {out / 'report.html'}"
    assert not list(out.rglob("*partial*"))

    rows = rows_of(out)
    assert len(rows) == 2 * 2 * 3 * 2 * 6
    # Against the files, worked out anew: FLARE22 has the kidneys as 2 and 13, "apart" as 2 and 3.
    files = subjects / "flare/references/case1.nii.gz", out / "predictions/apart/FLARE/case1.nii.gz"
    reference, prediction = map(read_array, files)
    wanted, found = np.isin(reference, (2, 13)), np.isin(prediction, (2, 3))
    dice = 2 * (wanted & found).sum() / (wanted.sum() + found.sum())
    kidney = ("apart", "FLARE", "case1", "kidney")
    assert float(rows[(*kidney, "DSC")]) == pytest.approx(dice, rel=1e-4)
    volume = wanted.sum() * 6 / 1000
    assert float(rows[(*kidney, "reference_volume")]) == pytest.approx(volume)

    summary = json.loads((out / "summary.json").read_text())
    pairs = {(pair["model"], pair["dataset"]): pair for pair in summary["pairs"]}
    mean = pairs["apart", "FLARE"]["mean"]["DSC"]
    values = [
        float(x) for key, x in rows.items() if (*key[:2], key[4]) == ("apart", "FLARE", "DSC")
    ]
    assert mean["mean"] == pytest.approx(np.mean(values), abs=1e-5)
    assert mean["low"] <= mean["mean"] <= mean["high"]
    assert summary["tolerances_mm"] == {"kidney": 3, "spleen": 3}
    assert len(summary["tests"]) == 4
    cell = "| {mean:.3f} ({low:.3f} to {high:.3f}) |".format(**mean)
    assert cell in (out / "matrix.md").read_text()
    for name in ("matrix.png", "boxes.png", "worst_cases.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^",]*)', page)
    assert sources == ["data:image/png;base64"] * 3  # nothing is fetched
    text = html.unescape(re.sub("<[^>]*>", "", page))
    # Which models and datasets these were, and how the models predicted.
    model = summary["models"]["apart"]
    known = {"trainer": "STUNetTrainer_tiny", "configuration": "3d_fullres", "folds": ["0"]}
    how = {"checkpoint": "checkpoint_final.pth", "mirroring": False, "step_size": 1.0}
    assert model.items() >= {**known, **how}.items()
    places = str(subjects / "apart"), str(subjects / "flare" / "references")
    settings = "STUNetTrainer_tiny", model["plans"], "mirroring off", "step size 1"
    shown = f"{mean['mean']:.3f}", "too few cases", "Tolerance in mm: kidney 3, spleen 3."
    for words in (*places, *settings, *shown, "dataset.json: kidney", "FLARE22: liver"):
        assert words in text

    # Again: nothing is predicted or scored, and the same comes out.
    monkeypatch.setattr(predictions, "loaded", lambda *_: pytest.fail("a model was loaded"))
    said = crosseval(setup, "-o", out)
    assert "Predictions: 12 of 12 are there." in said
    assert "Scores: 12 of 12 are there." in said
    assert rows_of(out) == rows


def test_only_what_changed_is_done_again(subjects: Path, tmp_path: Path, crosseval: Run) -> None:
    write_cases(tmp_path / "i", tmp_path / "r", (1, 2, 3), seed=6, channel="")
    labels, out = tmp_path / "labels.yaml", tmp_path / "out"
    labels.write_text("labels: {spleen: 1, kidneys: [2, 3]}\n")
    model = {"name": "apart", "folder": str(subjects / "apart"), "mirroring": False, "step_size": 1}
    folders = {"images": str(tmp_path / "i"), "references": str(tmp_path / "r")}
    datasets = [{"name": "D", "labels": str(labels), **folders}]

    def run(**changes: Any) -> str:
        setup = setup_file(subjects, tmp_path, models=[{**model, **changes}], datasets=datasets)
        return crosseval(setup, "-o", out)

    assert "Predictions: 0 of 3 are there." in run()
    # Another image, a cut prediction, another reference; then another setting.
    noise = np.random.default_rng(9).normal(size=SHAPE).astype(np.float32)
    write_array(tmp_path / "i" / "case0.nii.gz", noise)
    assert "Predictions: 2 of 3 are there." in run()
    prediction = out / "predictions" / "apart" / "D" / "case1.nii.gz"
    prediction.write_bytes(prediction.read_bytes()[:200])
    # The prediction comes out as before, so its scores count.
    assert "Scores: 3 of 3 are there." in run()
    write_array(tmp_path / "r" / "case2.nii.gz", np.full(SHAPE, 2, np.uint8))
    said = run()
    assert "Predictions: 3 of 3" in said
    assert "Scores: 2 of 3 are there." in said
    assert "Predictions: 0 of 3 are there." in run(step_size=0.9)


def test_an_interrupted_run_goes_on(
    subjects: Path, tmp_path: Path, crosseval: Run, monkeypatch: Any
) -> None:
    own = {"name": "Own", "folder": str(subjects / "raw")}
    setup, out = setup_file(subjects, tmp_path, datasets=[own]), tmp_path / "out"
    whole = TrainedModel._preprocessed

    def two_then_interrupt(*arguments: Any) -> Any:
        items = whole(*arguments)
        yield next(items)
        yield next(items)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainedModel, "_preprocessed", two_then_interrupt)
        said = crosseval(setup, "-o", out, code=130)
    kept = f"What is finished is in {out}. The same command resumes where it stopped."
    assert said.splitlines()[-1] == f"Interrupted. {kept}"
    assert sorted(path.name for path in out.rglob("*.nii.gz")) == ["case0.nii.gz", "case1.nii.gz"]
    assert not list(out.rglob(".partial*"))
    assert not (out / "report.html").exists()
    said = crosseval(setup, "-o", out, "--classes", "pair")
    assert "Predictions: 2 of 6 are there." in said
    assert (out / "report.html").exists()


M, D, LUNG = "--model M={apart} ", "--dataset D={own} ", "{own},labels=MSD-Lung "
REFUSALS = {
    D: "No models are given",
    "--model 'M x={apart}' --model m_X={apart} " + D: "Two models are called 'M x' and 'm_X'",
    "--model M " + D: "expected NAME=FOLDER",
    M + "--dataset D,images={own}": "give folder (a raw dataset of nnU-Net), or images, references",
    "--model M={own} " + D: "is no model folder of nnU-Net v2",
    "--model M={apart},fold=3 " + D: "fold_3/checkpoint_final.pth is not there. ",
    "--model M={apart},step-size=1 " + D: "Did you mean step_size?",
    "--model M={apart},step_size=1.5 " + D: "step_size must be a number above 0",
    M + "--dataset D={flare}": "has no dataset.json, which says what labels mean",
    M + "--dataset D={own},part=Ts": "no folder of images {own}/imagesTs. Parts with images and"
    " references: part=Tr.",
    M + D + "--classes spleeen": "Did you mean spleen? Take it off the list of classes, or use",
    M + "--dataset D=" + LUNG: "The dataset D shares no class with the models. D has: lung_tumour"
    " ... If they mean the same classes under other names, give one of them",
    M + D + "--dataset E=" + LUNG: "no class that all models and datasets have. D has: kidney, ..."
    " --classes pair.",
    M + D + "--tolerance -1": "default_tolerance must be a number of millimetres",
    M + D + "-np 0": "-np must be at least 1, not 0",
}
"""Arguments, and the parts of what is said about them."""


def test_wrong_input_is_refused(subjects: Path, tmp_path: Path, crosseval: Run) -> None:
    out = tmp_path / "out"

    def refused(arguments: str) -> str:
        message = crosseval(*shlex.split(arguments.format(**places)), "-o", out, code=2)
        assert not out.exists(), "a refused run left something behind"
        return " ".join(message.split())

    places = {"apart": subjects / "apart", "own": subjects / "raw", "flare": subjects / "flare"}
    for arguments, message in REFUSALS.items():
        said = refused(arguments)
        for part in message.format(**places).split(" ... "):
            assert part in said, arguments
    references = tmp_path / "references"
    write_array(references / "case0.nii.gz", np.zeros(SHAPE, np.uint8))
    lacking = f"{M}--dataset D={{own}},references={references}"
    assert "2 of 3 images have no reference" in refused(lacking)
    for number in (1, 2):
        write_array(references / f"case{number}.nii.gz", np.zeros((9, 14, 12), np.uint8))
    message = "2 of 3 references do not lie on the voxels of their image. case1: reference 12 x 14"
    assert message in refused(lacking)


def test_labels_that_the_system_does_not_have(
    subjects: Path, tmp_path: Path, crosseval: Run
) -> None:
    """Found when the files are read; what could be scored is kept."""
    own = {"name": "Own", "folder": str(subjects / "raw"), "labels": "MSD-Spleen"}
    setup = setup_file(subjects, tmp_path, datasets=[own])
    message = crosseval(setup, "-o", tmp_path / "out", "--classes", "pair", code=2)
    assert "6 cases cannot be scored" in message
    assert "undeclared label values (2 (" in message


def test_check_reads_all_files(subjects: Path, tmp_path: Path, crosseval: Run) -> None:
    for kind in ("images", "labels"):
        shutil.copytree(subjects / "raw" / f"{kind}Tr", tmp_path / kind)
    both = f"D,images={tmp_path / 'images'},references={tmp_path / 'labels'}"
    given = ("--model", f"M={subjects / 'apart'}", "--dataset", f"{both},labels={subjects / 'raw'}")
    arguments = (*given, "-o", tmp_path / "out")
    assert "Classes (2): kidney, spleen." in crosseval(*arguments, "--check")
    assert not (tmp_path / "out").exists()
    image = next((tmp_path / "images").glob("*.nii.gz"))
    image.write_bytes(image.read_bytes()[:-200])
    # ITK would fill the rest with zeros.
    for check in ([], ["--check"]):
        message = crosseval(*arguments, *check, code=2)
        assert str(image) in message
        assert "cut off or damaged" in message
    assert not list(tmp_path.glob("out/**/*.nii.gz"))


def test_parts_join_by_themselves(subjects: Path, tmp_path: Path, crosseval: Run) -> None:
    """Two jobs of an array, and again when the model predicts otherwise: the last one reports."""
    setup, out = setup_file(subjects, tmp_path), tmp_path / "out"
    content = json.loads(setup.read_text())
    content["models"], content["datasets"] = content["models"][:1], content["datasets"][:1]
    for step_size in (1, 0.9):
        content["models"][0]["step_size"] = step_size
        setup.write_text(json.dumps(content))
        parts = [("-num_parts", 2, "-part_id", part) for part in (1, 0)]
        said = crosseval(setup, "-o", out, *parts[0])
        assert "Predictions: 0 of 1 are there." in said
        assert "2 cases are left to other parts; the last one writes the report." in said
        assert (out / "report.html").exists() == (step_size != 1)
        said = crosseval(setup, "-o", out, *parts[1])
        assert "Scores: 0 of 2 are there." in said or step_size != 1
        assert f"Report: {out / 'report.html'}" in said
        assert len({case for _, _, case, *_ in rows_of(out)}) == 3
    rows = rows_of(out)
    # The same as in one run, in which nothing is left to do.
    assert "Scores: 3 of 3 are there." in crosseval(setup, "-o", out)
    assert rows_of(out) == rows
    message = crosseval(setup, "-o", out, "-num_parts", 2, "-part_id", 2, code=2)
    assert "the part must be from 0 to 1" in message
