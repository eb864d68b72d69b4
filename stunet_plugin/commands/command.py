"""Command of ``stunet``: a dataclass whose fields are its arguments. Imports nothing heavy.

A command is a frozen dataclass in a file of its own. Each field is an argument of argparse, its
instance is the options object that the code behind it takes, and ``run`` imports that code.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from stunet_plugin.errors import did_you_mean

INSTALL, NETWORKS, WEIGHTS, DATA, EVALUATION = (
    "install",
    "networks and plans",
    "weights",
    "data",
    "evaluation",
)
GROUPS = (INSTALL, NETWORKS, WEIGHTS, DATA, EVALUATION)
"""Of commands, as ``stunet --help`` shows them."""

RESUMES = "The same command goes on where it stopped."
STARTS_AGAIN = "Nothing was written; start the same command again."


class Section(NamedTuple):
    """Heading above some arguments in a command's help."""

    title: str
    description: str | None = None


def argument(
    *flags: str, default: Any = MISSING, section: Section | None = None, **settings: Any
) -> Any:
    """Return a dataclass field that is an argument of the command.

    Args:
        flags: such as ``-d``; none for a positional argument.
        default: required without one.
        section: heading it goes under.
        settings: what ``argparse.ArgumentParser.add_argument`` takes besides.
    """
    if settings.get("action") == "store_true":
        default = False
    metadata = {"flags": flags, "section": section, "settings": settings}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Command:
    """Base of all commands.

    Attributes:
        command: the word after ``stunet``.
        group: one of GROUPS.
        summary: one sentence.
        example: a command line that can be pasted.
        interrupted: last line after Ctrl-C, saying how to resume.
    """

    command: ClassVar[str]
    group: ClassVar[str]
    summary: ClassVar[str]
    example: ClassVar[str]
    interrupted: ClassVar[str] = ""

    def run(self) -> int:
        """Do it and return the exit code.

        Raises:
            PluginError: wrong input.
        """
        raise NotImplementedError

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        sections: dict[Section, Any] = {}
        for one in fields(cls):
            section, settings = one.metadata["section"], dict(one.metadata["settings"])
            flags = one.metadata["flags"] or (one.name,)
            if flags[0].startswith("-"):
                settings["dest"] = one.name
                settings["required"] = one.default is MISSING
            if one.default is not MISSING and settings.get("action") != "store_true":
                # argparse appends to a list.
                settings["default"] = (
                    list(one.default) if settings.get("action") == "append" else one.default
                )
            if section is not None and section not in sections:
                sections[section] = parser.add_argument_group(*section)
            (parser if section is None else sections[section]).add_argument(*flags, **settings)

    @classmethod
    def from_arguments(cls, given: argparse.Namespace) -> Command:
        """Return the options, lists as tuples."""
        values = {one.name: getattr(given, one.name) for one in fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default in (None, False, True) or action.default in ([], ())
        return action.help if nothing else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """Parser of one command: answers unknown options with the usage of that command."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # argparse
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [word for action in self._actions for word in action.option_strings]
            hint = did_you_mean(unknown[0], known, cutoff=0.7)
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
        return options, unknown
