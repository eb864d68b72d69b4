"""Registration: bridges in a copy of nnunetv2, plain and editable installs, uninstalling; hints for
names that are nearly right."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nnunetv2
import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet import registration
from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import BRIDGES, registered
from stunet_plugin.nnunet.registry import Registry

from conftest import PHANTOM_ID, Stunet, Workspace


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the installed nnunetv2."""
    host = tmp_path / "nnunetv2"
    for bridge in BRIDGES:
        bridge.path(host).parent.mkdir(parents=True)
    monkeypatch.setattr(registration, "find_host", lambda: host)
    return host


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_register_and_unregister_are_idempotent(host: Path, stunet: Stunet) -> None:
    for command, expected, state in (
        ("register", "registered in", "registered"),
        ("register", "already registered", "registered"),
        ("unregister", "removed", "not registered"),
        ("unregister", "nothing to do", "not registered"),
    ):
        assert stunet(command).count(expected) == 2
        assert registered(host) == {"trainers": state, "planners": state}
    assert files(host) == []


def test_the_folders_are_printed(stunet: Stunet) -> None:
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
    planners.unlink()
    planners.mkdir()
    assert "did not write it" in stunet.refuse("register")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_folder_that_cannot_be_written_leaves_nothing_behind(
    host: Path, stunet: Stunet, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write = registration.write_atomically

    def refuse(path: Path, text: str = "") -> None:
        if path == BRIDGES[failing].path(host):
            raise PermissionError(13, "Permission denied")
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(registration, "write_atomically", refuse)
        message = stunet("register", code=2)
    for words in ("Permission denied", "=$(stunet path trainers)", "stunet plan"):
        assert words in message
    assert files(host) == []
    stunet("register")
    monkeypatch.setattr(Path, "unlink", lambda path, **_: refuse(path))
    assert "Permission denied" in stunet("unregister", code=2)


def test_other_versions_of_nnunet_are_refused(stunet: Stunet) -> None:
    for version, fits in (("2.8", True), ("3.0.1", True), ("2.7.1", False)):
        stunet.patch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        if fits:
            assert registration.find_host().name == "nnunetv2"
        else:
            assert "nnunetv2 2.7.1 is installed" in stunet.refuse("register")
    stunet.patch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install" in stunet.refuse("register")


# --- names

PLANNERS = Registry(
    "planner", {"STUNetPlanner_small": 1, "STUNetPlanner_base": 2}, {"PCTPlanner": 3}
)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("STUnetPlanner_smal", "STUNetPlanner_small"),
        ("stunetplanner_base", "STUNetPlanner_base"),
        ("STUNet_Planner-base", "STUNetPlanner_base"),
        ("PctPlanner", "PCTPlanner"),
    ],
)
def test_names_that_are_nearly_right_get_a_hint(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AttributeError, match=typed):
        PLANNERS.module_getattr("plans")(typed)
    assert f"Unknown planner '{typed}'. Did you mean {meant}?" in capsys.readouterr().err
    with pytest.raises(PluginError, match=meant):
        PLANNERS.find(typed)


@pytest.mark.parametrize(
    "name", ["PCTPlanner", "nnUNetPlannerResEncL", "MySTUNetPlanner_small", "__path__"]
)
def test_names_of_others_get_none(name: str) -> None:
    assert PLANNERS.hint(name) is None


# --- installed


class Installation:
    """A virtual environment that sees this one's packages, with an nnunetv2 of its own."""

    def __init__(self, root: Path, repository: Path) -> None:
        self.source = root / "source"
        left_out = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "results")
        shutil.copytree(repository, self.source, ignore=left_out)
        venv.create(root / "venv", with_pip=False, symlinks=True)
        self.python = root / "venv" / "bin" / "python"
        site = next((root / "venv" / "lib").glob("python*/site-packages"))
        outside = [path for path in sys.path if path.endswith("-packages")]
        (site / "outside.pth").write_text("\n".join(outside))
        self.host = site / "nnunetv2"
        left_out = shutil.ignore_patterns(registration.BRIDGE_NAME, "__pycache__")
        shutil.copytree(nnunetv2.__path__[0], self.host, ignore=left_out)

    def pip(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        subprocess.run([*map(str, command)], check=True)

    def run(self, workspace: Workspace, command: str, *arguments: object) -> str:
        """Run a command with the Python of this environment, without nnUNet_extTrainer."""
        script = self.python.parent / command
        found = str(script) if script.is_file() else find_command(command)
        training = "0" if command == "nnUNetv2_train" else "1"
        variables = {**workspace.environment, "nnUNet_n_proc_DA": training}
        del variables["nnUNet_extTrainer"]
        words = [self.python, found, *map(str, arguments)]
        result = subprocess.run(
            words, env=variables, cwd=workspace.root, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def look_up(self, trainer: str, without_plugin: bool = False) -> subprocess.CompletedProcess:
        """Ask nnU-Net for a trainer; print its module."""
        code = (
            "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as f;"
            " print(f(sys.argv[1]).__module__)"
        )
        hide = "sys.modules['stunet_plugin'] = None;" if without_plugin else ""
        command = [self.python, "-c", f"import sys; {hide} {code}", trainer]
        variables = {**os.environ, "PYTHONPATH": ""}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=self.source.parent, env=variables
        )


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_installed_registered_found_and_gone(
    phantoms: Workspace, tmp_path: Path, repository: Path, editable: bool
) -> None:
    installation = Installation(tmp_path, repository)
    how = ["-e"] if editable else []
    installation.pip("install", "--no-deps", "--no-build-isolation", *how, installation.source)
    installation.run(phantoms, "stunet", "register")
    assert registered(installation.host) == {"trainers": "registered", "planners": "registered"}
    found = installation.look_up("STUNetTrainer_huge_ft").stdout
    assert found.startswith("stunet_plugin.trainers")
    if editable:  # the rest is the same
        return
    data = ("-d", PHANTOM_ID)
    installation.run(phantoms, "nnUNetv2_plan_experiment", *data, "-pl", "STUNetPlanner_tiny")
    plans = ("STUNetPlans_tiny", "-c", "3d_fullres", "-np", 1)
    installation.run(phantoms, "nnUNetv2_preprocess", *data, "-plans_name", *plans)
    output = installation.run(
        *(phantoms, "nnUNetv2_train", PHANTOM_ID, "3d_fullres", 0, "-tr", "STUNetTrainer_tiny"),
        *("-p", "STUNetPlans_tiny", "-device", "cpu", "--disable_checkpointing"),
    )
    assert "Pseudo dice" in output

    # Once the plugin is gone the bridge is silent: stock trainers are found past it, ours are not.
    installation.pip("uninstall", "-y", "stunet-plugin")
    stock = installation.look_up("nnUNetTrainer_5epochs", without_plugin=True)
    assert stock.returncode == 0, stock.stderr
    assert "stunet" not in stock.stderr.lower()
    ours = installation.look_up("STUNetTrainer_base", without_plugin=True)
    assert ours.returncode != 0
    assert "Could not find requested nnunet trainer STUNetTrainer_base" in ours.stderr
