"""Command of ``stunet``: a frozen dataclass in a file of its own, which imports nothing heavy.

Each field is an argument of argparse, the docstring is the summary in the help, the instance is the
options object that the code behind it takes, and ``run`` imports that code.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from stunet_plugin.errors import did_you_mean
from stunet_plugin.networks.presets import PRESETS

if TYPE_CHECKING:
    from typing_extensions import Self

RESUMES = "The same command resumes where it stopped."

SIZES = tuple(PRESETS)
"""Of STU-Net."""


def option(*flags: str, default: Any = None, heading: tuple[str, ...] = (), **settings: Any) -> Any:
    """Return a field that is an argument with a default.

    Args:
        flags: such as ``-d``; none for a positional argument.
        heading: title, and a description, above this argument and those that follow in the help.
        settings: of ``argparse.ArgumentParser.add_argument``. The type is the field's.
    """
    metadata = {"flags": flags, "heading": heading, "settings": settings}
    return field(default=default, metadata=metadata)


def required(*flags: str, **settings: Any) -> Any:
    """Return a field that is a required argument; see ``option``."""
    return option(*flags, default=MISSING, **settings)


def flag(name: str, help: str, default: bool = False) -> Any:
    """Return a field that is a switch: ``name`` turns the default round."""
    action = "store_false" if default else "store_true"
    return option(name, default=default, action=action, help=help)


def repeated(*flags: str, **settings: Any) -> Any:
    """Return a field that is an option which may be given several times."""
    return option(*flags, default=(), action="append", **settings)


def device_option() -> Any:
    """Return the field ``--device``."""
    meaning = "auto takes a CUDA GPU if there is one; mps is Apple's"
    choices = ("auto", "cpu", "cuda", "mps")
    return option("--device", "-device", default="auto", choices=choices, help=meaning)


@dataclass(frozen=True)
class Command:
    """Base of all commands.

    Attributes:
        command: the word after ``stunet``.
        example: a command line that can be pasted.
        runs: ``module:function``, imported when the command runs: it takes the options, that is the
            instance, and returns the exit code.
        interrupted: last line after Ctrl-C, saying how to resume.
        failure: what exit code 1 means.
        notes: more text at the end of the help; indented lines stay as they are.
    """

    command: ClassVar[str]
    example: ClassVar[str]
    runs: ClassVar[str]
    interrupted: ClassVar[str] = ""
    failure: ClassVar[str] = "the disk is full"
    notes: ClassVar[str] = ""

    def run(self) -> int:
        """Do it and return the exit code; raise PluginError for wrong input."""
        module, _, function = self.runs.partition(":")
        return int(getattr(importlib.import_module(module), function)(self))

    @classmethod
    def summary(cls) -> str:
        """Return what it does, in one sentence."""
        return " ".join((cls.__doc__ or "").split())

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """Return the options; end with a usage message if they are wrong. Lists are tuples."""
        given = vars(cls.parser().parse_args(words))
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        parser = CommandParser(
            prog=f"stunet {cls.command}",
            description=cls.summary(),
            epilog=f"Example:\n  {cls.example}\n\nExit codes: 0 done, 1 {cls.failure},"
            f" 2 wrong input, 130 interrupted.{cls.notes}",
            formatter_class=HelpFormatter,
        )
        target: Any = parser
        for one in fields(cls):
            flags, settings = one.metadata["flags"], dict(one.metadata["settings"])
            if one.metadata["heading"]:
                target = parser.add_argument_group(*one.metadata["heading"])
            if flags:
                settings |= {"dest": one.name, "required": one.default is MISSING}
            if one.default is not MISSING:
                # argparse appends to a list.
                settings["default"] = [] if one.default == () else one.default
            # <class 'int'>, tuple[float, ...] | None
            if number := re.search(r"\b(int|float)\b", str(one.type)):
                settings["type"] = int if number[0] == "int" else float
            target.add_argument(*(flags or (one.name,)), **settings)
        return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is one to show, and keeps indented lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, [], argparse.SUPPRESS) or isinstance(default, bool):
            return action.help
        words = default if isinstance(default, tuple) else [default]
        return f"{action.help} (default: {' '.join(map(str, words))})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        lines = text.splitlines()
        return "\n".join(x if x.startswith(" ") else fill(x, width, indent) for x in lines)


class CommandParser(argparse.ArgumentParser):
    """Parser that answers unknown options with the nearest known one."""

    # argparse has no types here.
    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [word for action in self._actions for word in action.option_strings]
            hint = did_you_mean(unknown[0], known, cutoff=0.7)
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
        return options, unknown
