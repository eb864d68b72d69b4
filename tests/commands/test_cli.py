"""``stunet`` itself: help, unknown commands and options, errors, Ctrl-C and SIGTERM."""

from __future__ import annotations

import errno
import inspect
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from stunet_plugin import plans, trainers
from stunet_plugin.cli import main
from stunet_plugin.commands import COMMANDS
from stunet_plugin.commands.command import Command
from stunet_plugin.commands.dispatch import interruptible
from stunet_plugin.commands.list import List
from stunet_plugin.errors import PluginError

from conftest import Stunet


def test_help_of_every_command_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert "usage: stunet" in shown
    for command in COMMANDS:
        assert f"\n  {command.command} " in shown
        with pytest.raises(SystemExit, match="0"):
            main([command.command, "--help"])
        text = capsys.readouterr().out
        assert f"\n  {command.example}\n" in text
        assert "Exit codes: 0 done, 1 " in text
        assert command.summary()[:40] in text
    python(
        "import sys; from stunet_plugin.cli import main; from stunet_plugin.commands import *\n"
        "main([]), [command.parser().format_help() for command in COMMANDS]\n"
        "assert not {'torch', 'numpy', 'nnunetv2'} & set(sys.modules)"
    )


def python(code: str) -> None:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("list --pach-size 64", "unrecognized arguments: --pach-size 64. Did you mean"),
        ("list extra", "unrecognized arguments: extra."),
        ("imprt x.pth", "there is no command 'imprt'. Did you mean import? All commands:"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_what_is_unknown_is_answered_with_the_nearest(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    usage, _, error = capsys.readouterr().err.partition("error: ")
    known = arguments.split()[0] if arguments.startswith("list") else "[-h]"
    assert usage.startswith(f"usage: stunet {known} ")
    assert error.startswith(message)


def test_list(stunet: Stunet) -> None:
    lines = stunet("list --trainers").splitlines()
    listed = {line.split()[0] for line in lines if line[:2] == "  "}
    assert listed == {*trainers.__all__, *plans.__all__}
    facts = json.loads(stunet("list --trainers --json"))
    assert {*facts["trainers"], *facts["planners"]} == listed
    sizes = {one["size"]: one for one in json.loads(stunet("list --json"))["sizes"]}
    assert sizes["base"]["parameters"] == 58_172_939
    assert "at least 1, not 0" in stunet.refuse("list --classes 0")


def raising(error: BaseException) -> Callable[[Any], int]:
    def fail(_: Any) -> int:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "fact"),
    [
        (PluginError("wrong"), 2, "stunet list: wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pth"), 1, "disk (a.pth). Make room"),
        (RuntimeError("[enforce fail at inline.cc:672] . unexpected pos 1 vs 2"), 1, "space"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "Permission denied (/a/b)"),
        (BrokenPipeError(), 0, ""),
        (ZeroDivisionError(), None, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_become_sentences_and_exit_codes_but_bugs_keep_their_traceback(
    error: BaseException, code: int | None, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(List, "run", raising(error))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    said.close = lambda: None  # type: ignore[method-assign]
    if code is None:
        with pytest.raises(type(error)):
            main(["list"])
    else:
        assert main(["list"]) == code
        assert fact in said.getvalue()


def test_every_command_has_the_function_that_it_runs() -> None:
    """Found by its name when the command runs, so mypy does not see it."""
    for command in COMMANDS:
        if command.run is Command.run:
            module, _, function = command.runs.partition(":")
            parameters = inspect.signature(getattr(import_module(module), function)).parameters
            assert len(parameters) == 1, command


@pytest.mark.posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_its_workers_first(number: int) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=time.sleep, args=(60,)) for _ in range(2)]
    before = signal.getsignal(signal.SIGTERM)
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt, match="^It resumes$"),
        interruptible("It resumes"),
    ):
        for worker in workers:
            worker.start()
        os.kill(os.getpid(), number)
        time.sleep(60)
    assert not any(worker.is_alive() for worker in workers)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.posix
def test_a_worker_that_its_pool_ends_says_nothing_and_ends() -> None:
    """Also in the moment of its fork, where Python forgets signals."""
    python(
        "import multiprocessing as m, time\n"
        "from stunet_plugin.commands.dispatch import interruptible\n"
        "with interruptible(''):\n"
        "  for wait in [0.5] + [0] * 50:\n"
        "    worker = m.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    worker.start(); time.sleep(wait); worker.terminate(); worker.join(20)\n"
        "    assert worker.exitcode == -15"
    )
