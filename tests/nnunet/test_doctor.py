"""`stunet doctor`: what it finds, what it says to do, and its exit code."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from stunet_plugin.cli import main
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet import doctor
from stunet_plugin.nnunet.commands import NAMELESS, name_user
from stunet_plugin.nnunet.registration import BRIDGES, trainers_folder

from conftest import Workspace


def test_the_exit_code_can_be_trusted(
    nnunet_environment: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 0
    green = capsys.readouterr().out
    assert "Everything is in place" in green
    assert "found through nnUNet_extTrainer" in green or "trainers: registered" in green
    missing = tmp_path / "not there"
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setenv("nnUNet_results", str(missing))
    monkeypatch.setenv("STUNET_EPOCHS", "x")
    trainer = "STUnetTrainer_smal"
    assert main(["doctor", "-tr", trainer]) == 1
    wrong = capsys.readouterr().out
    for text in (
        "export nnUNet_raw=",
        f"mkdir -p '{missing}'",
        "STUNET_EPOCHS='x' must be an integer",
        f"nnU-Net does not find {trainer}",
        "Did you mean STUNetTrainer_small?",
        "4 thing(s) to fix",
    ):
        assert text in wrong


def test_without_registration_it_says_to_register(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    findings = list(doctor._registration(tmp_path))
    assert [finding.advice for finding in findings] == ["Run: stunet register"] * 2
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    assert [finding.mark for finding in doctor._registration(tmp_path)] == ["ok", "ok"]
    foreign = BRIDGES[0].path(tmp_path)
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    (finding,) = doctor._registration(tmp_path)
    assert "did not write it" in finding.advice

    def missing() -> None:
        raise PluginError("nnunetv2 is not installed")

    monkeypatch.setattr(doctor, "find_host", missing)
    found = {finding.what: finding for finding in doctor.findings("STUNetTrainer_base", list)}
    assert found["nnunetv2"].mark == "!!"
    assert "look-up" not in found


@pytest.mark.parametrize(
    ("value", "mark", "advice"),
    [
        ("{0}", "ok", ""),
        ("{0} ", "!!", "export nnUNet_raw={0}"),
        ("'{0}'", "!!", "export nnUNet_raw={0}"),
        ('"{0}"', "!!", "export nnUNet_raw={0}"),
        ("~/data", "!!", f"export nnUNet_raw={Path.home()}/data"),
        ("{0}/gone", "!!", "mkdir -p {0}/gone"),
        ("", "!!", "export nnUNet_raw=/path/to/nnUNet_raw"),
    ],
)
def test_folders_are_examined(
    value: str, mark: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_raw", value.format(tmp_path))
    finding = doctor._folder("nnUNet_raw")
    assert finding is not None
    assert finding.mark == mark
    assert advice.format(tmp_path) in finding.advice


def test_the_folder_of_external_trainers_is_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert doctor._folder("nnUNet_extTrainer") is None
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}{os.pathsep}{tmp_path / 'gone'}")
    finding = doctor._folder("nnUNet_extTrainer")
    assert finding is not None
    assert "stunet path trainers" in finding.advice


@pytest.mark.parametrize(
    ("variable", "value", "mark", "fact"),
    [
        ("nnUNet_def_n_proc", "two", "!!", "no number of processes"),
        ("nnUNet_def_n_proc", "0", "!!", "no number of processes"),
        ("nnUNet_n_proc_DA", "-1", "!!", "no number of processes"),
        # Serves training, but stops nnU-Net's planners.
        ("nnUNet_n_proc_DA", "0", "! ", "0"),
        ("nnUNet_n_proc_DA", "4", "ok", "4"),
    ],
)
def test_numbers_of_processes_are_examined(
    variable: str, value: str, mark: str, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    finding = doctor._processes(variable)
    assert finding is not None
    assert (finding.mark, fact in finding.state) == (mark, True)
    monkeypatch.delenv(variable)
    assert doctor._processes(variable) is None


def test_a_user_id_without_a_name_is_given_one_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    name_user()
    assert os.environ["USER"] == NAMELESS
    user, home = doctor._user()
    assert (user.mark, home.mark) == ("!!", "! ")
    assert "export USER=" in user.advice
    monkeypatch.setenv("USER", "me")
    name_user()
    assert os.environ["USER"] == "me"
    assert [finding.what for finding in doctor._user()] == ["HOME"]
