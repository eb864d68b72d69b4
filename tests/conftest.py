"""Fixtures: the shared images, a small nnU-Net workspace, commands as subprocesses."""

from __future__ import annotations

import importlib.metadata
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
    DatasetFingerprintExtractor,
)

from stunet_plugin.cli import main
from stunet_plugin.demo.phantom import write_dataset
from stunet_plugin.nnunet.commands import CommandFailedError, find_command
from stunet_plugin.nnunet.registration import trainers_folder

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
PHANTOM_ID = "901"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
SETTINGS = {
    "nnUNet_extTrainer": str(trainers_folder()),
    "nnUNet_def_n_proc": "1",
    "STUNET_EPOCHS": "1",
    "STUNET_ITERATIONS": "2",
    "STUNET_VAL_ITERATIONS": "1",
}

# The test processes share the cores; threads of theirs would only wait for each other, or spin
# while another has the core: nnU-Net takes one per core. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The same predictions on every processor.
os.environ.setdefault("STUNET_CPU_PRECISION", "float32")

# A shell starts background jobs with SIGINT ignored, which the commands under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no process is left alone with one at the end."""
    if sys.platform == "win32":
        for item in filter(lambda one: one.get_closest_marker("posix"), items):
            item.add_marker(pytest.mark.skip(reason="needs signals, fork or a shell of POSIX"))
    long_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long_files)


@pytest.fixture(scope="session", autouse=True)
def _cheap_planning() -> Iterator[None]:
    """nnU-Net lists the files of a dataset in twelve processes, forked from this large one, and
    draws a hundred million voxels for a few percentiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2.utilities.utils.Pool", lambda processes: ThreadPool(1))
        few = property(lambda _: 1e5, lambda _, value: None)
        drawn = "num_foreground_voxels_for_intensitystats"
        patch.setattr(DatasetFingerprintExtractor, drawn, few, raising=False)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the shared images and checkpoints in ../shared, which is not there")
    return SHARED


class Workspace:
    """nnU-Net's three folders below one, and the stock commands run in that environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in (folders := [root / name for name in FOLDERS]):
            folder.mkdir(parents=True)
        self.raw, self.preprocessed, self.results = folders

    @property
    def environment(self) -> dict[str, str]:
        rest = {x: y for x, y in os.environ.items() if not x.startswith(("nnUNet", "STUNET"))}
        return rest | SETTINGS | {name: str(self.root / name) for name in FOLDERS}

    def run(
        self, command: str, *arguments: object, check: bool = True, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command; a keyword sets a variable, None removes it.

        Stock commands but predictions run in this process, their workers as threads: processes
        would spend most of their time on imports.
        """
        # Training without worker processes is quicker for a handful of iterations; nnU-Net's
        # planners need at least one.
        workers = "0" if command == "nnUNetv2_train" else "1"
        variables = {**self.environment, "nnUNet_n_proc_DA": workers, **environment}
        words = [command, *map(str, arguments)]
        if command.startswith("nnUNetv2_") and "predict" not in command:
            result = self._run_here(words, variables)
        else:
            words[0] = find_command(command)
            given: Any = {"env": {x: y for x, y in variables.items() if y is not None}}
            given |= {"cwd": self.root, "stdin": subprocess.DEVNULL}
            result = subprocess.run(words, capture_output=True, text=True, **given)
        if check and result.returncode != 0:
            said = f"{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
            pytest.fail(f"{words} ended with {result.returncode}:\n{said}")
        return result

    def _run_here(
        self, words: list[str], variables: dict[str, str | None]
    ) -> subprocess.CompletedProcess[str]:
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=words[0])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            self.in_this_process(patch, variables)
            patch.setattr(sys, "argv", words)
            patch.setattr(multiprocessing, "cpu_count", lambda: 1)
            threads = SimpleNamespace(Pool=ThreadPool)
            patch.setattr(multiprocessing, "get_context", lambda _=None: threads)
            try:
                entry.load()()
            except (Exception, SystemExit):
                traceback.print_exc()
                code = 1
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def in_this_process(
        self, patch: pytest.MonkeyPatch, variables: dict[str, str | None] | None = None
    ) -> None:
        """Set the variables here, for calls of nnU-Net's Python interface."""
        for key, value in (variables or self.environment).items():
            if value is None:
                patch.delenv(key, raising=False)
            elif key.startswith(("nnUNet_", "STUNET_")):
                patch.setenv(key, value)
        patch.setattr(sys, "argv", ["pytest"])

    def dataset_folder(self, base: Path, dataset_id: str = PHANTOM_ID) -> Path:
        return next(base.glob(f"Dataset{dataset_id}_*"))

    def plans(self, name: str = "nnUNetPlans", dataset_id: str = PHANTOM_ID) -> dict[str, Any]:
        folder = self.dataset_folder(self.preprocessed, dataset_id)
        return json.loads((folder / f"{name}.json").read_text())

    def model(
        self, trainer: str, configuration: str = "3d_fullres", plans: str = "nnUNetPlans"
    ) -> Path:
        return self.dataset_folder(self.results) / f"{trainer}__{plans}__{configuration}"


class Stock:
    """Stands for ``run_command``: runs in this process, and fails where it is told to."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.ran, self.fail_at = workspace, list[str](), -1

    def __call__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None
    ) -> None:
        self.ran.append(command[0])
        if self.ran.count("nnUNetv2_train") == self.fail_at:
            self.fail_at = -1
            raise CommandFailedError("told to.")
        if command[0] == "stunet":
            with pytest.MonkeyPatch.context() as patch:
                self.workspace.in_this_process(patch, dict(environment))
                assert main(list(command[1:])) == 0
        else:
            print(self.workspace.run(command[0], *command[1:], **environment).stdout)


class Stunet:
    """The command `stunet` in this process; arguments that are text are split at blanks."""

    def __init__(
        self, folder: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
    ) -> None:
        self.folder, self.capsys, self.patch = folder, capsys, patch

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """Run it, expect an exit code; return its message, or what it printed if there is none."""
        words = [word for x in arguments for word in (x.split() if isinstance(x, str) else [x])]
        self.capsys.readouterr()
        given = main([str(word) for word in words])
        out, message = self.capsys.readouterr()
        assert given == code, message
        return message if code and message else out

    def refuse(self, *arguments: object) -> str:
        """Run it, expect a sentence and no change of any file; return the sentence."""
        before = self._files()
        message = self(*arguments, code=2)
        assert message.startswith("stunet ")
        assert "Traceback" not in message
        assert self._files() == before, "a refused command left something behind"
        return message

    def model(self, source: object, *options: object) -> Path:
        """Import a checkpoint; return the new model folder."""
        folder = self.folder / "models" / f"model_{len(list(self.folder.glob('models/*')))}"
        self("import", source, "--out", folder, *options)
        return folder

    def refuse_import(self, source: object, *options: object) -> str:
        return self.refuse("import", source, "--out", self.folder / "out" / "model", *options)

    def _files(self) -> dict[Path, int]:
        paths = self.folder.rglob("*")
        return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in paths}


@pytest.fixture
def stunet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Stunet:
    return Stunet(tmp_path, capsys, monkeypatch)


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty nnUNet_raw, nnUNet_preprocessed and nnUNet_results, in use."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture(scope="session")
def new_workspace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workspace]:
    return lambda name: Workspace(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def phantoms(
    new_workspace: Callable[[str], Workspace], tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    """Six phantoms, preprocessed for 2d and 3d_fullres: made once, a copy for each process."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    with FileLock(common / "phantoms.lock"):
        if not (common / "phantoms").is_dir():
            first = new_workspace("phantoms_unfinished")
            write_dataset(first.raw / f"Dataset{PHANTOM_ID}_Phantoms", num_cases=6, seed=1)
            what = ("-d", PHANTOM_ID, "-c", "2d", "3d_fullres", "-npfp", 1, "-np", 1)
            first.run("nnUNetv2_plan_and_preprocess", *what)
            first.root.rename(common / "phantoms")
    workspace = new_workspace("phantoms_copy")
    shutil.copytree(common / "phantoms", workspace.root, dirs_exist_ok=True)
    return workspace


@pytest.fixture
def nnunet_environment(phantoms: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The phantoms' environment in this process, for calls of nnU-Net's Python interface."""
    phantoms.in_this_process(monkeypatch)
    return phantoms
