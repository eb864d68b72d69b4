"""`stunet crosseval` from end to end on tiny models: what it writes, what it does not do twice,
what it refuses."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.cli import main
from stunet_plugin.crosseval import predictions
from stunet_plugin.inference.predictor import Model as TrainedModel

from dataset_helpers import read_array, write_array
from import_helpers import make_network, published_weights, write_v1

SHAPE = (10, 14, 12)
KIDNEYS = {"background": 0, "kidney": 1, "spleen": 2, "bone": 3}


def write_cases(
    images: Path, references: Path, values: tuple[int, int, int], seed: int, channel: str = "_0000"
) -> None:
    """Three cases with a box of each label in noise."""
    rng = np.random.default_rng(seed)
    for number in range(3):
        labels = np.zeros(SHAPE, np.uint8)
        for place, value in enumerate(values):
            labels[2:8, 2:12, 1 + 4 * place : 4 + 4 * place] = value
        image = (labels * 20 + rng.normal(0, 9, SHAPE)).astype(np.float32)
        write_array(images / f"case{number}{channel}.nii.gz", image)
        write_array(references / f"case{number}.nii.gz", labels)


def make_model(folder: Path, name: str, labels: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    weights = published_weights(make_network(outputs=len(labels)))
    source = write_v1(folder / f"{name}.model", weights)
    assert main(["import", str(source), "--out", str(folder / name), "--labels", *labels]) == 0


@pytest.fixture(scope="module")
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


def setup_file(subjects: Path, tmp_path: Path, **changes: Any) -> Path:
    """A file of both models and datasets."""
    how = {"mirroring": False, "step_size": 1}
    folders = {key: str(subjects / "flare" / key) for key in ("images", "references")}
    content = {
        "models": [{"name": x, "folder": str(subjects / x), **how} for x in ("apart", "joint")],
        "datasets": [
            {"name": "Own", "folder": str(subjects / "raw")},
            {"name": "FLARE", "labels": "FLARE22", **folders},
        ],
        **changes,
    }
    path = tmp_path / "setup.json"
    path.write_text(json.dumps(content))
    return path


Run = Callable[..., str]


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


def rows_of(out: Path) -> dict[tuple[str, ...], str]:
    with (out / "scores.csv").open() as file:
        keys = ("model", "dataset", "case", "class", "measure")
        return {tuple(row[key] for key in keys): row["value"] for row in csv.DictReader(file)}


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


# --- finished predictions


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


P, R = "--predictions T={own}/labelsTr ", "--references {flare}/references"
WRONG_PREDICTIONS = {
    R: "finished predictions by --predictions NAME=FOLDER",
    P: "references of finished predictions by --references FOLDER",
    P + R: "give folder (a raw dataset of nnU-Net), or images, references and labels",
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
