"""Registration: bridges in a copy of nnunetv2, plain and editable installs, uninstalling; hints for
names that are nearly right."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import nnunetv2
import pytest

from stunet_plugin.nnunet import registration
from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import BRIDGE_NAME, BRIDGES, registered
from stunet_plugin.plans import PLANNERS

from conftest import PHANTOM_ID, Stunet, Workspace


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the installed nnunetv2."""
    host = tmp_path / "nnunetv2"
    for bridge in BRIDGES:
        bridge.path(host).parent.mkdir(parents=True)
    monkeypatch.setattr(registration, "find_host", lambda: host)
    return host


def test_register_and_unregister_are_idempotent(host: Path, stunet: Stunet) -> None:
    for command, expected, state in (
        ("register", "registered in", "registered"),
        ("register", "already registered", "registered"),
        ("unregister", "removed", "not registered"),
        ("unregister", "nothing to do", "not registered"),
    ):
        assert stunet(command).count(expected) == 2
        assert registered(host) == {"trainers": state, "planners": state}
    assert not list(host.rglob("*.py"))
    for what in ("trainers", "plans"):
        folder = Path(stunet("path", what).strip())
        assert (folder.name, (folder / "__init__.py").is_file()) == (what, True)


def test_an_old_bridge_is_replaced_and_another_file_is_not(host: Path, stunet: Stunet) -> None:
    trainers, planners = (bridge.path(host) for bridge in BRIDGES)
    trainers.write_text(f'"""{registration.MARKER}, long ago."""')
    assert registered(host)["trainers"] == "out of date"
    stunet("register")
    assert registered(host)["trainers"] == "registered"
    planners.write_text("my = 'own'")
    for command in ("register", "unregister"):
        assert "did not write it" in stunet.refuse(command)


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(
    host: Path, stunet: Stunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        write = Mock(wraps=registration.write_atomically, side_effect=[DEFAULT, denied])
        patch.setattr(registration, "write_atomically", write)
        message = stunet("register", code=2)
    for words in ("Permission denied", "=$(stunet path trainers)", "stunet plan"):
        assert words in message
    assert not list(host.rglob("*.py"))
    stunet("register")
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=denied))
    assert "Permission denied" in stunet("unregister", code=2)


def test_other_versions_of_nnunet_are_refused(stunet: Stunet) -> None:
    for version in ("3.0.1", "2.8", "2.7.1"):
        assert registration.find_host().name == "nnunetv2"
        stunet.patch.setattr(importlib.metadata, "version", lambda _, version=version: version)
    assert "nnunetv2 2.7.1 is installed" in stunet.refuse("register")
    stunet.patch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install" in stunet.refuse("register")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("STUnetPlanner_smal", "STUNetPlanner_small"),
        ("stunetplanner_base", "STUNetPlanner_base"),
        ("PctNetPlanner", "PCTNetPlanner"),
        ("nnUNetPlannerResEncL", None),
        ("MySTUNetPlanner_small", None),
        ("__path__", None),
    ],
)
def test_only_names_that_are_nearly_ours_get_a_hint(
    typed: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AttributeError, match=typed):
        PLANNERS.module_getattr("plans")(typed)
    hint = f"stunet-plugin: Unknown planner '{typed}'. Did you mean {meant}?"
    said = capsys.readouterr().err
    assert said.startswith(hint) if meant else said == ""


LOOK_UP = (
    "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
    " print(find(sys.argv[1]).__module__)"
)


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_installed_registered_found_and_gone(
    phantoms: Workspace, tmp_path: Path, repository: Path, editable: bool
) -> None:
    """In a virtual environment that sees this one's packages, with an nnunetv2 of its own."""
    names = (".git", ".venv*", "build", "*.egg-info", "results", BRIDGE_NAME, "__pycache__")
    left_out = shutil.ignore_patterns(*names)
    source = shutil.copytree(repository, tmp_path / "source", ignore=left_out)
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    outside = [path for path in sys.path if path.endswith("-packages")]
    (site / "outside.pth").write_text("\n".join(outside))
    host = shutil.copytree(nnunetv2.__path__[0], site / "nnunetv2", ignore=left_out)
    variables = {**phantoms.environment, "nnUNet_n_proc_DA": "1", "PYTHONPATH": ""}
    del variables["nnUNet_extTrainer"]

    def run(*words: object, code: int = 0) -> str:
        command = [str(python), *map(str, words)]
        done = subprocess.run(command, env=variables, cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    pip = ("-m", "pip", "--python", python)
    how = ("--no-deps", "--no-build-isolation", *(["-e"] if editable else []))
    subprocess.run([sys.executable, *pip, "install", *how, source], check=True)
    run(python.parent / "stunet", "register")
    assert registered(host) == {"trainers": "registered", "planners": "registered"}
    assert "stunet_plugin.trainers" in run("-c", f"import sys; {LOOK_UP}", "STUNetTrainer_huge_ft")
    if editable:  # the rest is the same
        return
    planning = ("-d", PHANTOM_ID, "-pl", "STUNetPlanner_tiny")
    run(find_command("nnUNetv2_plan_experiment"), *planning)

    # Once the plugin is gone the bridge is silent: stock trainers are found past it, ours are not.
    subprocess.run([sys.executable, *pip, "uninstall", "-y", "stunet-plugin"], check=True)
    gone = f"import sys; sys.modules['stunet_plugin'] = None; {LOOK_UP}"
    said = run("-c", gone, "nnUNetTrainer_5epochs").lower()
    # Not counting where this Python is: a warning of torch's says it.
    assert "stunet" not in said.replace(sys.prefix.lower(), "")
    ours = run("-c", gone, "STUNetTrainer_base", code=1)
    assert "Could not find requested nnunet trainer STUNetTrainer_base" in ours
