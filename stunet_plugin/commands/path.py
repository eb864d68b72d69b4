"""``stunet path``: folder of our trainers or planners."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, required


@dataclass(frozen=True)
class Path(Command):
    """Print the folder of our trainers (for nnUNet_extTrainer) or of our planners (plans)."""

    command = "path"
    example = "export nnUNet_extTrainer=$(stunet path trainers)"

    what: str = required(choices=("trainers", "plans"), help="which folder")

    def run(self) -> int:
        from stunet_plugin.nnunet.registration import package_folder

        print(package_folder(self.what))
        return 0
