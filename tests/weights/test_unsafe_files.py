"""Untrusted files: each is refused with a message that says what it is, runs nothing and leaves
nothing, or is read right."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.identify import read_weights
from stunet_plugin.weights.read_plans import read_plans_file
from stunet_plugin.weights.safe_loading import load_checkpoint, load_plans_pickle

import import_helpers as helpers
from conftest import Stunet
from import_helpers import MARKER, WritesAFile


def endless() -> list[Any]:
    """A few hundred bytes in a file, 2**60 values when written out."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


def rewrite_zip(path: Path, replace: tuple[bytes, bytes] = (b"", b""), method: int = 0) -> None:
    """Write a zip archive again, with bytes of its ``data.pkl`` replaced or another compression."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            changed = content.replace(*replace) if name.endswith("data.pkl") else content
            archive.writestr(name, changed)


def append(path: Path, name: str, mode: Any = "a") -> None:
    with zipfile.ZipFile(path, mode) as archive:
        archive.writestr(name or archive.namelist()[0], "x")


def wrong_byte(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        position = max(archive.infolist(), key=lambda entry: entry.file_size).header_offset + 5000
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def old_format(path: Path, content: Any = None) -> None:
    content = content or torch.load(path, weights_only=False)
    torch.save(content, path, _use_new_zipfile_serialization=False)


EVIL = helpers.v1_checkpoint({"a": WritesAFile()})
LIGHTNING = {"state_dict": {"a.b": torch.ones(1)}, "pytorch-lightning_version": "2"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (EVIL, "posix.system"),
        (lambda path: old_format(path, EVIL), "posix.system"),
        (lambda path: path.write_bytes(pickle.dumps(EVIL)), "plain pickle"),
        (lambda path: append(path, "fold_0/model.txt", "w"), "no torch file"),
        (lambda path: append(path, ""), "the same entry twice"),
        (lambda path: rewrite_zip(path, method=zipfile.ZIP_DEFLATED), "compressed"),
        (cut, "truncated"),
        (lambda path: (old_format(path), cut(path)), "damaged"),
        (wrong_byte, "checksum"),
        (lambda path: torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(path)), "TorchScript"),
        (b"\n<!DOCTYPE html><html><head><title>Quota</title></head></html>", "web page (HTML)"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"\x00" * 100, "starts with"),
        (Path.unlink, "no such file"),
        ({"state_dict": {}, "best": np.datetime64("2020-01-01")}, "'M8' is not allowed"),
        (LIGHTNING, "pytorch-lightning_version, its tensors a.b"),
    ],
)
def test_unsafe_file_is_refused(content: Any, message: str, stunet: Stunet, tiny: Path) -> None:
    stunet.patch.chdir(tiny.parent)
    if callable(content):
        content(tiny)
    elif isinstance(content, bytes):
        tiny.write_bytes(content)
    else:
        torch.save(content, tiny)
    said = stunet.refuse_import(tiny)
    assert message in said
    assert "weights_only" not in said, "torch's advice to trust the file must not be passed on"
    assert not Path(MARKER).exists()


NORM = "conv_blocks_context.2.0.norm1.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: torch.full((16,), torch.nan)}, "1 of 130 tensors hold NaN or infinite"),
        ({NORM: torch.ones(15)}, "(15,), expected (16,)"),
        ({NORM: torch.ones(16, dtype=torch.int64)}, "no plain tensor"),
        ({NORM: torch.ones(1).expand(16)}, "claims 16 values"),
        ({NORM: None}, "1 of 130 tensors are missing"),
        ({"conv_blocks_context.3.0.conv1.weight": None}, "stages"),
        ({"more": torch.ones(1)}, "'more'"),
    ],
)
def test_wrong_weights_are_refused(
    changes: dict[Any, Any], message: str, stunet: Stunet, tiny: Path
) -> None:
    weights = {**helpers.published_weights(helpers.make_network()), **changes}
    helpers.write_v1(tiny, {name: value for name, value in weights.items() if value is not None})
    assert message in stunet.refuse_import(tiny)


@pytest.mark.parametrize("renamed", [True, False])
def test_checkpoints_of_either_numpy_load(renamed: bool, tiny: Path) -> None:
    """numpy 1 wrote numpy.core, numpy 2 writes numpy._core; published files are of both."""
    names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    rewrite_zip(tiny, names if renamed else names[::-1])
    assert load_checkpoint(tiny)["best_stuff"] == (None, 0.3, 0.9)


@pytest.mark.parametrize("protocol", [2, 5])
def test_plans_with_numpy_come_as_plain_numbers(protocol: int, tmp_path: Path) -> None:
    content = {
        "array": np.array([[1, 2], [3, 4]], dtype=">i2"),
        "fortran": np.asfortranarray([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        "numbers": (np.float32(1.5), np.bool_(True)),
        "table": OrderedDict([(0, ("a", {1, 2}))]),
    }
    path = tmp_path / "plans.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    arrays = {name: content[name].tolist() for name in ("array", "fortran")}
    plain = arrays | {"numbers": (1.5, True), "table": {0: ("a", {1, 2})}}
    # The text tells True from 1.0, and a dict from one of another class.
    assert repr(load_plans_pickle(path)) == repr(plain)


def code(*parts: bytes | str) -> bytes:
    """A pickle of protocol 5; text stands for a short string."""
    written = (x if isinstance(x, bytes) else b"\x8c" + bytes([len(x)]) + x.encode() for x in parts)
    return b"\x80\x05" + b"".join(written) + b"."


ORDERED = ("collections", "OrderedDict")
FIELDS = b"}NN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
SMALL_INTEGERS = pickle.dumps({"a": np.arange(3, dtype=np.int16)}, protocol=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"more": WritesAFile()}), "posix.system"),
        (pickle.dumps({"more": np.array([WritesAFile()], dtype=object)}), "'O8' is not allowed"),
        (pickle.dumps({"more": endless()}), "nested without end"),
        # One instruction that makes CPython's unpickler reserve 16 GB: "remember this under the
        # number 2**31 - 1".
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "all memory"),
        (code(*ORDERED, b"\x93N}", "function", b"K\x01s\x86b"), "AttributeError"),
        (code("numpy", "dtype", b"\x93", "f8", b"\x85R(K\x03", "<", FIELDS), "fields"),
        (code("_codecs", "encode", b"\x93", "a", "zlib", b"\x86R"), "'zlib' is not allowed"),
        (code("a", "b", b"\x86Q"), "BINPERSID"),
        (SMALL_INTEGERS.replace(b"K\x03\x85", b"K\x09\x85"), "shape"),
    ],
)
def test_unsafe_plans_are_refused(content: bytes, message: str, stunet: Stunet, tiny: Path) -> None:
    stunet.patch.chdir(tiny.parent)
    path = tiny.with_name("tiny.model.pkl")
    path.write_bytes(content)
    said = stunet.refuse_import(tiny)
    assert message in said
    assert not Path(MARKER).exists()
    # What was refused must not have changed the reader for the next file.
    path.write_bytes(pickle.dumps(helpers.v1_plans()))
    assert load_plans_pickle(path)["name"] == "STUNetTrainer_tiny"


@pytest.mark.parametrize(
    "name",
    ["source/tiny.model", "source/old.model", "source/tiny.model.pkl", "models/model_0/plans.json"],
)
def test_damaged_files_are_refused_or_read_right(name: str, stunet: Stunet, tiny: Path) -> None:
    """200 times some of the bytes are cut, doubled, blanked or changed."""
    stunet.model(tiny)
    old = tiny.with_name("old.model")
    old.write_bytes(tiny.read_bytes())
    old_format(old)
    file, refused = stunet.folder / name, 0
    whole = file.read_bytes()
    for seed in range(200):
        draw = random.Random(seed)
        start, length = draw.randrange(len(whole)), draw.randint(1, 200)
        hit, after = whole[start:][:length], whole[start + length :]
        new = (b"", hit * 2 + after, bytes(len(hit)) + after, draw.randbytes(4) + hit[4:] + after)
        file.write_bytes(whole[:start] + new[seed % 4])
        try:
            if file.suffix == ".model":
                assert read_weights(file).description.startswith("STU-Net tiny")
            else:
                plan = read_plans_file(file)
                assert len(plan.spacing) == len(plan.patch_size) == 3
                assert min(*plan.spacing, *plan.patch_size) > 0
        except PluginError:
            refused += 1
    assert refused > 20
