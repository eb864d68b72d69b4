"""``stunet plan``: our planners, where nnU-Net cannot find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import NETWORKS, Command, argument


@dataclass(frozen=True)
class Plan(Command):
    """Options of ``stunet plan``."""

    command: ClassVar = "plan"
    group: ClassVar = NETWORKS
    summary: ClassVar = (
        "Plan an experiment with one of our planners without registration; what"
        " nnUNetv2_plan_experiment -pl does with it."
    )
    example: ClassVar = (
        "stunet plan -d 4 -pl STUNetPlanner_base && nnUNetv2_preprocess -d 4 -plans_name"
        " STUNetPlans_base -c 3d_fullres"
    )

    datasets: tuple[int, ...] = argument(
        "-d", type=int, nargs="+", metavar="ID", help="dataset IDs"
    )
    planner: str = argument(
        "-pl",
        metavar="PLANNER",
        help=(
            "STUNetPlanner_tiny, STUNetPlanner_small, STUNetPlanner_base, STUNetPlanner_large,"
            " STUNetPlanner_huge, PCTNetPlanner, FMUNetPlanner"
        ),
    )
    gpu_memory_target: float | None = argument(
        "-gpu_memory_target",
        default=None,
        type=float,
        metavar="GB",
        help="the network's own if not given",
    )
    overwrite_target_spacing: tuple[float, ...] | None = argument(
        "-overwrite_target_spacing",
        default=None,
        type=float,
        nargs=3,
        metavar="MM",
        help="spacing of 3d_fullres",
    )
    overwrite_plans_name: str | None = argument(
        "-overwrite_plans_name",
        default=None,
        metavar="NAME",
        help="the planner's own name for them if not given",
    )
    processes: int = argument(
        "-np", default=2, type=int, help="processes for the dataset fingerprint"
    )

    def run(self) -> int:
        from stunet_plugin.plans.plan_experiment import plan

        return plan(
            self.datasets,
            self.planner,
            self.gpu_memory_target,
            self.overwrite_target_spacing,
            self.overwrite_plans_name,
            self.processes,
        )
