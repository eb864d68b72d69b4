"""``stunet list``: sizes with parameters, FLOPs, GPU memory; or trainers and planners."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stunet_plugin.commands.command import Command, flag, option
from stunet_plugin.errors import PluginError

EXPLANATION = """\
FLOPs: forward pass of one patch, a multiply-add counted once, as in the paper. Memory: estimated
peak of a training step on CUDA with AMP; with many outputs most of it is the loss. Least: with
activation checkpointing, which large and huge switch on where it is needed (STUNET_CHECKPOINTING).
The planner's default is what STUNetPlanner_<size> fits patch and batch to.
Sources: arXiv:2304.06716 and the published checkpoints; tiny is for tests."""

TITLES = {
    "trainers": "Trainers, for nnUNetv2_train -tr:",
    "planners": "\nPlanners, for nnUNetv2_plan_experiment -pl and stunet plan -pl:",
}


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

    json: bool = flag("--json", "print JSON")

    def run(self) -> int:
        if self.json:
            import json

            facts: Any = {"sizes": size_facts(self)}
            if self.trainers:
                facts = {kind: dict(_summaries(kind)) for kind in TITLES}
            print(json.dumps(facts, indent=2))
        else:
            print(_names() if self.trainers else size_table(self))
        return 0


def size_facts(options: List) -> list[dict[str, Any]]:
    """Return parameters, multiply-adds and training memory (bytes) of every size of STU-Net.

    Raises:
        PluginError: the patch cannot be pooled, or a number is smaller than 1.
    """
    from stunet_plugin.networks.activation_checkpointing import SETTINGS
    from stunet_plugin.networks.memory import STUNetShape
    from stunet_plugin.networks.presets import PRESETS
    from stunet_plugin.networks.topology import strides_for_patch

    batch, channels, classes = options.batch_size, options.channels, options.classes
    for name, value in (("--batch-size", batch), ("--channels", channels), ("--classes", classes)):
        if value < 1:
            raise PluginError(f"{name} must be at least 1, not {value}.")
    strides = strides_for_patch(options.patch_size)
    facts = []
    for preset in PRESETS.values():
        shape = STUNetShape.of_preset(preset, strides, channels, classes)
        peaks = [
            shape.training_memory(options.patch_size, batch, checkpointing=setting)
            for setting in SETTINGS
        ]
        facts.append(
            {
                "size": preset.name,
                "width": preset.width,
                "blocks": preset.blocks,
                "parameters": shape.parameters(),
                "multiply_adds": shape.multiply_adds(options.patch_size),
                "memory": peaks[0],
                "least_memory": min(peaks),
                "planner_default_gb": preset.gpu_memory_gb,
            }
        )
    return facts


def size_table(options: List) -> str:
    """Return the facts about every size as a table; raise as :func:`size_facts`."""
    from stunet_plugin.networks.memory import GIGABYTE
    from stunet_plugin.networks.topology import strides_for_patch, total_stride

    rows = [
        f"{'size':<7}{'width':>6}{'blocks':>8}{'parameters':>15}{'TFLOPs':>9}{'memory':>10}"
        f"{'least':>10}  planner default"
    ]
    for one in size_facts(options):
        memory, least = (one[key] / GIGABYTE for key in ("memory", "least_memory"))
        rows.append(
            f"{one['size']:<7}{one['width']:>6}{one['blocks']:>8}{one['parameters']:>15,}"
            f"{one['multiply_adds'] / 1e12:>9.2f}{memory:>7.1f} GB{least:>7.1f} GB"
            f"{one['planner_default_gb']:>8g} GB"
        )
    strides = strides_for_patch(options.patch_size)
    patch, reduced = ("x".join(map(str, x)) for x in (options.patch_size, total_stride(strides)))
    inputs = f"At patch {patch} (reduced by {reduced}), batch {options.batch_size}"
    end = f"{options.channels} channel(s), {options.classes} outputs."
    return "\n".join([*rows, f"\n{inputs}, {end}", EXPLANATION])


def _names() -> str:
    """Return all trainers and planners, each with the first sentence of its docstring."""
    lines = []
    for kind, title in TITLES.items():
        lines += [title, *(f"  {name:<33}{text}" for name, text in _summaries(kind))]
    return "\n".join(lines)


def _summaries(kind: str) -> Iterator[tuple[str, str]]:
    """Yield the names of trainers or planners, with the first sentence of the docstring."""
    from stunet_plugin import plans, trainers

    module = trainers if kind == "trainers" else plans
    for name in module.__all__:
        text = " ".join((getattr(module, name).__doc__ or "").replace("``", "").split())
        yield name, text.partition(". ")[0].removesuffix(".")
