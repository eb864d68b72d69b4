"""``stunet plan-like``: plans for a dataset that fit a pretrained model."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, flag, option, required


@dataclass(frozen=True)
class PlanLike(Command):
    """Write plans for a dataset with a pretrained model's spacing, normalisation, patch size and
    network."""

    command = "plan-like"
    example = (
        "stunet plan-like MODEL_FOLDER -d 4 && nnUNetv2_preprocess -d 4 -plans_name"
        " STUNetPlans_like_base -c 3d_fullres"
    )
    runs = "stunet_plugin.weights.plan_like:plan_like"

    model: str = required(metavar="MODEL", help="model folder of nnU-Net v2, or a checkpoint")
    dataset: int = required("-d", metavar="ID", help="dataset that nnU-Net has planned")
    name: str | None = option(
        "--name", metavar="NAME", help="name of the plans; STUNetPlans_like_<size> if not given"
    )
    force: bool = flag("--force", "replace plans of that name")
