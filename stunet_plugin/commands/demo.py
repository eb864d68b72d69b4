"""``stunet demo``: the stock commands on an embedded dataset or on yours."""

from dataclasses import dataclass

from stunet_plugin.commands.command import SIZES, Command, device_option, option


@dataclass(frozen=True)
class Demo(Command):
    """Plan, train, predict and evaluate with nnU-Net's own commands, on an embedded dataset or on
    yours."""

    command = "demo"
    example = "stunet demo --size small --out my_demo"
    runs = "stunet_plugin.demo.run:run_demo"
    failure = "a command of nnU-Net failed, the network found nothing, or the disk is full"

    dataset: int | None = option(
        "--dataset", metavar="ID", help="a dataset in nnUNet_raw instead of the embedded one"
    )
    size: str = option(
        "--size", default="small", choices=SIZES, help="of STU-Net; tiny learns next to nothing"
    )
    epochs: int = option("--epochs", default=10, metavar="N", help="epochs of 15 iterations")
    out: str = option(
        "--out", default="stunet_demo", metavar="FOLDER", help="for everything that is written"
    )
    device: str = device_option()
