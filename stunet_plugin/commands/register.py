"""``stunet register`` and ``unregister``: bridge files that let nnU-Net find our classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import INSTALL, Command


@dataclass(frozen=True)
class Register(Command):
    command: ClassVar = "register"
    group: ClassVar = INSTALL
    summary: ClassVar = (
        "Let nnU-Net find our trainers and planners: writes two small bridge files into nnunetv2."
    )
    example: ClassVar = "stunet register"

    def run(self) -> int:
        from stunet_plugin.nnunet.registration import register

        print("\n".join(register()))
        print("Check with: stunet doctor")
        return 0


@dataclass(frozen=True)
class Unregister(Command):
    command: ClassVar = "unregister"
    group: ClassVar = INSTALL
    summary: ClassVar = "Remove the bridge files again."
    example: ClassVar = "stunet unregister"

    def run(self) -> int:
        from stunet_plugin.nnunet.registration import unregister

        print("\n".join(unregister()))
        return 0
