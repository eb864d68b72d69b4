"""`stunet doctor -d`: each planted fault is found, and nothing is found where nothing is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from stunet_plugin.datasets import needs
from stunet_plugin.datasets.case_facts import spread
from stunet_plugin.demo import phantom

from conftest import Stunet
from dataset_helpers import change_json, read_array, write_array

CASES = 7
SIZE = 24
TURNED = (-1, 0, 0, 0, -1, 0, 0, 0, 1)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT of seven cases with two organs."""
    folder = tmp_path_factory.mktemp("raw") / "Dataset004_Healthy"
    rng = np.random.default_rng(1)
    for number in range(CASES):
        image = rng.normal(40, 20, (SIZE,) * 3).astype(np.int16)
        image[:, :4] = -1000
        labels = np.zeros((SIZE,) * 3, np.uint8)
        labels[4:12, 8:16, 8:16], labels[14:20, 8:16, 8:16] = 1, 2
        place = {"spacing": (1 + 0.05 * number, 1, 2), "origin": (number, 5, -3)}
        write_array(folder / "imagesTr" / f"case{number}_0000.nii.gz", image, **place)
        write_array(folder / "labelsTr" / f"case{number}.nii.gz", labels, **place)
    labels = {"background": 0, "liver": 1, "spleen": 2}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": CASES}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    return folder


Change = Callable[[Path], object]


def image_of(folder: Path, case: int = 3) -> Path:
    return folder / "imagesTr" / f"case{case}_0000.nii.gz"


def label_of(folder: Path, case: int = 3) -> Path:
    return folder / "labelsTr" / f"case{case}.nii.gz"


def both(change: Callable[[Any], Any]) -> Change:
    """Change image and labels of one case."""

    def planted(folder: Path) -> None:
        for file in (image_of(folder), label_of(folder)):
            sitk.WriteImage(change(sitk.ReadImage(str(file))), str(file))

    return planted


def rewritten(file: Callable[[Path], Path], change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the voxels of a file, not its header."""

    def planted(folder: Path) -> None:
        image = sitk.ReadImage(str(file(folder)))
        changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file(folder)))

    return planted


def spaced(image: Any) -> Any:
    image.SetSpacing((1, 1, 12))
    return image


def turned_labels(folder: Path) -> None:
    labels = sitk.DICOMOrient(sitk.ReadImage(str(label_of(folder))), "RAS")
    sitk.WriteImage(labels, str(label_of(folder)))


def cut_file(folder: Path) -> None:
    whole = image_of(folder).read_bytes()
    image_of(folder).write_bytes(whole[: len(whole) // 2])


def test_case(folder: Path) -> None:
    (folder / "imagesTs").mkdir()
    shutil.copy(image_of(folder), folder / "imagesTs" / "other_0000.nii.gz")


test_case.__test__ = False  # type: ignore[attr-defined]

FAULTS: dict[str, tuple[Change, str, str]] = {
    "orientations": (both(lambda x: sitk.DICOMOrient(x, "RAS")), "orientation", "RAS in 1 (case3)"),
    "spacing": (both(spaced), "spacing", "case3 (1 x 1 x 12 mm)"),
    "cut images": (both(lambda x: x[:, :, :6]), "size", "case3 (6 x 24 x 24)"),
    "a value that nobody declared": (
        rewritten(label_of, lambda x: np.where(x == 2, 5, x).astype(np.uint8)),
        "labels",
        "hold values that nobody declared (case3: [5])",
    ),
    "a gap": (
        lambda x: change_json(x / "dataset.json", labels={"background": 0, "liver": 1, "tail": 3}),
        "label values",
        "does not declare 2, but 3",
    ),
    "an empty label map": (rewritten(label_of, np.zeros_like), "empty labels", "case3"),
    "a class that nobody has": (
        lambda x: change_json(
            x / "dataset.json", labels={"background": 0, "liver": 1, "spleen": 2, "aorta": 3}
        ),
        "classes",
        "no case has aorta",
    ),
    "labels in another order": (turned_labels, "grids", "are stored in another order"),
    "labels on other voxels": (
        lambda x: write_array(label_of(x), np.ones((SIZE, SIZE, 9), np.uint8), spacing=(1, 1, 2)),
        "grids",
        "have other voxels than their images (case3: image 24 x 24 x 24",
    ),
    "no Hounsfield units": (
        rewritten(image_of, lambda x: (x + 1024).astype(np.int16)),
        "intensities",
        "1 CT images are not in Hounsfield units: case3 (24 to ",
    ),
    "one value": (rewritten(image_of, np.zeros_like), "intensities", "one value in all voxels"),
    "the same image twice": (
        lambda x: rewritten(image_of, lambda _: read_array(image_of(x, 5)).astype(np.float32))(x),
        "duplicates",
        "case3 = case5",
    ),
    "a test image": (test_case, "duplicates", "case3 = other_0000.nii.gz of imagesTs"),
    "a damaged file": (cut_file, "files", "case3_0000.nii.gz: cut off or damaged"),
    "a wrong number": (
        lambda x: change_json(x / "dataset.json", numTraining=9),
        "files",
        "7 cases, and numTraining is 9",
    ),
    "no labels": (lambda x: label_of(x).unlink(), "dataset", "1 of 7 cases have no labels"),
}
"""A change of the dataset, and the finding that tells of it."""
ALLOWED_BESIDE = {"a gap": {"labels", "classes"}, "one value": {"duplicates"}}
"""What else such a fault is."""


def examine(stunet: Stunet, folder: Path, code: int | None = None) -> dict[str, Any]:
    """Every finding that is not ok."""
    stunet.capsys.readouterr()
    from stunet_plugin.cli import main

    given = main(["doctor", "-d", str(folder), "-np", "1", "--json"])
    found = json.loads(stunet.capsys.readouterr().out)
    assert given == (1 if found["wrong"] else 0)
    return {x["what"]: x for x in found["findings"] if x["mark"] != "ok"}


def test_a_healthy_dataset_has_no_findings(healthy: Path, stunet: Stunet) -> None:
    assert examine(stunet, healthy) == {}
    said = stunet("doctor", "-d", healthy, "-np", 1)
    assert "[ok] files: 7 cases; voxels read of all" in said
    assert "\nThe dataset is fine. `stunet doctor` alone" in said


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, healthy: Path, stunet: Stunet) -> None:
    folder = stunet.folder / healthy.name
    shutil.copytree(healthy, folder)
    change, what, state = FAULTS[name]
    change(folder)
    found = examine(stunet, folder)
    assert state in found[what]["state"]
    assert found[what]["advice"] or what == "dataset"
    # And nothing else.
    assert set(found) - {what} <= ALLOWED_BESIDE.get(name, set())


GB = 1024**3


@pytest.mark.parametrize(
    ("change", "what", "mark", "words"),
    [
        ({"free": 2 * GB}, "memory", "warning", "export nnUNet_def_n_proc=3"),
        ({"free": GB / 10}, "memory", "wrong", "Not even one fits"),
        ({"shm": 10_000}, "shared memory", "warning", "--shm-size"),
        ({"compiler": None}, "compiler", "wrong", "nnUNet_compile=f"),
    ],
)
def test_what_the_machine_lacks(
    change: dict[str, Any], what: str, mark: str, words: str, healthy: Path, stunet: Stunet
) -> None:
    machine = {"free": 64 * GB, "shm": 8 * GB, "compiler": "/usr/bin/gcc"} | change
    patch = stunet.patch.setattr
    patch(needs, "free_memory", lambda: machine["free"])
    patch(needs.shutil, "disk_usage", lambda _: SimpleNamespace(free=machine["shm"]))
    patch(needs.shutil, "which", lambda _: machine["compiler"])
    patch(needs.torch.cuda, "is_available", lambda: True)
    patch(needs, "SHARED_MEMORY", healthy)
    patch("nnunetv2.configuration.default_num_processes", 8)
    found = examine(stunet, healthy)
    assert set(found) == {what}
    assert (found[what]["mark"], words in found[what]["advice"]) == (mark, True)


def test_the_patch_of_plans(healthy: Path, stunet: Stunet) -> None:
    """Where a dataset is planned, its images are compared with that patch."""
    file = stunet.folder / healthy.name / "nnUNetPlans.json"
    file.parent.mkdir()
    configuration = {"patch_size": [64, 64, 64], "batch_size": 2}
    file.write_text(json.dumps({"configurations": {"3d_fullres": configuration}}))
    stunet.patch.setenv("nnUNet_preprocessed", str(stunet.folder))
    assert (
        "7 cases are below half of the patch, 64 x 64 x 64"
        in examine(stunet, healthy)["size"]["state"]
    )


def test_no_false_alarm_on_the_demos_data(tmp_path: Path, stunet: Stunet) -> None:
    phantom.write_dataset(tmp_path / "Dataset901_Phantoms")
    assert examine(stunet, tmp_path / "Dataset901_Phantoms") == {}


def test_no_false_alarm_on_hippocampus(shared: Path, stunet: Stunet) -> None:
    assert examine(stunet, shared / "data" / "Dataset004_Hippocampus") == {}


def test_wrong_options_and_order(stunet: Stunet, healthy: Path) -> None:
    assert "-np must be at least 1" in stunet("doctor -np 0 -d", healthy, code=2)
    assert "is not a folder" in stunet("doctor -d", stunet.folder / "none", code=2)
    files = [Path(str(number)) for number in range(11)]
    assert sorted(spread(files)) == sorted(files)
    assert [file.name for file in spread(files)][:4] == ["0", "8", "4", "2"]
