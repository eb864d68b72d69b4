"""``stunet list``: sizes with parameters, FLOPs, GPU memory; or trainers and planners."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, flag, option
from stunet_plugin.errors import PluginError

EXPLANATION = """\
FLOPs: forward pass of one patch, a multiply-add counted once, as in the paper. Memory: estimated
peak of a training step on CUDA with AMP; with many outputs most of it is the loss. Least: with
activation checkpointing, which large and huge switch on where it is needed (STUNET_CHECKPOINTING).
The planner's default is what STUNetPlanner_<size> fits patch and batch to.
Sources: arXiv:2304.06716 and the published checkpoints; tiny is for tests."""


@dataclass(frozen=True)
class List(Command):
    """Show the sizes of STU-Net with parameters, FLOPs and an estimate of GPU memory; or all
    trainers and planners."""

    command = "list"
    example = "stunet list --patch-size 96 160 160 --batch-size 2 --classes 105"

    trainers: bool = flag("--trainers", "list trainers and planners instead")
    patch_size: tuple[int, ...] = option(
        "--patch-size", default=(128, 128, 128), nargs=3, metavar="N", help="voxels per axis"
    )
    batch_size: int = option("--batch-size", default=2, help="samples per training step")
    channels: int = option("--channels", default=1, help="input channels")
    classes: int = option("--classes", default=15, help="outputs, background included")

    def run(self) -> int:
        print(_names() if self.trainers else size_table(self))
        return 0


def size_table(options: List) -> str:
    """Return parameters, FLOPs and training memory of every size of STU-Net.

    Raises:
        PluginError: the patch cannot be pooled, or a number is smaller than 1.
    """
    from stunet_plugin.networks.activation_checkpointing import SETTINGS
    from stunet_plugin.networks.memory import GIGABYTE, STUNetShape
    from stunet_plugin.networks.presets import PRESETS
    from stunet_plugin.networks.topology import strides_for_patch, total_stride

    batch, channels, classes = options.batch_size, options.channels, options.classes
    for name, value in (("--batch-size", batch), ("--channels", channels), ("--classes", classes)):
        if value < 1:
            raise PluginError(f"{name} must be at least 1, not {value}.")
    strides = strides_for_patch(options.patch_size)
    patch, reduced = ("x".join(map(str, x)) for x in (options.patch_size, total_stride(strides)))
    rows = [
        f"{'size':<7}{'width':>6}{'blocks':>8}{'parameters':>15}{'TFLOPs':>9}{'memory':>10}"
        f"{'least':>10}  planner default"
    ]
    for preset in PRESETS.values():
        shape = STUNetShape.of_preset(preset, strides, channels, classes)
        peaks = [
            shape.training_memory(options.patch_size, batch, checkpointing=setting) / GIGABYTE
            for setting in SETTINGS
        ]
        tera = shape.multiply_adds(options.patch_size) / 1e12
        rows.append(
            f"{preset.name:<7}{preset.width:>6}{preset.blocks:>8}{shape.parameters():>15,}"
            f"{tera:>9.2f}{peaks[0]:>7.1f} GB{min(peaks):>7.1f} GB{preset.gpu_memory_gb:>8g} GB"
        )
    inputs = f"At patch {patch} (reduced by {reduced}), batch {batch}, {channels} channel(s)"
    return "\n".join([*rows, f"\n{inputs}, {classes} outputs.", EXPLANATION])


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
            text = " ".join((getattr(module, name).__doc__ or "").replace("``", "").split())
            lines.append(f"  {name:<33}{text.partition('. ')[0].removesuffix('.')}")
    return "\n".join(lines)
