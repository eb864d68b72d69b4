"""Wrapped checkpoints, files that are none, and files damaged at random."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from stunet_plugin.commands.import_ import Import
from stunet_plugin.errors import PluginError
from stunet_plugin.weights.import_model import import_checkpoint
from stunet_plugin.weights.read_plans import read_plans_file
from stunet_plugin.weights.read_weights import read_weights

from import_helpers import checkpoint_in, refuse, stunet_import, v1_checkpoint, write_v1

DAMAGES = 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny.model"
    write_v1(path)
    return path


def wrapped(tiny: Path, prefix: str, lightning: bool) -> dict[str, Any]:
    content = torch.load(tiny, weights_only=False)
    weights = {prefix + name: value for name, value in content["state_dict"].items()}
    return {
        **content,
        "state_dict": weights,
        **({"pytorch-lightning_version": "2.4"} if lightning else {}),
    }


@pytest.mark.parametrize(
    ("prefix", "lightning"),
    [("module.", False), ("_orig_mod.", False), ("_orig_mod.module.", False), ("net.", True)],
)
def test_prefixes_of_wrappers_are_stripped_and_said(
    prefix: str, lightning: bool, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrapped.model"
    torch.save(wrapped(tiny, prefix, lightning), file)
    file.with_name("wrapped.model.pkl").write_bytes(tiny.with_name("tiny.model.pkl").read_bytes())
    for source, out in ((tiny, "plain"), (file, "model")):
        assert stunet_import(source, "--out", tmp_path / out) == 0
    said = capsys.readouterr().out
    assert f"{prefix!r} stripped" in said
    assert ("Lightning" in said) == lightning
    one, two = (checkpoint_in(tmp_path / name)["network_weights"] for name in ("plain", "model"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_keys_that_are_no_text_and_unknown_lightning_modules_get_a_sentence(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = wrapped(tiny, "", False)
    content["state_dict"][3] = torch.ones(1)
    torch.save(content, tmp_path / "key.model")
    assert "3" in refuse(capsys, tmp_path / "key.model", tmp_path / "out")
    torch.save(
        {"state_dict": {"a.b": torch.ones(1)}, "pytorch-lightning_version": "2"},
        tmp_path / "l.ckpt",
    )
    assert "a Lightning checkpoint" in refuse(capsys, tmp_path / "l.ckpt", tmp_path / "out")


@pytest.mark.parametrize("compressed", [True, False])
def test_an_image_is_called_one(
    compressed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ("image.nii.gz" if compressed else "image.nii")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), file)
    assert "a NIfTI image" in refuse(capsys, file, tmp_path / "out")


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        (
            "https://huggingface.co/ziyanhuang/STU-Net/resolve/main/base_ep4k.model?download=true",
            "stunet import hf://ziyanhuang/STU-Net/base_ep4k.model",
        ),
        ("https://huggingface.co/a/b/blob/v1/c/d.pth", "stunet import hf://a/b@v1/c/d.pth"),
        ("https://example.org/x.model", "download the file"),
    ],
)
def test_addresses_of_the_web_are_turned_into_those_of_the_hub(
    address: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stunet_import(address, "--out", tmp_path / "out") == 2
    assert advice in capsys.readouterr().err


def damaged(content: bytes, seed: int) -> bytes:
    """Cut, change, double or blank some of the bytes."""
    draw = random.Random(seed)
    data = bytearray(content)
    kind = seed % 4
    if kind == 0:
        return bytes(data[: draw.randrange(len(data))])
    if kind == 1:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randint(1, 200))
    if kind == 2:
        return bytes(data[:end] + data[start:])
    data[start:end] = bytes(end - start)
    return bytes(data)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints_are_refused_or_read_right(
    legacy: bool, tiny: Path, tmp_path: Path
) -> None:
    weights = torch.load(tiny, weights_only=False)["state_dict"]
    file, out = tmp_path / "x.model", tmp_path / "out"
    torch.save(v1_checkpoint(weights), file, _use_new_zipfile_serialization=not legacy)
    whole, read = file.read_bytes(), 0
    for seed in range(DAMAGES // 2):
        file.write_bytes(damaged(whole, seed))
        with contextlib.suppress(PluginError):
            found = read_weights(file)
            read += 1
            assert found.description.startswith("STU-Net tiny")
    assert read < 0.9 * DAMAGES // 2
    # What can be read is checked to its last byte before it is written: checksums of zip files.
    if not legacy:
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
        with pytest.raises(PluginError, match="damaged"):
            import_checkpoint(Import(str(file), out=str(out)))
        assert not out.exists()


def test_damaged_plans_are_refused_or_read_right(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert stunet_import(tiny, "--out", model) == 0
    for name, source in (
        ("plans.json", model / "plans.json"),
        ("plans.pkl", tiny.with_name("tiny.model.pkl")),
    ):
        whole = source.read_bytes()
        file = tmp_path / name
        expected = read_plans_file(source)
        for seed in range(DAMAGES):
            file.write_bytes(damaged(whole, seed))
            with contextlib.suppress(PluginError):
                plan = read_plans_file(file)
                assert len(plan.spacing) == len(expected.spacing)
                assert all(value > 0 for value in (*plan.spacing, *plan.patch_size))
