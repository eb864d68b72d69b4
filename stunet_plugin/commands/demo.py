"""``stunet demo``: the stock commands on an embedded dataset or on yours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import INSTALL, SIZES, Command, device_option, option


@dataclass(frozen=True)
class Demo(Command):
    command: ClassVar = "demo"
    group: ClassVar = INSTALL
    summary: ClassVar = (
        "Plan, train, predict and evaluate with nnU-Net's own commands, on an embedded dataset or"
        " on yours."
    )
    example: ClassVar = "stunet demo --size small --out my_demo"
    failure: ClassVar = "a command of nnU-Net failed, or the disk is full"

    dataset: int | None = option(
        "--dataset", metavar="ID", help="a dataset in nnUNet_raw instead of the embedded one"
    )
    size: str = option("--size", default="small", choices=SIZES, help="size of STU-Net")
    epochs: int | None = option("--epochs", help="epochs of 15 iterations; 10 if not given")
    out: str = option(
        "--out", default="stunet_demo", metavar="FOLDER", help="for everything that is written"
    )
    device: str = device_option()

    def run(self) -> int:
        from stunet_plugin.demo.run import run_demo

        return run_demo(self)
