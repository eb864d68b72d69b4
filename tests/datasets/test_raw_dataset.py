"""Descriptions of datasets, and where their files are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stunet_plugin.datasets.raw_dataset import find_raw, list_images, read_raw
from stunet_plugin.errors import PluginError

from damage import damaged_json
from dataset_helpers import change_json, write_dataset


def test_datasets_are_found_by_id_name_and_path(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = raw / "Dataset001_A"
    assert find_raw("1") == find_raw("Dataset001_A") == find_raw(str(folder)) == folder
    (raw / "Dataset001_Other").mkdir()
    for given in ("1", "7", "Dataset009_X", str(raw / "nothing")):
        with pytest.raises(PluginError):
            find_raw(given)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(PluginError, match="nnUNet_raw is not set"):
        find_raw("1")


def test_files_that_the_description_lists(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = raw / "Dataset001_A"
    monkeypatch.setenv("ELSEWHERE", str(raw / "Dataset002_B"))
    listed = {
        name: {"images": [f"{base}imagesTr/{x}_0000.nii.gz"], "label": f"{base}labelsTr/{x}.nii.gz"}
        for name, base, x in (("x", "", "case0"), ("y", "$ELSEWHERE/", "case1"))
    }
    change_json(folder / "dataset.json", dataset=listed)
    x, y = read_raw(folder).cases
    assert x.images == (folder / "imagesTr" / "case0_0000.nii.gz",)
    assert y.label == raw / "Dataset002_B" / "labelsTr" / "case1.nii.gz"
    change_json(folder / "dataset.json", dataset={"x": {"images": "one"}})
    with pytest.raises(PluginError, match="'dataset' is not as nnU-Net has it"):
        read_raw(folder)


def test_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("a_0000.png", "b_0000.png", "._c_0000.png", "d.png", "e_0000.nii.gz"):
        (tmp_path / name).touch()
    assert list(list_images(tmp_path, ".png", 3)) == ["a", "b"]
    with pytest.raises(PluginError, match="case e has 1 image"):
        list_images(tmp_path, ".nii.gz", 2)
    (tmp_path / "a_0002.png").touch()
    with pytest.raises(PluginError, match="case a has 2 image"):
        list_images(tmp_path, ".png", 3)


@pytest.mark.parametrize(
    ("ending", "name", "message"),
    [
        (".nii.gz", "imagesTr/case1_0000.nii.gz", "1 label maps have no image"),
        (".nii.gz", "labelsTr/case1.nii.gz", "1 of 3 cases have no labels"),
        (".tif", "imagesTr/case1.json", "case1_0000.tif has no .json with its spacing"),
    ],
)
def test_lost_files_are_said(tmp_path: Path, ending: str, name: str, message: str) -> None:
    folder = write_dataset(tmp_path / "Dataset001_A", {"liver": 1}, 3, "CT", ending)
    for number in range(3):
        (folder / f"imagesTr/case{number}.json").write_text('{"spacing": [3, 2, 1]}')
    assert len(read_raw(folder).cases) == 3
    (folder / name).unlink()
    with pytest.raises(PluginError, match=message):
        read_raw(folder)


def test_damaged_descriptions_end_in_a_sentence_or_the_right_dataset(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_A", {"liver": 1}, 3)
    content = json.loads((folder / "dataset.json").read_text())
    for kind, text in damaged_json(content, 200):
        (folder / "dataset.json").write_text(text)
        try:
            found = read_raw(folder)
        except PluginError as error:
            assert "Dataset001_A" in str(error)  # noqa: PT017
        else:
            assert (len(found.cases), len(found.channels)) == (3, 1), kind
