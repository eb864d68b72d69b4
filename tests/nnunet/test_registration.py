"""Registration: bridges in a copy of nnunetv2, plain and editable installs, uninstalling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nnunetv2
import pytest

from stunet_plugin.cli import main
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet import registration
from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import (
    BRIDGES,
    check_version,
    register,
    registered,
    unregister,
)

from conftest import PHANTOM_ID, Workspace


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


def test_register_and_unregister_are_idempotent(
    host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, expected in (
        ("register", "registered in"),
        ("register", "already registered"),
        ("unregister", "removed"),
        ("unregister", "nothing to do"),
    ):
        assert main([command]) == 0
        assert capsys.readouterr().out.count(expected) == 2
        state = "registered" if command == "register" else "not registered"
        assert registered(host) == {"trainers": state, "planners": state}
    assert files(host) == []


def test_the_folders_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("trainers", "plans"):
        assert main(["path", what]) == 0
        folder = Path(capsys.readouterr().out.strip())
        assert (folder.name, (folder / "__init__.py").is_file()) == (what, True)


def test_an_old_bridge_is_replaced_and_another_file_is_not(host: Path) -> None:
    trainers, planners = (bridge.path(host) for bridge in BRIDGES)
    trainers.write_text(f'"""{registration.MARKER}, long ago."""')
    assert registered(host)["trainers"] == "out of date"
    register()
    assert registered(host)["trainers"] == "registered"
    planners.write_text("my = 'own'")
    for command in (register, unregister):
        with pytest.raises(PluginError, match="did not write it"):
            command()
    assert planners.read_text() == "my = 'own'"
    assert trainers.is_file()
    planners.unlink()
    planners.mkdir()
    with pytest.raises(PluginError, match="did not write it"):
        register()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_folder_that_cannot_be_written_leaves_nothing_behind(
    host: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write = registration.write_atomically

    def refuse(path: Path, text: str) -> None:
        if path == BRIDGES[failing].path(host):
            raise PermissionError(13, "Permission denied")
        write(path, text)

    monkeypatch.setattr(registration, "write_atomically", refuse)
    with pytest.raises(PluginError, match=r"(?s)denied.*=\$\(stunet path trainers\).*stunet plan"):
        register()
    assert files(host) == []
    monkeypatch.undo()
    monkeypatch.setattr(registration, "find_host", lambda: host)
    register()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: refuse(BRIDGES[failing].path(host), ""))
    with pytest.raises(PluginError, match="Cannot remove .*Permission denied"):
        unregister()


def test_old_nnunet_is_refused() -> None:
    for version in ("2.8", "3.0.1", "unknown"):
        check_version(version)
    with pytest.raises(PluginError, match=r"nnunetv2 2\.7\.1 is installed, .* needs 2\.8"):
        check_version("2.7.1")


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
        result = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    def run(
        self, workspace: Workspace, command: str, *arguments: object, **environment: str
    ) -> str:
        """Run a command with the Python of this environment, without nnUNet_extTrainer."""
        script = self.python.parent / command
        found = str(script) if script.is_file() else find_command(command)
        variables = {**workspace.environment, "nnUNet_n_proc_DA": "1", **environment}
        variables.pop("nnUNet_extTrainer")
        result = subprocess.run(
            [str(self.python), found, *map(str, arguments)],
            env=variables,
            cwd=workspace.root,
            capture_output=True,
            text=True,
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
        return subprocess.run(
            [self.python, "-c", f"import sys; {hide} {code}", trainer],
            capture_output=True,
            text=True,
            cwd=self.source.parent,
            env={**os.environ, "PYTHONPATH": ""},
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

    plans, planner, trainer = f"Registered{editable}", "STUNetPlanner_tiny", "STUNetTrainer_tiny"
    installation.run(
        *(phantoms, "nnUNetv2_plan_experiment", "-d", PHANTOM_ID, "-pl", planner),
        *("-overwrite_plans_name", plans),
    )
    if not editable:  # training costs the same minute either way
        installation.run(
            *(phantoms, "nnUNetv2_preprocess", "-d", PHANTOM_ID, "-plans_name", plans),
            *("-c", "3d_fullres", "-np", 1),
        )
        output = installation.run(
            *(phantoms, "nnUNetv2_train", PHANTOM_ID, "3d_fullres", 0, "-tr", trainer, "-p", plans),
            *("-device", "cpu", "--disable_checkpointing"),
            STUNET_ITERATIONS="1",
            nnUNet_n_proc_DA="0",
        )
        assert "Pseudo dice" in output
    found = installation.look_up("STUNetTrainer_huge_ft").stdout
    assert found.startswith("stunet_plugin.trainers")

    # Once the plugin is gone the bridge is silent: stock trainers are found past it, ours are not.
    installation.pip("uninstall", "-y", "stunet-plugin")
    stock = installation.look_up("nnUNetTrainer_5epochs", without_plugin=True)
    assert stock.returncode == 0, stock.stderr
    assert "stunet" not in stock.stderr.lower()
    ours = installation.look_up("STUNetTrainer_base", without_plugin=True)
    assert ours.returncode != 0
    assert "Could not find requested nnunet trainer STUNetTrainer_base" in ours.stderr
