"""``stunet plan``: our planners, where nnU-Net cannot find them."""

from dataclasses import dataclass

from stunet_plugin.commands.command import SIZES, Command, option, required


@dataclass(frozen=True)
class Plan(Command):
    """Plan an experiment with one of our planners, as nnUNetv2_plan_experiment -pl does after
    registration."""

    command = "plan"
    example = (
        "stunet plan -d 4 -pl STUNetPlanner_base && nnUNetv2_preprocess -d 4 -plans_name"
        " STUNetPlans_base -c 3d_fullres"
    )
    runs = "stunet_plugin.plans.plan_experiment:plan"

    datasets: tuple[int, ...] = required("-d", nargs="+", metavar="ID", help="dataset IDs")
    planner: str = required(
        "-pl",
        metavar="PLANNER",
        help=", ".join([*(f"STUNetPlanner_{x}" for x in SIZES), "PCTNetPlanner", "FMUNetPlanner"]),
    )
    gpu_memory_target: float | None = option(
        "-gpu_memory_target", metavar="GB", help="the network's own if not given"
    )
    overwrite_target_spacing: tuple[float, ...] | None = option(
        "-overwrite_target_spacing", nargs=3, metavar="MM", help="spacing of 3d_fullres"
    )
    overwrite_plans_name: str | None = option(
        "-overwrite_plans_name", metavar="NAME", help="of the plans; the planner's own if not given"
    )
    processes: int = option("-np", default=2, help="processes for the dataset fingerprint")
