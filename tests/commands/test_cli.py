"""``stunet`` itself: help, unknown commands and options, errors, Ctrl-C and SIGTERM."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from stunet_plugin import plans, trainers
from stunet_plugin.cli import interruptible, main
from stunet_plugin.commands import COMMANDS
from stunet_plugin.commands.command import Command
from stunet_plugin.commands.list import List
from stunet_plugin.commands.pseudo_label import PseudoLabel
from stunet_plugin.errors import PluginError, did_you_mean, few, few_lines, last_line

from conftest import Stunet


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    shown = python(
        "import sys, stunet_plugin.cli as cli; cli.build_parser().print_help();"
        " [command.parser().format_help() for command in cli.COMMANDS];"
        " assert not {'torch', 'numpy', 'nnunetv2'} & set(sys.modules)"
    )
    for command in COMMANDS:
        assert f"\n  {command.command} " in shown


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: stunet" in capsys.readouterr().out
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([command.command, "--help"])
        text = capsys.readouterr().out
        assert f"\n  {command.example}\n" in text
        assert "Exit codes: 0 done, 1 " in text
        assert command.summary()[:40] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("list --pach-size 64", "unrecognized arguments: --pach-size 64. Did you mean"),
        ("rank folder -d 4 --bogus", "unrecognized arguments: --bogus."),
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
    known = arguments.split()[0] if arguments[0] in "lr" else "[-h]"
    assert usage.startswith(f"usage: stunet {known} ")
    assert error.startswith(message)


def test_arguments_have_the_types_of_their_fields() -> None:
    given = "m -i x -d 7 --step-size 1 --no-mirroring -f 0 all --size a=1: --size b=:2"
    options = PseudoLabel.parse(given.split())
    assert (options.dataset_id, options.step_size, options.mirroring) == (7, 1.0, False)
    assert (options.folds, options.size) == (("0", "all"), ("a=1:", "b=:2"))
    assert (options.min_confidence, options.ignore_below, options.copy) == ((), None, False)
    sizes = List.parse(["--patch-size", "64", "64", "64", "--classes", "3"])
    assert (sizes.patch_size, sizes.classes) == ((64, 64, 64), 3)


def test_list(stunet: Stunet) -> None:
    lines = stunet("list --trainers").splitlines()
    listed = {line.split()[0] for line in lines if line[:2] == "  "}
    assert listed == {*trainers.__all__, *plans.__all__}
    assert "at least 1, not 0" in stunet.refuse("list --classes 0")


@pytest.mark.parametrize(
    ("error", "code", "fact"),
    [
        (PluginError("wrong"), 2, "stunet list: wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pth"), 1, "disk (a.pth). Make room"),
        (RuntimeError("[enforce fail at inline.cc:672] . unexpected pos 1 vs 2"), 1, "space"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "Permission denied (/a/b)"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (BrokenPipeError(), 0, ""),
        (ZeroDivisionError(), None, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_become_sentences_and_exit_codes_but_bugs_keep_their_traceback(
    error: BaseException, code: int | None, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Command) -> int:
        raise error

    monkeypatch.setattr(List, "run", fail)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    said.close = lambda: None  # type: ignore[method-assign]
    if code is None:
        with pytest.raises(type(error)):
            main(["list"])
    else:
        assert main(["list"]) == code
        assert fact in said.getvalue()


def test_words_of_messages() -> None:
    known = ("STUNetTrainer_small", "STUNetTrainer_base", "PCTNetTrainer")
    for given, meant in (("STUnetTrainer_smal", known[0]), ("PCTnetTrainer", known[2])):
        assert did_you_mean(given, known) == f" Did you mean {meant}?"
    assert did_you_mean("xyz", known) == ""
    assert last_line(RuntimeError("ITK ERROR\n\n  cannot read\n")) == "cannot read"
    assert last_line(RuntimeError("")) == "RuntimeError"
    assert few(["a", "b", "c"], 2) == "a, b and 1 more"
    assert few_lines(["a", "b", "c"], 2) == "a\nb\n... and 1 more"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_its_workers_first(number: int) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=time.sleep, args=(60,)) for _ in range(2)]
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
    python(
        "import multiprocessing as m, time; from stunet_plugin.cli import interruptible\n"
        "with interruptible(''):\n"
        f"  for _ in range({times}):\n"
        "    worker = m.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        f"    worker.start(); time.sleep({wait}); worker.terminate(); worker.join(20)\n"
        "    assert worker.exitcode == -15"
    )


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("crosseval", "--model M=m --dataset D=d", "resumes"),
        ("pseudo-label", "model -i images -d 910", "resumes"),
        ("merge-datasets", "1 2 -d 20", "resumes"),
        ("rank", "random -d 4", "start the same command again"),
    ],
)
def test_the_last_line_says_how_it_resumes(
    name: str, arguments: str, says: str, stunet: Stunet
) -> None:
    def interrupted(_: Command) -> int:
        raise KeyboardInterrupt

    (command,) = [command for command in COMMANDS if command.command == name]
    stunet.patch.setattr(command, "run", interrupted)
    last = stunet(name, arguments, code=130).splitlines()[-1]
    assert last.startswith("Interrupted. ")
    assert says in last
