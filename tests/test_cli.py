"""The parser of ``stunet``."""

from __future__ import annotations

import pytest

from stunet_plugin.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["list", "--pach-size", "64"],
            "unrecognized arguments: --pach-size 64. Did you mean --patch-size?",
        ),
        (["rank", "folder", "-d", "4", "--bogus"], "unrecognized arguments: --bogus."),
        (["list", "extra"], "unrecognized arguments: extra."),
    ],
)
def test_what_a_command_does_not_know_is_answered_with_its_own_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    usage, _, error = capsys.readouterr().err.partition(f"stunet {arguments[0]}: error: ")
    assert usage.startswith(f"usage: stunet {arguments[0]} ")
    assert error == message + "\n"
