"""``stunet segment``: label maps, statistics, pictures; scans that are refused; resuming."""

from __future__ import annotations

import csv
import doctest
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import stunet_plugin
from stunet_plugin.cli import main
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.predictor import Model
from stunet_plugin.inference.slabs import Windows
from stunet_plugin.segmentation.memory import LIBRARIES, check_memory, least_memory
from stunet_plugin.segmentation.preview import _upright
from stunet_plugin.segmentation.segmenter import Segmentation, Segmenter, _only_air
from stunet_plugin.utils.dicom import read_series, series_of
from stunet_plugin.utils.discovery import walk
from stunet_plugin.utils.geometry import Grid
from stunet_plugin.utils.images import read_label_map

from dataset_helpers import change_json
from import_helpers import make_network, published_weights, v1_plans, write_v1
from unlabeled_helpers import ct_array, largest_file, write_dicom

NAMES = ["background", "liver", "spleen", "kidney_left", "kidney_right"]
SHAPE = (30, 34, 40)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUNET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STUNET_CPU", "torch")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of CT with random weights."""
    torch.manual_seed(0)
    source = write_v1(tmp_path / "m.model", published_weights(make_network()), v1_plans())
    words = ["import", str(source), "--out", str(tmp_path / "model"), "--labels", *NAMES]
    assert main(words) == 0
    change_json(tmp_path / "model" / "dataset.json", channel_names={"0": "CT"})
    return tmp_path / "model"


def write_scan(path: Path, seed: int = 0, least: float = -1000) -> Path:
    """A scan of noise in another orientation than ITK's own, with air around it."""
    array = np.random.default_rng(seed).normal(0, 60, SHAPE).cumsum(0).clip(-500, 500)
    array[:3] = least
    image = sitk.GetImageFromArray(array.astype(np.float32))
    image.SetSpacing((1.6, 1.7, 1.8))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetOrigin((5, 6, 7))
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def segment(*words: Any) -> int:
    return main(["segment", *map(str, words), "--quiet"])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "statistics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_scan_becomes_labels_statistics_and_a_picture(model: Path, tmp_path: Path) -> None:
    scan, out = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    assert segment(scan, "-o", out, "--model", model) == 0
    image, labels = sitk.ReadImage(str(scan)), read_label_map(out / "scan.nii.gz")
    assert labels.GetDirection() == image.GetDirection()
    assert np.allclose(labels.GetOrigin(), image.GetOrigin())
    found, values = (sitk.GetArrayFromImage(part) for part in (labels, image))
    expected = Model(model, mirroring=False).predict([scan]).labels
    assert np.array_equal(found, expected)
    table = rows(out)
    assert [row["structure"] for row in table] == NAMES[1:]
    for row in table:
        mask = found == int(row["labels"])
        assert float(row["volume_ml"]) == pytest.approx(
            mask.sum() * 1.6 * 1.7 * 1.8 / 1000, abs=1e-3
        )
        inside = mask[1:-1, 1:-1, 1:-1].sum()
        assert (row["touches_border"] == "True") == (inside < mask.sum())
        if mask.any():
            assert float(row["mean_intensity"]) == pytest.approx(values[mask].mean(), abs=0.02)
    run = json.loads((out / "run.json").read_text())
    assert run["scans"] == 1
    assert run["versions"]["nnunetv2"]
    assert (out / "preview.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_resumes_in_parts_and_formats(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for number, name in enumerate(("a.nii.gz", "b_0000.nii", "c.mha")):
        write_scan(scans / name, number)
    for part in (0, 1):
        assert segment(scans, "-o", out, "-m", model, "-num_parts", 2, "-part_id", part) == 0
    assert {row["scan"] for row in rows(out)} == {"a", "b", "c"}
    files = {path.name for path in out.iterdir()}
    assert {"a.nii.gz", "b.nii", "c.nii.gz", "preview_b.png", "run.json", "records"} <= files
    assert not [name for name in files if name.startswith(".partial")]
    (out / "b.nii").write_bytes((out / "b.nii").read_bytes()[:-1])
    write_scan(scans / "c.mha", 7)
    before = (out / "a.nii.gz").stat().st_mtime_ns
    capsys.readouterr()
    assert segment(scans, "-o", out, "-m", model) == 0
    assert "2 segmented, 1 were there already" in capsys.readouterr().out
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    assert segment(scans, "-o", out, "-m", model, "--structures", "liver") in (0, 1)
    assert "3 segmented" in capsys.readouterr().out


def test_a_dicom_series_gets_labels_in_its_geometry(model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "näme with space", tmp_path / "out"
    write_dicom(folder, ct_array(1, (12, 20, 22)), 1, "CT")
    assert segment(folder, "-o", out, "-m", model) in (0, 1)
    (series,) = series_of(next(walk([str(folder)], ())))
    image, labels = read_series(series), read_label_map(out / f"{folder.name}.nii.gz")
    assert Grid.of(labels).agrees(Grid.of(image))
    found = sitk.GetArrayFromImage(labels)
    voxel = float(np.prod(image.GetSpacing())) / 1000
    for row in rows(out):
        expected = (found == int(row["labels"])).sum() * voxel
        assert float(row["volume_ml"]) == pytest.approx(expected, abs=1e-3)
    again = stunet_plugin.segment(folder, model, device="cpu")
    # The reader of the model turns images to RAS, the arrays are as the files.
    assert np.array_equal(again.labels, found)
    assert np.array_equal(again.image, sitk.GetArrayFromImage(image))
    assert again.spacing == pytest.approx(image.GetSpacing()[::-1])


def test_no_file_of_others_is_lost(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, out = write_scan(tmp_path / "a" / "scan.nii.gz"), tmp_path / "out"
    other = write_scan(tmp_path / "b" / "scan.nii.gz", 1)
    before = scan.read_bytes()
    assert segment(scan, "-o", scan.parent, "-m", model) == 2
    assert "is the folder of the scans" in capsys.readouterr().err
    assert scan.read_bytes() == before
    out.mkdir()
    (out / "scan.nii.gz").write_text("drawn by hand")
    assert segment(scan, "-o", out, "-m", model) == 2
    assert "is no result of this command" in capsys.readouterr().err
    (out / "scan.nii.gz").unlink()
    with largest_file(1000):
        assert segment(scan, "-o", out, "-m", model) == 1
    assert "no space left" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["records"]
    assert segment(scan, "-o", out, "-m", model) in (0, 1)
    assert segment(other, "-o", out, "-m", model) == 2
    assert f"the result of another scan scan, {scan}." in capsys.readouterr().err


def test_structures_by_names_of_any_system(model: Path, tmp_path: Path) -> None:
    scan, out = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    words = ["-o", out, "-m", model, "--separate", "--structures", "Kidneys", "left kidney"]
    assert segment(scan, *words) == 0
    assert {row["structure"] for row in rows(out)} == {"kidney_left", "kidney_right"}
    masks = [sitk.GetArrayFromImage(read_label_map(x)) for x in sorted((out / "scan").iterdir())]
    assert [set(np.unique(mask)) <= {0, 1} for mask in masks] == [True, True]
    everything = Model(model, mirroring=False).predict([scan]).labels
    for value, mask in zip((3, 4), masks, strict=True):
        # Windows of random weights disagree much on what is greatest of the others.
        assert ((everything == value) != mask).mean() < 0.2


def test_an_array_from_python(model: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scan.nii.gz")
    found = stunet_plugin.segment(scan, model)
    array, properties = Model(model).read([scan])
    again = stunet_plugin.segment(array[0], model, spacing=properties["spacing"])
    assert np.array_equal(found.labels, again.labels)
    assert found.names == dict(enumerate(NAMES[1:], 1))
    for wrong in ({"spacing": None}, {"spacing": (1, 1)}):
        with pytest.raises(PluginError, match="spacing"):
            stunet_plugin.segment(array[0], model, **wrong)
    with pytest.raises(PluginError, match="shape"):
        stunet_plugin.segment(np.zeros((2, *SHAPE)), model, spacing=(1, 1, 1))


def test_the_examples_of_the_documentation_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scan(tmp_path / "ct.nii.gz")
    model.rename(tmp_path / "MODEL_FOLDER")
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(stunet_plugin)
    assert (failed, tried) == (0, 4), capsys.readouterr().out
    page = Path(__file__).parents[2] / "docs" / "segment.md"
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(code, {})
    assert "liver" in capsys.readouterr().out


@pytest.mark.parametrize("axes", [(-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, -1, 0)])
def test_previews_are_upright(axes: tuple[int, ...]) -> None:
    """Of a cube with its voxel nearest to the head, the front and the patient's right set."""
    labels = np.zeros((2, 3, 4), np.uint8)
    direction = np.reshape(axes, (3, 3))
    corner = [
        0
        if direction[:, axis].sum() * (1, 1, -1)[int(abs(direction[:, axis]).argmax())] > 0
        else -1
        for axis in (2, 1, 0)
    ]
    labels[tuple(corner)] = 1
    found = Segmentation(
        labels, {}, {}, labels, (1.0, 2.0, 3.0), {"sitk_stuff": {"direction": axes}}, Windows()
    )
    upright, titles = _upright(found)
    assert titles[0] == "axial"
    assert upright.labels[0, 0, 0] == 1
    assert upright.labels.sum() == 1


def test_wrong_input_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, out = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    write_scan(tmp_path / "mr.nii.gz", least=0)
    sitk.WriteImage(abs(sitk.ReadImage(str(scan))), str(tmp_path / "mr.nii.gz"))
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(scan.read_bytes()[:-500])
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "a.nii.gz").symlink_to("/nowhere.nii.gz")
    image = sitk.ReadImage(str(scan))
    sitk.WriteImage(image[:, :, :1], str(tmp_path / "slice.nii.gz"))
    sitk.WriteImage(image > 0, str(tmp_path / "labels.nii.gz"))
    for given, more, said in (
        (tmp_path / "mr.nii.gz", (), "no CT in Hounsfield units"),
        (tmp_path / "slice.nii.gz", (), "is no volume: 1 x 34 x 40 voxels"),
        (tmp_path / "labels.nii.gz", (), "looks like a label map"),
        (tmp_path / "nowhere", (), "link to nowhere"),
        (damaged, (), "damaged.nii.gz"),
        (tmp_path / "none.nii.gz", (), "does not exist"),
        (tmp_path / "text.txt", (), "no image that is known"),
        (tmp_path / "empty", (), "holds no scans"),
        (scan, ("--structures", "lver"), "Did you mean liver"),
        (scan, ("-num_parts", 2, "-part_id", 2), "must be from 0 to 1"),
        (scan, ("-f", 7), "fold_7"),
    ):
        assert segment(given, "-o", out, "-m", model, *more) == 2, given
        assert said in capsys.readouterr().err
        assert not out.exists()
    assert segment(tmp_path / "mr.nii.gz", "-o", out, "-m", model, "--force") in (0, 1)
    change_json(model / "dataset.json", channel_names={"0": "T1", "1": "T2"})
    assert segment(scan, "-o", out, "-m", model) == 2


def test_what_does_not_fit_into_memory_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, spacing = Model(model).predictor, (1.5, 1.5, 1.5)
    needed = [least_memory(predictor, (1, size, size, size), spacing) for size in (100, 400)]
    # The image three times, the input three times, and the slab of five outputs in half precision.
    grown = (400**3 - 100**3) * 24 + (400**2 - 100**2) * 32 * 5 * 2
    assert needed[1] - needed[0] == pytest.approx(grown)
    loaded = LIBRARIES + sum(x.numel() for x in predictor.network.parameters()) * 4
    half = sum(needed) / 2 - loaded
    for free, size, said in (
        (half, 100, ""),
        (half, 400, "[0-9.]+ million voxels would fit"),
        (-loaded, 100, r"and 0.0 GB are there\. Take a smaller model"),
    ):
        monkeypatch.setattr("stunet_plugin.segmentation.memory.free_memory", lambda free=free: free)
        with pytest.raises(PluginError, match=said) if said else nullcontext():
            check_memory(predictor, "scan", (1, size, size, size), spacing)


def test_regions_are_whole(model: Path, tmp_path: Path) -> None:
    labels = {
        "background": 0,
        "all": [1, 2, 3, 4, 5],
        "../core": [2, 3],
        "c": 3,
        "d": [4, 5],
        "e": 5,
    }
    change_json(model / "dataset.json", labels=labels, regions_class_order=[1, 2, 3, 4, 5])
    scan, out = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    assert segment(scan, "-o", out, "-m", model, "--all-windows") == 0
    found = sitk.GetArrayFromImage(read_label_map(out / "scan.nii.gz"))
    volumes = {row["structure"]: float(row["volume_ml"]) for row in rows(out)}
    whole = (found > 0).sum() * 1.6 * 1.7 * 1.8 / 1000
    assert volumes["all"] == pytest.approx(whole, abs=1e-3)
    assert segment(scan, "-o", out, "-m", model, "--all-windows", "--separate") == 0
    assert {path.name for path in (out / "scan").iterdir()} == {
        f"{name}.nii.gz" for name in ("all", "_core", "c", "d", "e")
    }


def test_air_is_left_out() -> None:
    image = np.full((40, 40, 40), -1000.0)
    image[20:30, 20:30, 20:30] = 0
    is_air = _only_air(image, (80, 80, 80))
    assert is_air([slice(0, 20)] * 3)
    assert is_air([slice(-10, 20)] * 3)
    assert not is_air([slice(0, 42)] * 3)
    assert not is_air([slice(40, 60)] * 3)


def test_nothing_found_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, out = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "out"
    monkeypatch.setattr("stunet_plugin.segmentation.segmenter._only_air", lambda *_: lambda _: True)
    assert segment(scan, "-o", out, "-m", model) == 1
    assert "nothing was found in scan" in capsys.readouterr().out
    assert Segmenter(model).modality == "CT"
