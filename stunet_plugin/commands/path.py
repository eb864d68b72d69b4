"""``stunet path``: folder of our trainers or planners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import INSTALL, Command, required


@dataclass(frozen=True)
class Path(Command):
    command: ClassVar = "path"
    group: ClassVar = INSTALL
    summary: ClassVar = "Print the folder of our trainers (for nnUNet_extTrainer) or planners."
    example: ClassVar = "export nnUNet_extTrainer=$(stunet path trainers)"

    what: str = required(choices=("trainers", "plans"), help="which folder")

    def run(self) -> int:
        from stunet_plugin.nnunet.registration import plans_folder, trainers_folder

        print(trainers_folder() if self.what == "trainers" else plans_folder())
        return 0
