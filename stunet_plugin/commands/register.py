"""``stunet register``: bridge files that let nnU-Net find our trainers and planners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import INSTALL, Command


@dataclass(frozen=True)
class Register(Command):
    """Options of ``stunet register``."""

    command: ClassVar = "register"
    group: ClassVar = INSTALL
    summary: ClassVar = (
        "Let stock nnU-Net find our trainers and planners: writes two small bridge files into"
        " nnunetv2."
    )
    example: ClassVar = "stunet register"

    def run(self) -> int:
        from stunet_plugin.nnunet.registration import register

        print("\n".join(register()))
        print("Check with: stunet doctor")
        return 0
