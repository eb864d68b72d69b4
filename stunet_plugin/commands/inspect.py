"""``stunet inspect``: what a checkpoint or a model folder is."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, flag, required


@dataclass(frozen=True)
class Inspect(Command):
    """Say what a checkpoint or a model folder is: format, size, channels, outputs, plan, labels,
    provenance."""

    command = "inspect"
    example = "stunet inspect base_ep4k.model"
    runs = "stunet_plugin.weights.inspect:inspect"

    file: str = required(
        metavar="FILE_OR_FOLDER", help="checkpoint (.model, .pth, .pt), plans (.pkl), model folder"
    )
    json: bool = flag("--json", "print JSON")
