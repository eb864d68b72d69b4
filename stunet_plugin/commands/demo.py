"""``stunet demo``: the stock commands on an embedded dataset or on yours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import INSTALL, Command, argument


@dataclass(frozen=True)
class Demo(Command):
    """Options of ``stunet demo``."""

    command: ClassVar = "demo"
    group: ClassVar = INSTALL
    summary: ClassVar = (
        "Run plan, train, predict and evaluate through the stock nnU-Net commands, on an embedded"
        " data set or on yours."
    )
    example: ClassVar = "stunet demo --size small --out my_demo"

    dataset: int | None = argument(
        "--dataset",
        default=None,
        type=int,
        metavar="ID",
        help="a dataset in nnUNet_raw instead of the embedded one",
    )
    size: str = argument(
        "--size",
        default="small",
        choices=("tiny", "small", "base", "large", "huge"),
        help="size of STU-Net",
    )
    epochs: int | None = argument(
        "--epochs", default=None, type=int, help="epochs of 15 iterations; 10 if not given"
    )
    out: str = argument(
        "--out",
        default="stunet_demo",
        metavar="FOLDER",
        help="everything is written here and nowhere else",
    )
    device: str = argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto takes a GPU where there is one",
    )
    resume: bool = argument(
        "--resume", action="store_true", help="continue an interrupted demo in the same folder"
    )

    def run(self) -> int:
        from stunet_plugin.demo.run import run_demo
        from stunet_plugin.demo.settings import DemoSettings

        settings = DemoSettings.from_options(self.dataset, self.size, self.epochs, self.device)
        return run_demo(settings, self.out, self.resume)
