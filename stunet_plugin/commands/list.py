"""``stunet list``: sizes with parameters, FLOPs, GPU memory; or trainers and planners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import NETWORKS, Command, flag, option


@dataclass(frozen=True)
class List(Command):
    command: ClassVar = "list"
    group: ClassVar = NETWORKS
    summary: ClassVar = (
        "Show the sizes of STU-Net with parameters, FLOPs and an estimate of GPU memory; or all"
        " trainers and planners."
    )
    example: ClassVar = "stunet list --patch-size 96 160 160 --batch-size 2 --classes 105"

    trainers: bool = flag("--trainers", "list trainers and planners instead")
    patch_size: tuple[int, ...] = option(
        "--patch-size", default=(128, 128, 128), nargs=3, metavar="N", help="voxels per axis"
    )
    batch_size: int = option("--batch-size", default=2, help="samples per training step")
    channels: int = option("--channels", default=1, help="input channels")
    classes: int = option("--classes", default=15, help="outputs, background included")

    def run(self) -> int:
        if self.trainers:
            print(_names())
            return 0
        from stunet_plugin.networks.size_table import size_table

        print(size_table(self.patch_size, self.batch_size, self.channels, self.classes))
        return 0


def _names() -> str:
    """Return all trainers and planners, each with the first sentence of its docstring."""
    from stunet_plugin import plans, trainers

    lines = []
    for module, title in (
        (trainers, "Trainers, for nnUNetv2_train -tr:"),
        (plans, "\nPlanners, for nnUNetv2_plan_experiment -pl and stunet plan -pl:"),
    ):
        lines.append(title)
        for name in module.__all__:
            text = " ".join((getattr(module, name).__doc__ or "").split())
            lines.append(f"  {name:<33}{text.partition('. ')[0].removesuffix('.')}")
    return "\n".join(lines)
