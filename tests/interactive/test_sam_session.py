"""``stunet prompt`` with SAM-Med2D: pictures, and volumes slice by slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.interactive.find_sam import find_sam
from stunet_plugin.interactive.open_session import open_session

from conftest import Stunet
from dataset_helpers import read_array, write_array
from sam_helpers import TINY, SAMMed2D

CHECKPOINT = "checkpoint_final.pth"


def write_model(folder: Path, plans: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(1)
    content = {"network_weights": SAMMed2D(TINY).state_dict(), "trainer_name": "SAMMed2DTrainer"}
    if plans:
        content["init_args"] = {"plans": plans}
    (folder / "fold_0").mkdir(parents=True)
    torch.save(content, folder / "fold_0" / CHECKPOINT)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A volume (z, y, x) whose thickest axis is y."""
    random = np.random.default_rng(0)
    array = random.normal(size=(30, 6, 40)).astype(np.float32)
    return write_array(tmp_path / "scan.nii.gz", array, spacing=(1, 4, 2))


def test_a_volume_is_segmented_slice_by_slice(model: Path, scan: Path) -> None:
    session: Any = open_session(str(model), None, CHECKPOINT, "cpu")
    session.set_image(scan)
    boxed = session.add_box((5, 2, 3), (30, 3, 25))
    assert boxed.shape == (30, 6, 40)
    touched = np.flatnonzero(boxed.any((0, 2)))
    assert set(touched) <= {2, 3}
    # Each slice as a picture of its own, with the range of the volume.
    values = read_array(scan)
    low, high = values.min(), values.max()
    inner = session._interaction._sessions[3]
    alone = type(inner)(
        session._network,
        torch.from_numpy((values[:, 3] - low) / (high - low) * 255).round()[None],
        torch.device("cpu"),
    )
    assert np.array_equal(alone.box((5, 3), (31, 26)).numpy(), boxed[:, 3])
    clicked = session.add_point((20, 3, 10))
    assert np.array_equal(alone.point((20, 10)).numpy(), clicked[:, 3])
    assert np.array_equal(clicked[:, 2], boxed[:, 2])
    session.add_point((1, 5, 1), positive=False)
    assert session.undo()
    assert np.array_equal(session.mask, clicked)
    assert session.undo()
    assert np.array_equal(session.mask, boxed)
    session.reset()
    assert not session.mask.any()
    given = np.zeros((30, 6, 40), np.uint8)
    given[5:20, 1, 10:30] = 1
    assert set(np.flatnonzero(session.add_mask(given).any((0, 2)))) <= {1}
    assert session.prompts == ["mask"]


def test_command_goes_on_from_a_state(stunet: Stunet, model: Path, scan: Path) -> None:
    folder = stunet.folder
    state, first, second = (folder / x for x in ("state.npz", "first.nii.gz", "second.nii.gz"))
    box, point = ("--box", "5,2,3,30,3,25"), ("--point", "20,3,10")
    session: Any = open_session(str(model), None, CHECKPOINT, "cpu")
    session.set_image(scan)
    session.add_box((5, 2, 3), (30, 3, 25))
    whole = session.add_point((20, 3, 10))
    found = 0 if whole.any() else 1
    stunet("prompt", model, "-i", scan, "-o", first, *box, "--state", state, code=found)
    said = stunet("prompt", model, "-i", scan, "-o", second, *point, "--state", state, code=found)
    assert "box from voxel 5,2,3" in said
    assert np.array_equal(read_array(second), whole)
    assert sitk.ReadImage(str(second)).GetSpacing() == sitk.ReadImage(str(scan)).GetSpacing()


def test_pictures_are_taken_as_they_are(stunet: Stunet, model: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 200, (50, 60, 3)).astype(np.uint8)
    picture, out = stunet.folder / "picture.png", stunet.folder / "object.png"
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(picture))
    session: Any = open_session(str(model), None, CHECKPOINT, "cpu")
    session.set_image(picture)
    assert torch.equal(session._interaction.slices[0], torch.from_numpy(colours).movedim(2, 0))
    mask = session.add_box((5, 6), (40, 30))
    words = ("prompt", model, "-i", picture, "-o", out, "--box", "5,6,40,30")
    said = stunet(*words, code=0 if mask.any() else 1)
    assert " ml" not in said
    assert np.array_equal(read_array(out), mask[0])


def test_a_trained_model_sees_what_it_was_trained_on(tmp_path: Path, scan: Path) -> None:
    limits = {"percentile_00_5": -1.0, "percentile_99_5": 1.0}
    plans = {
        "configurations": {"2d": {"normalization_schemes": ["CTNormalization"]}},
        "foreground_intensity_properties_per_channel": {"0": limits},
    }
    model = write_model(tmp_path / "trained", plans)
    session: Any = open_session(str(model), None, CHECKPOINT, "cpu")
    session.set_image(scan)
    values = (np.clip(read_array(scan), -1, 1) + 1) / 2 * 255
    expected = torch.from_numpy(values).movedim(1, 0)[:, None].round()
    assert torch.equal(session._interaction.slices, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--box 5,2,3,30,3,25,-", "no boxes for where the object is not"),
        ("--scribble SCAN", "no scribbles"),
        ("--lasso SCAN", "no lassos"),
        ("--point 50,2,3", "outside of the image"),
        ("--point 5,2", "must be 3 numbers"),
        ("--point 5,2,3 -i SCAN SCAN", "takes one file"),
        ("--point 5,2,3 -o object.png", "for this image it must end in"),
        ("--point 5,2,3 -o object.txt", "this model writes"),
        ("--point 5,2,3 -f 3", "stunet"),
    ],
)
def test_bad_input_is_refused(
    words: str, message: str, stunet: Stunet, model: Path, scan: Path
) -> None:
    words = words.replace("SCAN", str(scan)).replace("object", str(stunet.folder / "object"))
    given = ["prompt", model, words]
    given += [] if "-i " in words else ["-i", scan]
    given += [] if "-o " in words else ["-o", stunet.folder / "object.nii.gz"]
    assert message in stunet.refuse(*given)


def test_what_is_not_here_is_said(stunet: Stunet, model: Path, tmp_path: Path) -> None:
    stunet.patch.setenv("STUNET_HOME", str(tmp_path / "home"))
    with pytest.raises(PluginError, match="sam-med2d is not here yet.*stunet import FILE"):
        find_sam("sam-med2d", None)
    assert find_sam(tmp_path, None) is None
    (model / "fold_1").mkdir()
    with pytest.raises(PluginError, match="has folds 0, 1. Choose one with -f"):
        find_sam(model, None)
