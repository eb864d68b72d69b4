"""Being found: bridges in a copy of nnunetv2, plain and editable installs, uninstalling, and the
way without registration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet import doctor, registration
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
    """A folder that stands for the installed nnunetv2."""
    host = tmp_path / "nnunetv2"
    for bridge in BRIDGES:
        bridge.path(host).parent.mkdir(parents=True)
    monkeypatch.setattr(registration, "find_host", lambda: host)
    return host


def test_register_and_unregister_are_idempotent(host: Path) -> None:
    assert all("registered in" in line for line in register())
    assert registered(host) == {"trainers": "registered", "planners": "registered"}
    assert all("already registered" in line for line in register())
    assert all("removed" in line for line in unregister())
    assert all("nothing to do" in line for line in unregister())
    assert [path for path in host.rglob("*") if path.is_file()] == []


def test_an_old_bridge_is_replaced_and_a_strangers_file_is_not(host: Path) -> None:
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
    with pytest.raises(
        PluginError,
        match=(
            r"Permission denied(.|\n)*nnUNet_extTrainer=\$\(stunet path trainers\)(.|\n)*stunet"
            r" plan"
        ),
    ):
        register()
    assert [path for path in host.rglob("*") if path.is_file()] == []


def test_old_nnunet_is_refused() -> None:
    check_version("2.8")
    check_version("3.0.1")
    check_version("unknown")
    with pytest.raises(
        PluginError, match=r"nnunetv2 2\.7\.1 is installed, but stunet-plugin needs 2\.8 or newer"
    ):
        check_version("2.7.1")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        registration.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class Installation:
    """A virtual environment that sees this one's packages, with an nnunetv2 of its own to write
    into."""

    def __init__(self, root: Path, repository: Path) -> None:
        self.source = root / "source"
        shutil.copytree(
            repository,
            self.source,
            ignore=shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "results"),
        )
        venv.create(root / "venv", with_pip=False, symlinks=True)
        self.python = root / "venv" / "bin" / "python"
        site = next((root / "venv" / "lib").glob("python*/site-packages"))
        outside = sysconfig.get_path("purelib")
        (site / "outside.pth").write_text(f"{outside}\n")
        shutil.copytree(
            Path(outside, "nnunetv2"),
            site / "nnunetv2",
            ignore=shutil.ignore_patterns(registration.BRIDGE_NAME, "__pycache__"),
        )
        self.host = site / "nnunetv2"

    def pip(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    def run(
        self, workspace: Workspace, command: str, *arguments: object, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a stock command's script with the Python of this environment, without
        nnUNet_extTrainer."""
        script = self.python.parent / command
        found = str(script) if script.is_file() else find_command(command)
        variables = {**workspace.environment, "nnUNet_n_proc_DA": "1", **environment}
        variables.pop("nnUNet_extTrainer")
        return subprocess.run(
            [str(self.python), found, *map(str, arguments)],
            env=variables,
            cwd=workspace.root,
            capture_output=True,
            text=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_installed_registered_found_and_gone(
    phantoms: Workspace, tmp_path: Path, repository: Path, editable: bool
) -> None:
    installation = Installation(tmp_path, repository)
    installation.pip(
        "install",
        "--no-deps",
        "--no-build-isolation",
        *(["-e"] if editable else []),
        installation.source,
    )
    done = installation.run(phantoms, "stunet", "register")
    assert done.returncode == 0, done.stderr
    assert registered(installation.host) == {"trainers": "registered", "planners": "registered"}

    name = f"Registered{editable}"
    planned = installation.run(
        phantoms,
        "nnUNetv2_plan_experiment",
        "-d",
        PHANTOM_ID,
        "-pl",
        "STUNetPlanner_tiny",
        "-overwrite_plans_name",
        name,
    )
    assert planned.returncode == 0, planned.stderr
    if not editable:  # training costs the same minute either way
        trained = installation.run(
            phantoms,
            "nnUNetv2_train",
            PHANTOM_ID,
            "3d_fullres",
            0,
            "-tr",
            "STUNetTrainer_tiny",
            "-p",
            name,
            "-device",
            "cpu",
            "--disable_checkpointing",
            STUNET_ITERATIONS="1",
            nnUNet_n_proc_DA="0",
        )
        assert trained.returncode == 0, trained.stderr
        assert "Pseudo dice" in trained.stdout

    look_up = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
        " import sys;print(find(sys.argv[1]).__module__)"
    )
    where = subprocess.run(
        [installation.python, "-c", look_up, "STUNetTrainer_huge_ft"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert where.stdout.strip() == "stunet_plugin.trainers.stunet_trainers"

    # Once the plugin is gone the bridge is silent: stock trainers are found past it, ours are not.
    installation.pip("uninstall", "-y", "stunet-plugin")
    hide = {**os.environ, "PYTHONPATH": ""}
    isolated = f"import sys; sys.modules['stunet_plugin'] = None; {look_up}"
    stock = subprocess.run(
        [installation.python, "-c", isolated, "nnUNetTrainer_5epochs"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=hide,
    )
    assert stock.returncode == 0, stock.stderr
    assert "stunet" not in stock.stderr.lower()
    ours = subprocess.run(
        [installation.python, "-c", isolated, "STUNetTrainer_base"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=hide,
    )
    assert ours.returncode != 0
    assert "Could not find requested nnunet trainer STUNetTrainer_base" in ours.stderr


def test_doctor_reports_and_its_exit_code_can_be_trusted(phantoms: Workspace) -> None:
    green = phantoms.run("stunet", "doctor")
    assert "Everything is in place" in green.stdout
    assert (
        "found through nnUNet_extTrainer" in green.stdout or "trainers: registered" in green.stdout
    )
    wrong = phantoms.run(
        "stunet",
        "doctor",
        check=False,
        nnUNet_raw=None,
        nnUNet_results="/nowhere/at/all",
        STUNET_EPOCHS="x",
    )
    assert wrong.returncode == 1
    for text in (
        "export nnUNet_raw=",
        "mkdir -p /nowhere/at/all",
        "STUNET_EPOCHS='x' must be a whole number",
    ):
        assert text in wrong.stdout


def test_doctor_looks_at_numbers_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 for augmentation serves training and stops nnU-Net's planner: a warning, which is nothing
    to mend."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "two")
    wrong, warning = doctor._processes()
    assert (wrong.mark, warning.mark) == ("!!", "! ")
    assert "'two' is no number of processes" in wrong.state
    assert "nnUNetv2_plan_and_preprocess" in warning.advice
    monkeypatch.setenv("nnUNet_n_proc_DA", "4")
    monkeypatch.delenv("nnUNet_def_n_proc")
    assert [finding.mark for finding in doctor._processes()] == ["ok"]


def test_help_is_quick_to_import_and_shows_an_example() -> None:
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys, stunet_plugin.cli as c; c.build_parser(); print(*(m in sys.modules for"
                " m in ('torch', 'numpy')))"
            ),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.split() == ["False", "False"]
    for command in ("list", "register", "unregister", "doctor", "path", "plan", "demo"):
        shown = subprocess.run(
            [find_command("stunet"), command, "--help"], capture_output=True, text=True, check=True
        )
        assert "Example: " in shown.stdout
    wrong = subprocess.run(
        [find_command("stunet"), "demo", "--size", "gigantic"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "tiny" in wrong.stderr
