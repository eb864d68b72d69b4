"""``stunet plan-like``: plans for a dataset that fit a pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import WEIGHTS, Command, argument


@dataclass(frozen=True)
class PlanLike(Command):
    """Options of ``stunet plan-like``."""

    command: ClassVar = "plan-like"
    group: ClassVar = WEIGHTS
    summary: ClassVar = (
        "Write plans for a dataset with a pretrained model's spacing, normalisation, patch size and"
        " network."
    )
    example: ClassVar = (
        "stunet plan-like MODEL_FOLDER -d 4 && nnUNetv2_preprocess -d 4 -plans_name"
        " STUNetPlans_like_base -c 3d_fullres"
    )

    model: str = argument(metavar="MODEL", help="model folder of nnU-Net v2, or a checkpoint")
    dataset: int = argument("-d", type=int, metavar="ID", help="dataset that nnU-Net has planned")
    name: str | None = argument(
        "--name",
        default=None,
        metavar="NAME",
        help="name of the plans; STUNetPlans_like_<size> if not given",
    )
    force: bool = argument("--force", action="store_true", help="replace plans of that name")

    def run(self) -> int:
        from stunet_plugin.weights.plan_like import plan_like

        return plan_like(self.model, self.dataset, self.name, self.force)
