"""``stunet export-nninteractive``: a promptable model for napari, 3D Slicer, MITK and others."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, flag, option, required


@dataclass(frozen=True)
class ExportNnInteractive(Command):
    """Write a model of a PromptTrainer as the folder that nnInteractive's viewers open."""

    command = "export-nninteractive"
    example = 'stunet export-nninteractive MODEL -o viewer_model --license "CC BY 4.0"'
    runs = "stunet_plugin.interactive.export_nninteractive:export"
    notes = "\n\nHow to open it in each viewer: docs/prompts.md."

    model: str = required(help="a folder TRAINER__PLANS__CONFIGURATION of a PromptTrainer")
    out: str = required("-o", "--out", metavar="FOLDER", help="new folder to write")
    license: str = required(
        "--license", metavar="TEXT", help="of your model, a line that viewers show; or a file"
    )
    fold: str | None = option("-f", metavar="FOLD", help="if several are trained: which")
    checkpoint: str = option("-chk", default="checkpoint_final.pth", help="file in the fold")
    force: bool = flag("--force", "export a model although viewers prepare images in another way")
