"""Portability: Windows' paths, processes and links, Apple's device, workers that are spawned."""

from __future__ import annotations

import multiprocessing
import ntpath
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stunet_plugin import errors
from stunet_plugin.commands import COMMANDS
from stunet_plugin.commands.demo import Demo
from stunet_plugin.crosseval.entries import entry_from_option
from stunet_plugin.datasets import raw_dataset
from stunet_plugin.demo import run as demo
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet import commands
from stunet_plugin.ranking.options import Named
from stunet_plugin.trainers import TRAINERS
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.files import link_or_copy
from stunet_plugin.weights.locate import find_source

from conftest import Stunet, Workspace
from dataset_helpers import write_dataset

WINDOWS = r"C:\my models\Dataset004_Liver\model"


def test_options_take_paths_of_windows() -> None:
    assert Named.read(f"mine={WINDOWS}") == Named("mine", WINDOWS)
    assert Named.read(WINDOWS) == Named(WINDOWS, WINDOWS)
    entry = entry_from_option(f"A={WINDOWS},fold=0", "--model")
    assert entry == {"name": "A", "folder": WINDOWS, "fold": 0}
    assert find_source(f"{WINDOWS}.model").checkpoint == Path(f"{WINDOWS}.model")


def test_lines_to_paste_suit_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, line in (
        ("nt", '$env:nnUNet_raw = "D:/data"'),
        ("posix", "export nnUNet_raw=D:/data"),
    ):
        monkeypatch.setattr(errors, "os", SimpleNamespace(name=name))
        assert errors.setting("nnUNet_raw", "D:/data") == line


def test_a_windows_path_without_a_dataset_is_no_name(stunet: Stunet) -> None:
    stunet.patch.setattr(raw_dataset.os.path, "dirname", ntpath.dirname)
    with pytest.raises(PluginError, match="is not a folder"):
        raw_dataset.find_raw(WINDOWS)


def test_files_are_copied_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("A required privilege is not held by the client")

    for module, name in ((os, "symlink"), (os, "link")):
        monkeypatch.setattr(module, name, refuse)
    (tmp_path / "a").write_text("x")
    assert link_or_copy(str(tmp_path / "a"), tmp_path / "b") == "copy"
    assert (tmp_path / "b").read_text() == "x"

    source = tmp_path / "Dataset004_Mine"
    write_dataset(source, {"background": 0, "liver": 1}, cases=1)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(demo._Run, "_stock", lambda *_: None)
    options = Demo(out=str(tmp_path / "demo"), dataset=4, size="tiny", epochs=1, device="cpu")
    run = demo._Run(options, raw_dataset.read_raw(source))
    run.data()
    assert run.raw.is_dir()
    assert not run.raw.is_symlink()
    assert [case.name for case in run.dataset.cases] == ["case0"]


@pytest.mark.posix
def test_windows_ends_a_command_with_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"])
    words: list[str] = []

    def taskkill(command: list[str], **_: object) -> None:
        words.extend(command)
        process.kill()

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(commands.subprocess, "run", taskkill)
    commands.end_command(process)
    assert words == ["taskkill", "/F", "/T", "/PID", str(process.pid)]
    assert process.returncode is not None


def test_every_choice_of_a_device_has_apples(monkeypatch: pytest.MonkeyPatch) -> None:
    actions = [action for command in COMMANDS for action in command.parser()._actions]
    devices = [action for action in actions if "--device" in action.option_strings]
    assert devices
    for action in devices:
        assert action.choices == ("auto", "cpu", "cuda", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(PluginError, match="Use --device cpu"):
        choose_device("mps")


@pytest.mark.slow
def test_trainings_load_data_in_spawned_workers(
    nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS and Windows: what a worker gets is pickled, and it imports what it needs."""
    plans = {**nnunet_environment.plans(), "continue_training": False}
    raw = nnunet_environment.dataset_folder(nnunet_environment.raw)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        trainer = TRAINERS["VolumeFusionTrainer_STUNet_tiny"](
            plans, "3d_fullres", 0, raw_dataset.read_raw(raw).description, torch.device("cpu")
        )
        trainer.initialize()
        dataset, _ = trainer.get_tr_and_val_datasets()
        batches = trainer._load(dataset, 1, 1)
        assert next(batches)["data"].shape[0] == 2 * trainer.batch_size  # pairs
        batches._finish()
    finally:
        multiprocessing.set_start_method(before, force=True)
