"""The parser of ``stunet``: help, unknown commands and options."""

from __future__ import annotations

import errno
import io
import subprocess
import sys

import pytest

from stunet_plugin import plans, trainers
from stunet_plugin.cli import main
from stunet_plugin.commands import COMMANDS
from stunet_plugin.commands.command import Command
from stunet_plugin.commands.list import List
from stunet_plugin.commands.pseudo_label import PseudoLabel
from stunet_plugin.errors import PluginError


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, stunet_plugin.cli as cli; cli.build_parser().print_help();"
        " [command.parser().format_help() for command in cli.COMMANDS];"
        " assert not {'torch', 'numpy', 'nnunetv2'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    for command in COMMANDS:
        assert f"\n  {command.command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.command)
def test_every_command_has_help(command: type[Command], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command.command, "--help"])
    text = capsys.readouterr().out
    assert f"\n  {command.example}\n" in text
    assert "Exit codes: 0 done, 1 " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--pach-size", "64"], "unrecognized arguments: --pach-size 64. Did you mean"),
        (["rank", "folder", "-d", "4", "--bogus"], "unrecognized arguments: --bogus."),
        (["list", "extra"], "unrecognized arguments: extra."),
        (["imprt", "x.pth"], "there is no command 'imprt'. Did you mean import? All commands:"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_what_is_unknown_is_answered_with_the_nearest(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    usage, _, error = capsys.readouterr().err.partition("error: ")
    known = arguments[0] in ("list", "rank")
    assert usage.startswith(f"usage: stunet {arguments[0]} " if known else "usage: stunet [-h]")
    assert error.startswith(message)
    assert "choose from" not in error


def test_arguments_have_the_types_of_their_fields() -> None:
    given = ["m", "-i", "x", "-d", "7", "--step-size", "1", "--no-mirroring", "-f", "0", "all"]
    options = PseudoLabel.parse([*given, "--size", "a=1:", "--size", "b=:2"])
    assert (options.dataset_id, options.step_size, options.mirroring) == (7, 1.0, False)
    assert (options.folds, options.size) == (("0", "all"), ("a=1:", "b=:2"))
    assert (options.min_confidence, options.ignore_below, options.copy) == ((), None, False)


@pytest.mark.parametrize(
    ("error", "code", "fact"),
    [
        (PluginError("wrong"), 2, "stunet list: wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pth"), 1, "disk (a.pth). Make room"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"),
            1,
            "space",
        ),
        (RuntimeError("ITK ERROR: Reason: No space left on device"), 1, "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "Permission denied (/a/b)"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (BrokenPipeError(), 0, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_become_sentences_and_exit_codes(
    error: BaseException, code: int, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Command) -> int:
        raise error

    monkeypatch.setattr(List, "run", fail)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    said.close = lambda: None  # type: ignore[method-assign]
    assert main(["list"]) == code
    assert fact in said.getvalue()


def test_trainers_and_planners_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--trainers"]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "}
    assert names == {*trainers.__all__, *plans.__all__}


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(List, "run", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["list"])
