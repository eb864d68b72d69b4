"""Files that nobody vouches for: each is refused with a message that says what it is, runs nothing
and leaves nothing."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.file_formats import FileFormat, recognise
from stunet_plugin.weights.safe_loading import load_checkpoint, load_plans_pickle

from import_helpers import (
    make_network,
    published_weights,
    refuse,
    v1_checkpoint,
    v1_plans,
    write_v1,
)

Build = Callable[[Path, Path], object]


class WritesAFile:
    """Unpickled by pickle itself, this would run a shell command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def torch_zip(path: Path, marker: Path) -> None:
    torch.save(v1_checkpoint({"a": WritesAFile(marker)}), path)


def torch_legacy(path: Path, marker: Path) -> None:
    torch.save(
        v1_checkpoint({"a": WritesAFile(marker)}), path, _use_new_zipfile_serialization=False
    )


def plain_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(v1_checkpoint({"a": WritesAFile(marker)})))


def evil_plans(path: Path, marker: Path) -> None:
    write_v1(path)
    path.with_name(path.name + ".pkl").write_bytes(
        pickle.dumps({**v1_plans(), "more": WritesAFile(marker)})
    )


def forbidden_global(path: Path, _: Path) -> None:
    write_v1(path)
    path.with_name(path.name + ".pkl").write_bytes(pickle.dumps({**v1_plans(), "more": Path}))


def objects_in_an_array(path: Path, marker: Path) -> None:
    write_v1(path)
    content = {**v1_plans(), "more": np.array([WritesAFile(marker)], dtype=object)}
    path.with_name(path.name + ".pkl").write_bytes(pickle.dumps(content))


def takes_all_memory(path: Path, _: Path) -> None:
    # One instruction that makes CPython's unpickler reserve 16 GB: "remember this under the number
    # 2**31 - 1".
    write_v1(path)
    path.with_name(path.name + ".pkl").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")


def nested_without_end(path: Path, _: Path) -> None:
    write_v1(path)
    value: list[Any] = []
    for _level in range(60):
        value = [value, value]
    path.with_name(path.name + ".pkl").write_bytes(pickle.dumps({**v1_plans(), "more": value}))


def path_outside(path: Path, _: Path) -> None:
    write_v1(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../outside.txt", "x")


def no_torch_file(path: Path, _: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fold_0/model.txt", "x")


def compressed(path: Path, _: Path) -> None:
    write_v1(path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def truncated(path: Path, _: Path) -> None:
    write_v1(path)
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_legacy(path: Path, _: Path) -> None:
    torch.save(
        v1_checkpoint(published_weights(make_network())), path, _use_new_zipfile_serialization=False
    )
    path.write_bytes(path.read_bytes()[:-1000])


def one_wrong_byte(path: Path, _: Path) -> None:
    write_v1(path)
    with zipfile.ZipFile(path) as archive:
        position = max(archive.infolist(), key=lambda entry: entry.file_size).header_offset + 5000
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def html_page(path: Path, _: Path) -> None:
    path.write_bytes(b"\n<!DOCTYPE html><html><head><title>Quota exceeded</title></head></html>")


def torch_script(path: Path, _: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(path))


def changed_weights(change: Callable[[OrderedDict[str, Any]], object]) -> Build:
    def build(path: Path, _: Path) -> None:
        weights: OrderedDict[str, Any] = published_weights(make_network())
        change(weights)
        write_v1(path, weights)

    return build


def poison(value: float) -> Build:
    return changed_weights(
        lambda weights: weights["conv_blocks_context.3.0.conv2.weight"].view(-1)[7:8].fill_(value)
    )


NORM = "conv_blocks_context.2.0.norm1.weight"

UNSAFE: dict[str, tuple[Build, str]] = {
    "a torch file that would write a file": (torch_zip, "asks for posix.system"),
    "an old torch file that would write a file": (torch_legacy, "asks for posix.system"),
    "a pickle that would write a file": (plain_pickle, "is a plain pickle"),
    "plans that would write a file": (evil_plans, "asks for posix.system"),
    "plans with a forbidden global": (forbidden_global, "asks for pathlib.Path"),
    "plans with an array of objects": (objects_in_an_array, "numpy type 'O8' is not allowed"),
    "plans that take all memory": (takes_all_memory, "built to take all memory"),
    "plans nested without end": (nested_without_end, "nested without end"),
    "a zip with a path outside": (path_outside, "points outside of the archive"),
    "a zip that is no torch file": (no_torch_file, "is a zip archive, but no torch file"),
    "a compressed torch file": (compressed, "compressed or encrypted"),
    "a truncated file": (truncated, "is truncated. Download it again"),
    "a truncated old file": (truncated_legacy, "ends too early or is damaged"),
    "a damaged file": (one_wrong_byte, "checksum"),
    "an HTML page": (html_page, "is a web page (HTML)"),
    "a program": (torch_script, "TorchScript"),
    "an empty file": (lambda path, _: path.touch(), "is empty"),
    "text": (lambda path, _: path.write_text('{"error": "not found"}'), "JSON"),
    "a Git LFS pointer": (
        lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS",
    ),
    "an archive": (lambda path, _: path.write_bytes(b"\x1f\x8b\x08\x00"), "unpack it first"),
    "anything else": (lambda path, _: path.write_bytes(b"\x00" * 100), "it starts with"),
    "a list": (lambda path, _: torch.save([1, 2], path), "holds a list"),
    "another dict": (
        lambda path, _: torch.save({"weights": torch.ones(2)}, path),
        "its entries are weights",
    ),
    "another network": (
        lambda path, _: torch.save(
            {"network_weights": {"encoder.stages.0.0.convs.0.weight": torch.ones(2)}}, path
        ),
        "nnU-Net v2 checkpoint with 1 tensors such as encoder.stages.0.0.convs.0.weight",
    ),
    "NaN weights": (poison(float("nan")), "1 of 130 tensors hold NaN or infinite values"),
    "infinite weights": (poison(float("inf")), "1 of 130 tensors hold NaN or infinite values"),
    "a wrong shape": (
        changed_weights(lambda weights: weights.update({NORM: torch.ones(15)})),
        "norm1.weight: (15,), expected (16,)",
    ),
    "a missing tensor": (
        changed_weights(lambda weights: weights.pop(NORM)),
        "1 of 130 tensors are missing",
    ),
    "a missing stage": (
        changed_weights(lambda weights: weights.pop("conv_blocks_context.3.0.conv1.weight")),
        "stages are not those",
    ),
    "an extra tensor": (
        changed_weights(lambda weights: weights.update(more=torch.ones(1))),
        "'more' is not a parameter",
    ),
    "an extra parameter": (
        changed_weights(
            lambda weights: weights.update({"conv_blocks_context.0.0.conv1.scale": torch.ones(1)})
        ),
        "1 tensors are no part of an STU-Net",
    ),
    "a missing head": (
        changed_weights(lambda weights: weights.pop("seg_outputs.1.weight")),
        "4 segmentation heads",
    ),
    "whole numbers": (
        changed_weights(lambda weights: weights.update({NORM: torch.ones(16, dtype=torch.int64)})),
        "no plain tensor",
    ),
    "one value for many": (
        changed_weights(lambda weights: weights.update({NORM: torch.ones(1).expand(16)})),
        "claims 16 values",
    ),
    "text for a tensor": (
        changed_weights(lambda weights: weights.update({NORM: "x"})),
        "is a str, not a tensor",
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_file_is_refused_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, expected = UNSAFE[name]
    source, marker = tmp_path / "source" / "base_ep4k.model", tmp_path / "marker"
    source.parent.mkdir()
    build(source, marker)
    message = refuse(capsys, source, tmp_path / "results" / "model")
    assert expected in message
    assert source.name in message
    assert "weights_only" not in message, "torch's advice to trust the file must not be passed on"
    assert not marker.exists()


def test_missing_files_and_folders_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no such file" in refuse(
        capsys, tmp_path / "none.model", tmp_path / "out" / "model"
    )
    assert "is a folder" in refuse(capsys, tmp_path, tmp_path / "out" / "model")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plans_with_numpy_come_as_plain_numbers(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "plans.pkl"
    content = {
        "array": np.array([[1, 2], [3, 4]], dtype=">i2"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.float32(1.5),
        "flag": np.bool_(True),
        "table": OrderedDict([(0, ("a", {1, 2}))]),
    }
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load_plans_pickle(path)
    assert loaded == {
        "array": [[1, 2], [3, 4]],
        "fortran": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
        "scalar": 1.5,
        "flag": True,
        "table": {0: ("a", {1, 2})},
    }
    assert type(loaded["table"]) is dict
    assert type(loaded["flag"]) is bool


@pytest.mark.parametrize("renamed", [True, False])
def test_checkpoints_of_either_numpy_load(renamed: bool, tmp_path: Path) -> None:
    """numpy 1 wrote numpy.core, numpy 2 writes numpy._core; published files are of both."""
    path = write_v1(tmp_path / "x.model")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    present, wanted = names if renamed else names[::-1]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(
                name, content.replace(present, wanted) if name.endswith("data.pkl") else content
            )
    with zipfile.ZipFile(path) as archive:
        assert wanted in archive.read(next(name for name in entries if name.endswith("data.pkl")))
    assert load_checkpoint(path)["best_stuff"] == (None, 0.3, 0.9)


def test_numpy_scalars_of_objects_are_refused_in_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    torch.save({"state_dict": {}, "best": np.datetime64("2020-01-01")}, path)
    with pytest.raises(PluginError, match="numpy type 'M8' is not allowed"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("instructions", "reason"),
    [
        (
            b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93N}\x8c\x09_functionK\x01s\x86b.",
            "may not change functions",
        ),
        (
            b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f8\x85R(K\x03\x8c\x01<}NNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
            "fields",
        ),
        (
            b"\x8c\x07_codecs\x8c\x06encode\x93\x8c\x01a\x8c\x04zlib\x86R.",
            "encoding 'zlib' is not allowed",
        ),
        (
            b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
            "asks for collections.OrderedDict.fromkeys",
        ),
        (b"\x8c\x01a\x8c\x01b\x86Q.", "BINPERSID"),
        (b"\x8e" + struct.pack("<Q", 2**60) + b"ab.", "cannot be read"),
    ],
    ids=[
        "change a function",
        "a type with fields",
        "another encoding",
        "a method",
        "a persistent object",
        "bytes that are not there",
    ],
)
def test_tricks_of_pickles_are_refused(instructions: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "plans.pkl"
    path.write_bytes(b"\x80\x05" + instructions)
    with pytest.raises(PluginError, match=reason):
        load_plans_pickle(path)
    # What was refused must not have changed the reader for the next file.
    path.write_bytes(pickle.dumps(v1_plans()))
    assert load_plans_pickle(path)["name"] == "STUNetTrainer_tiny"


def test_array_with_the_wrong_number_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plans.pkl"
    content = pickle.dumps({"a": np.arange(3, dtype=np.int16)}, protocol=4)
    path.write_bytes(content.replace(b"K\x03\x85", b"K\x09\x85"))
    assert path.read_bytes() != content
    with pytest.raises(PluginError, match="shape"):
        load_plans_pickle(path)


def test_format_comes_from_the_content(tmp_path: Path) -> None:
    for name, write, expected in (
        ("a.pkl", lambda path: torch.save({}, path), FileFormat.TORCH_ZIP),
        (
            "b.html",
            lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
            FileFormat.TORCH_LEGACY,
        ),
        ("c.model", lambda path: path.write_bytes(pickle.dumps({})), FileFormat.PICKLE),
    ):
        write(tmp_path / name)
        assert recognise(tmp_path / name) is expected
