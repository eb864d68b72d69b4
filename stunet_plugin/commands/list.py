"""``stunet list``: sizes with parameters, FLOPs and an estimate of GPU memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import NETWORKS, Command, argument


@dataclass(frozen=True)
class List(Command):
    """Options of ``stunet list``."""

    command: ClassVar = "list"
    group: ClassVar = NETWORKS
    summary: ClassVar = (
        "Show the sizes with parameters, FLOPs and an estimate of the GPU memory for training."
    )
    example: ClassVar = "stunet list --patch-size 96 160 160 --batch-size 2 --classes 14"

    patch_size: tuple[int, ...] = argument(
        "--patch-size",
        default=(128, 128, 128),
        type=int,
        nargs=3,
        metavar="N",
        help="voxels per axis",
    )
    batch_size: int = argument(
        "--batch-size", default=2, type=int, help="samples per training step"
    )
    channels: int = argument("--channels", default=1, type=int, help="input channels")
    classes: int = argument("--classes", default=105, type=int, help="outputs, background included")

    def run(self) -> int:
        from stunet_plugin.networks.size_table import size_table

        print(size_table(self.patch_size, self.batch_size, self.channels, self.classes))
        return 0
