"""Ctrl-C and SIGTERM in commands: exit code 130, workers gone, the last line says how to resume."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from stunet_plugin.cli import interruptible, main, run
from stunet_plugin.commands import COMMANDS
from stunet_plugin.commands.command import RESUMES, STARTS_AGAIN, Command

ARGUMENTS = {
    "crosseval": ["--model", "M=m", "--dataset", "D=d"],
    "pseudo-label": ["model", "-i", "images", "-d", "910"],
    "merge-datasets": ["1", "2", "-d", "20"],
    "rank": ["random", "-d", "4"],
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_its_workers_first(number: int) -> None:
    workers = [
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)) for _ in range(2)
    ]
    before = signal.getsignal(signal.SIGTERM)

    def interrupted_run() -> None:
        with interruptible("It resumes"):
            for worker in workers:
                worker.start()
            os.kill(os.getpid(), number)
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt, match="^It resumes$"):
        interrupted_run()
    assert not any(worker.is_alive() for worker in workers)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("wait", "times"), [(0.5, 1), (0, 50)])
def test_a_worker_that_its_pool_ends_says_nothing_and_ends(wait: float, times: int) -> None:
    """Also in the moment of its fork, where Python forgets signals."""
    code = (
        "import multiprocessing as m, time; from stunet_plugin.cli import interruptible\n"
        "with interruptible(''):\n"
        f"  for _ in range({times}):\n"
        "    worker = m.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        f"    worker.start(); time.sleep({wait}); worker.terminate(); worker.join(20)\n"
        "    assert worker.exitcode == -15"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_last_line_says_how_it_resumes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Command) -> int:
        raise KeyboardInterrupt

    (command,) = [command for command in COMMANDS if command.command == name]
    monkeypatch.setattr(command, "run", interrupted)
    assert main([name, *ARGUMENTS[name]]) == 130
    says = STARTS_AGAIN if name == "rank" else RESUMES
    assert capsys.readouterr().err.splitlines()[-1] == f"Interrupted. {says}"
    assert run(command.parse(ARGUMENTS[name])) == 130
