"""``stunet doctor``: checks of the installation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import INSTALL, Command, option
from stunet_plugin.options import table


@dataclass(frozen=True)
class Doctor(Command):
    command: ClassVar = "doctor"
    group: ClassVar = INSTALL
    summary: ClassVar = (
        "Check the installation: versions, registration, GPU, environment variables."
    )
    example: ClassVar = "stunet doctor -tr STUNetTrainer_large"
    failure: ClassVar = "something is wrong"
    notes: ClassVar = f"\n\nVariables that the trainers read:\n{table()}"

    trainer: str = option(
        "-tr", default="STUNetTrainer_base", metavar="TRAINER", help="that nnU-Net should find"
    )

    def run(self) -> int:
        from stunet_plugin.nnunet.doctor import examine

        return examine(self.trainer, _our_trainers)


def _our_trainers() -> list[str]:
    from stunet_plugin import trainers

    return list(trainers.__all__)
