"""``stunet register`` and ``unregister``: bridge files that let nnU-Net find our classes."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command


@dataclass(frozen=True)
class Register(Command):
    """Let nnU-Net find our trainers and planners: writes two small bridge files into nnunetv2."""

    command = "register"
    example = "stunet register"
    runs = "stunet_plugin.nnunet.registration:register"


@dataclass(frozen=True)
class Unregister(Command):
    """Remove the bridge files again."""

    command = "unregister"
    example = "stunet unregister"
    runs = "stunet_plugin.nnunet.registration:unregister"
