"""``stunet doctor``: checks of the installation."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, option
from stunet_plugin.options import table


@dataclass(frozen=True)
class Doctor(Command):
    """Check the installation: versions, registration, GPU, environment variables."""

    command = "doctor"
    example = "stunet doctor -tr STUNetTrainer_large"
    failure = "something is wrong"
    notes = f"\n\nVariables that the trainers read:\n{table()}"

    trainer: str = option(
        "-tr", default="STUNetTrainer_base", metavar="TRAINER", help="that nnU-Net should find"
    )

    def run(self) -> int:
        from stunet_plugin.nnunet.doctor import examine

        return examine(self.trainer)
