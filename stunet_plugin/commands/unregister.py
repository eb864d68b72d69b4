"""``stunet unregister``: the bridge files removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import INSTALL, Command


@dataclass(frozen=True)
class Unregister(Command):
    """Options of ``stunet unregister``."""

    command: ClassVar = "unregister"
    group: ClassVar = INSTALL
    summary: ClassVar = "Remove the bridge files again."
    example: ClassVar = "stunet unregister"

    def run(self) -> int:
        from stunet_plugin.nnunet.registration import unregister

        print("\n".join(unregister()))
        return 0
