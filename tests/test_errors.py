"""Hints for near misses."""

from __future__ import annotations

import pytest

from stunet_plugin.errors import did_you_mean, last_line

KNOWN = ("STUNetTrainer_small", "STUNetTrainer_base", "PCTNetTrainer")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("STUnetTrainer_smal", "STUNetTrainer_small"),
        ("stunettrainer_base", "STUNetTrainer_base"),
        ("PCTnetTrainer", "PCTNetTrainer"),
        ("xyz", None),
    ],
)
def test_names_as_hands_type_them(given: str, found: str | None) -> None:
    assert did_you_mean(given, KNOWN) == (f" Did you mean {found}?" if found else "")


def test_the_last_line_of_an_error() -> None:
    assert last_line(RuntimeError("ITK ERROR\n\n  cannot read\n")) == "cannot read"
    assert last_line(RuntimeError("")) == "RuntimeError"
