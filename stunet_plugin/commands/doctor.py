"""``stunet doctor``: checks of the installation, or of a dataset."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, flag, option
from stunet_plugin.nnunet.names import CONFIGURATION, PLANS_NAME
from stunet_plugin.options import table


@dataclass(frozen=True)
class Doctor(Command):
    """Check the installation (versions, registration, GPU, environment variables), or a dataset and
    what a training on it needs."""

    command = "doctor"
    example = "stunet doctor -tr STUNetTrainer_large; stunet doctor -d 4"
    failure = "something is wrong"
    notes = f"\n\nVariables that the trainers read:\n{table()}"

    trainer: str = option(
        "-tr", default="STUNetTrainer_base", metavar="TRAINER", help="that nnU-Net should find"
    )
    dataset: str | None = option(
        "-d", metavar="DATASET", help="ID, name or folder of a dataset in nnUNet_raw to check"
    )
    plans: str = option("-p", default=PLANS_NAME, metavar="PLANS", help="for -d, if made already")
    configuration: str = option("-c", default=CONFIGURATION, help="for -d, of the plans")
    all: bool = flag("--all", "for -d: read all voxels, not only those that 45 s suffice for")
    processes: int | None = option(
        "-np", metavar="N", help="for -d: processes; if not given, half the cores"
    )
    json: bool = flag("--json", "print JSON")

    def run(self) -> int:
        if self.dataset is not None:
            from stunet_plugin.datasets.doctor import examine_dataset

            return examine_dataset(self)
        from stunet_plugin.nnunet.doctor import examine

        return examine(self.trainer, self.json)
