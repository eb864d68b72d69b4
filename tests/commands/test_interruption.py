"""Ctrl-C and SIGTERM in the commands: exit code 130, the workers gone, and as the last line how it
goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest

from stunet_plugin.cli import main
from stunet_plugin.commands import package_commands


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_its_workers_first(number: int, monkeypatch: Any) -> None:
    workers = [
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)) for _ in range(2)
    ]

    def interrupted(_: str) -> None:
        for worker in workers:
            worker.start()
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(package_commands, "_imported", interrupted)
    (rank,) = [command for command in package_commands.COMMANDS if command.name == "rank"]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        KeyboardInterrupt, match=r"^Nothing was written; the same command begins anew\.$"
    ):
        rank(None)  # type: ignore[arg-type]
    assert not any(worker.is_alive() for worker in workers)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("command", ["crosseval", "pseudo-label", "merge-datasets"])
def test_the_last_line_says_how_it_goes_on(
    command: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "crosseval": ["--model", "M=m", "--dataset", "D=d"],
        "pseudo-label": ["model", "-i", "images", "-d", "910"],
        "merge-datasets": ["1", "2", "-d", "20"],
    }[command]

    def interrupted(place: str) -> Any:
        if "arguments" in place:
            return imported(place)
        raise KeyboardInterrupt

    imported = package_commands._imported
    monkeypatch.setattr(package_commands, "_imported", interrupted)
    assert main([command, *arguments]) == 130
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "Interrupted. The same command goes on where it stopped."
    )
