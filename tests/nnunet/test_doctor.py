"""`stunet doctor`: what it finds, what it says to do, and its exit code."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from unittest.mock import Mock

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet import doctor
from stunet_plugin.nnunet.commands import NAMELESS, name_user
from stunet_plugin.nnunet.registration import BRIDGES, trainers_folder

from conftest import Stunet


def look(name: str) -> tuple[str, str]:
    """Mark and all words of one finding."""
    found = {finding.what: finding for finding in doctor.findings("STUNetTrainer_base")}
    return found[name].mark, f"{found[name].state}. {found[name].advice}"


def test_the_exit_code_can_be_trusted(stunet: Stunet) -> None:
    for variable in doctor.FOLDERS:
        stunet.patch.setenv(variable, str(stunet.folder))
    stunet.patch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    stunet.patch.setenv("STUNET_EPOCHS", "5")
    said = stunet("doctor")
    assert "Everything is in place" in said
    assert "STUNET_EPOCHS=5" in said
    assert "found through nnUNet_extTrainer" in said or "trainers: registered" in said
    stunet.patch.setenv("STUNET_EPOCHS", "x")
    stunet.patch.delenv("nnUNet_raw")
    said = stunet("doctor -tr STUnetTrainer_smal", code=1)
    for text in (
        "STUNET_EPOCHS='x' must be an integer",
        "does not find STUnetTrainer_smal",
        "Did you mean STUNetTrainer_small?",
        "3 thing(s) to fix",
    ):
        assert text in said


def test_without_registration_it_says_to_register(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_host", lambda: tmp_path)
    monkeypatch.setattr(doctor, "_lookup", lambda _: doctor.Finding("ok", "look-up", ""))
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    for bridge in BRIDGES:
        assert look(bridge.what) == ("!!", "not registered. Run: stunet register")
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    assert [look(bridge.what)[0] for bridge in BRIDGES] == ["ok", "ok"]
    foreign = BRIDGES[0].path(tmp_path)
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    assert "did not write it" in look("registration")[1]
    monkeypatch.setattr(doctor, "find_host", Mock(side_effect=PluginError("not installed")))
    assert look("nnunetv2")[0] == "!!"


@pytest.mark.parametrize(
    ("variable", "value", "mark", "words"),
    [
        ("nnUNet_raw", "{0}", "ok", ""),
        ("nnUNet_raw", "{0} ", "!!", "export nnUNet_raw={0}"),
        ("nnUNet_raw", "~/data", "!!", f"export nnUNet_raw={Path.home()}/data"),
        ("nnUNet_raw", "{0}/not there", "!!", "mkdir -p '{0}/not there'"),
        ("nnUNet_raw", "", "!!", "export nnUNet_raw=/path/to/nnUNet_raw"),
        ("nnUNet_extTrainer", f"{{0}}{os.pathsep}{{0}}/gone", "!!", "stunet path trainers"),
        ("nnUNet_def_n_proc", "two", "!!", "no number of processes"),
        # Serves training, but stops nnU-Net's planners.
        ("nnUNet_n_proc_DA", "0", "! ", "planners stop"),
    ],
)
def test_variables_of_nnunet_are_examined(
    variable: str, value: str, mark: str, words: str, stunet: Stunet
) -> None:
    stunet.patch.setenv(variable, value.format(stunet.folder))
    found, said = look(variable)
    assert (found, words.format(stunet.folder) in said) == (mark, True)


def test_a_user_id_without_a_name_is_given_one_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    name_user()
    assert os.environ["USER"] == NAMELESS
    assert "export USER=" in look("user")[1]
    assert look("HOME")[0] == "! "
