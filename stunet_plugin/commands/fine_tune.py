"""``stunet fine-tune``: from pretrained weights to a training, in stock commands."""

from dataclasses import dataclass

from stunet_plugin.commands.command import RESUMES, Command, device_option, option, required
from stunet_plugin.nnunet.names import DEFAULT_FOLD


@dataclass(frozen=True)
class FineTune(Command):
    """Fine-tune pretrained weights on a dataset: plans that fit them, preprocessing, training; the
    stock commands that it runs are printed."""

    command = "fine-tune"
    example = "stunet fine-tune MODEL_FOLDER -d 4"
    runs = "stunet_plugin.fine_tuning.run:fine_tune"
    interrupted = RESUMES
    failure = "one of the commands failed"

    model: str = required(
        metavar="MODEL",
        help="model folder of nnU-Net v2, or a checkpoint of our networks or nnU-Net's own:"
        " trained, imported, or pretrained with Volume Fusion or nnssl",
    )
    dataset: str = required("-d", metavar="DATASET", help="labelled dataset, ID or name")
    fold: str = option("-f", default=DEFAULT_FOLD, metavar="FOLD", help="a number or 'all'")
    plans: str | None = option(
        "-p",
        metavar="PLANS",
        help="plans of the dataset; if not given, its nnUNetPlans if the weights fit them, else"
        " plans like those of the pretraining",
    )
    processes: int = option("-np", default=2, metavar="N", help="processes for planning and data")
    device: str = device_option()
