"""``stunet prompt`` and its session: geometry, frames, state, undo, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.interactive import session as sessions
from stunet_plugin.interactive.session import PromptSession
from stunet_plugin.prompts.interaction import Interaction

from conftest import Stunet
from dataset_helpers import read_array, write_array
from prompt_helpers import AS_THEY_ARE, Obedient, write_model

ORIGIN, SPACING = (10.0, -20.0, 30.0), (2.0, 2.5, 3.0)
TURNED = (-1, 0, 0, 0, 0, 1, 0, 1, 0)
"""x runs to the right, y upwards, z to the front."""
CUBE = (slice(6, 12), slice(9, 18), slice(20, 30))  # z, y, x


def scan(path: Path, **geometry: Any) -> Path:
    array = np.random.default_rng(1).normal(100, 5, (20, 30, 40)).astype(np.float32)
    array[CUBE] += 900
    return write_array(path, array, **{"origin": ORIGIN, "spacing": SPACING, **geometry})


@pytest.fixture(autouse=True)
def obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    def interaction(_: Any, *others: Any) -> Interaction:
        return Interaction(Obedient(), *others)

    monkeypatch.setattr(sessions, "Interaction", interaction)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), TURNED])
def test_one_place_in_every_frame_and_geometry(
    stunet: Stunet, tmp_path: Path, reader: str, direction: tuple[int, ...]
) -> None:
    """The file's voxel, LPS and RAS name the same place, whatever the reader does."""
    image = scan(tmp_path / "scan.nii.gz", direction=direction)
    model = write_model(tmp_path, reader=reader, **AS_THEY_ARE)
    places = {"voxel": (25, 13, 8)}
    lps = sitk.ReadImage(str(image)).TransformIndexToPhysicalPoint((25, 13, 8))
    places |= {"lps": lps, "ras": (-lps[0], -lps[1], lps[2])}
    said = set()
    for frame, place in places.items():
        out = tmp_path / f"{frame}.nii.gz"
        text = ",".join(f"{x:g}" for x in place)
        told = stunet(
            "prompt", model, "-i", image, "-o", out, f"--point={text}", "--coordinates", frame
        )
        said.add(next(line for line in told.splitlines() if line.startswith("Prompt:")))
        assert "Object:       540 voxels, 8.100 ml" in told
        made, given = sitk.ReadImage(str(out)), sitk.ReadImage(str(image))
        assert np.allclose(made.GetDirection(), given.GetDirection(), atol=1e-5)
        assert np.allclose(made.GetOrigin(), given.GetOrigin(), atol=1e-4)
        found = read_array(out)
        assert found.sum() == found[CUBE].sum() == 540
    assert len(said) == 1
    assert "point at voxel 25,13,8, RAS " in said.pop()


def test_prompts_of_all_kinds_in_a_resampled_space(tmp_path: Path) -> None:
    session = PromptSession(write_model(tmp_path))
    with pytest.raises(PluginError, match="No image yet"):
        session.add_point((1, 2, 3))
    session.set_image(scan(tmp_path / "scan.nii.gz"))
    assert session._interaction.shape != session.shape
    line = np.zeros(session.shape, np.uint8)
    line[8, 12, 22:28] = 1
    assert 400 < session.add_scribble(line).sum() < 700
    drawn = session._interaction.prompts[-1]
    assert drawn.values.count_nonzero() >= 2
    assert session.undo()
    assert session.mask.sum() == 0
    outline = np.zeros(session.shape, np.uint8)
    outline[8][CUBE[1:]] = 1
    assert session.add_lasso(outline).sum() > 400
    session.reset()
    assert session.add_box((18, 8, 8), (32, 19, 8)).sum() > 400
    assert session.add_box((18, 8, 5), (32, 19, 12), positive=False).sum() == 0
    rough = np.zeros(session.shape, np.uint8)
    rough[5:12, 8:18, 19:30] = 7
    session.reset()
    assert session.add_mask(rough, label=7).sum() > 400
    assert session.prompts == ["mask"]


def test_a_state_goes_on_and_takes_back(stunet: Stunet, tmp_path: Path) -> None:
    image, model = scan(tmp_path / "scan.nii.gz"), write_model(tmp_path, **AS_THEY_ARE)
    line = np.zeros((20, 30, 40), np.uint8)
    line[10, 12, 22:28] = 1
    scribble = write_array(tmp_path / "line.nii.gz", line, ORIGIN, SPACING)
    out, state = tmp_path / "out.nii.gz", tmp_path / "state.npz"
    what = ("prompt", "--model", model, "-i", image, "-o", out, "--state", state)
    stunet(*what, "--scribble", scribble, "--point", "25,13,8")
    first = read_array(out)
    told = stunet(*what, "--point", "25,13,8,-")
    assert [line.split(": ")[1].strip()[:9] for line in told.splitlines()[:3]] == [
        "scribble",
        "point at ",
        "not here,",
    ]
    assert 0 < read_array(out).sum() < first.sum()
    stunet(*what, "--undo")
    assert np.array_equal(read_array(out), first)
    other = scan(tmp_path / "other.nii.gz", origin=(0, 0, 0))
    what = ("prompt", model, "-i", other, "-o", tmp_path / "o.nii.gz", "--point", "25,13,8")
    assert "is of another scan" in stunet.refuse(*what, "--state", state)
    state.write_bytes(state.read_bytes()[:200])
    assert "no state of `stunet prompt`, or is damaged" in stunet.refuse(*what, "--state", state)


def test_wrong_input_is_refused_in_a_sentence(stunet: Stunet, tmp_path: Path) -> None:
    image, model = scan(tmp_path / "scan.nii.gz"), write_model(tmp_path / "a", **AS_THEY_ARE)
    labels = np.zeros((20, 30, 40), np.uint8)
    empty = write_array(tmp_path / "empty.nii.gz", labels, ORIGIN, SPACING)
    labels[5:9, 5:9, 5:9] = 1
    shifted = write_array(tmp_path / "shifted.nii.gz", labels, (0, 0, 0), SPACING)
    labels[2, 2, 2] = 4
    two = write_array(tmp_path / "two.nii.gz", labels, ORIGIN, SPACING)
    untrained = write_model(tmp_path / "b", radii=())
    point, out = ("--point", "25,13,8"), tmp_path / "out.nii.gz"

    def refuse(
        *arguments: object, scan: Path = image, model: object = model, to: Path = out
    ) -> str:
        return stunet.refuse("prompt", model, "-i", scan, "-o", to, *arguments)

    assert "outside of the image: x 0 to 39, y 0 to 29, z 0 to 19." in refuse("--point", "40,1,1")
    # In millimetres this is inside.
    assert "Did you mean --coordinates lps?" in refuse("--point=60,20,54")
    assert "A box's corner 25,13,20" in refuse("--box", "1,1,1,25,13,20")
    assert "has no extent: its corners must differ" in refuse("--box", "1,1,1,25,1,1")
    assert "must be x,y,z" in refuse("--point", "1,2,three")
    assert "must be 3 numbers" in refuse("--point", "1,2")
    assert "on another grid than the scan" in refuse("--mask", shifted)
    assert "is empty: no voxel differs" in refuse("--scribble", empty)
    assert "holds the labels 1, 4. Say which one: --label" in refuse("--mask", two)
    assert "has no voxel of label 3. There are: 1, 4" in refuse("--mask", two, "--label", 3)
    assert "was not trained to follow prompts" in refuse(*point, model=untrained)
    assert "is no model folder" in refuse(*point, model=tmp_path)
    assert "another number of channels (2, expected 1)" in stunet.refuse(
        "prompt", model, "-o", out, *point, "-i", image, image
    )
    assert "No prompt: give --point" in refuse()
    assert "this model writes .nii.gz" in refuse(*point, to=tmp_path / "out.png")
    assert "must be other files than the scan" in refuse(*point, to=image)
    assert "is there already" in refuse(*point, to=empty)
    assert "name its --state file" in refuse("--undo")
    assert "Give one model" in refuse(*point, "--model", model)


def test_a_state_keeps_the_networks_own_result(tmp_path: Path) -> None:
    """Without Obedient: the real network of the model, on the CPU."""
    image = scan(tmp_path / "scan.nii.gz")
    session = PromptSession(write_model(tmp_path))
    session.set_image(image)
    session._interaction = Interaction(
        session._network, session._interaction.image, (16, 32, 32), torch.device("cpu")
    )
    mask = session.add_point((25, 13, 8))
    session.save_state(tmp_path / "state.npz")
    again = PromptSession(session.model.folder)
    again.set_image(image)
    again.load_state(tmp_path / "state.npz")
    assert np.array_equal(again.mask, mask)
    assert again.prompts == session.prompts
