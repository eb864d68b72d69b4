"""``stunet list``: sizes with parameters, FLOPs and an estimate of GPU memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import NETWORKS, Command, option


@dataclass(frozen=True)
class List(Command):
    command: ClassVar = "list"
    group: ClassVar = NETWORKS
    summary: ClassVar = (
        "Show the sizes of STU-Net: parameters, FLOPs, and an estimate of GPU memory in training."
    )
    example: ClassVar = "stunet list --patch-size 96 160 160 --batch-size 2 --classes 105"

    patch_size: tuple[int, ...] = option(
        "--patch-size", default=(128, 128, 128), nargs=3, metavar="N", help="voxels per axis"
    )
    batch_size: int = option("--batch-size", default=2, help="samples per training step")
    channels: int = option("--channels", default=1, help="input channels")
    classes: int = option("--classes", default=15, help="outputs, background included")

    def run(self) -> int:
        from stunet_plugin.networks.size_table import size_table

        print(size_table(self.patch_size, self.batch_size, self.channels, self.classes))
        return 0
