"""``stunet register`` and ``unregister``: bridge files that let nnU-Net find our classes."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command


@dataclass(frozen=True)
class Register(Command):
    """Let nnU-Net find our trainers and planners: writes two small bridge files into nnunetv2."""

    command = "register"
    example = "stunet register"

    def run(self) -> int:
        from stunet_plugin.nnunet.registration import register

        print("\n".join(register()))
        print("Check with: stunet doctor")
        return 0


@dataclass(frozen=True)
class Unregister(Command):
    """Remove the bridge files again."""

    command = "unregister"
    example = "stunet unregister"

    def run(self) -> int:
        from stunet_plugin.nnunet.registration import unregister

        print("\n".join(unregister()))
        return 0
