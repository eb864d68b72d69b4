"""``stunet doctor``: checks of the installation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import INSTALL, Command


@dataclass(frozen=True)
class Doctor(Command):
    command: ClassVar = "doctor"
    group: ClassVar = INSTALL
    summary: ClassVar = (
        "Check the installation: versions, registration, GPU, environment variables."
    )
    example: ClassVar = "stunet doctor"
    failure: ClassVar = "something is wrong"

    def run(self) -> int:
        from stunet_plugin.nnunet.doctor import examine

        return examine()
