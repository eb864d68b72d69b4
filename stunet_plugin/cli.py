"""``stunet``: the command line. Parsing only; each command lives in a module of its own and is imported when it runs.

Exit codes: 0 done, 1 something is wrong (``doctor``) or a stock command failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.presets import PRESETS

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except PluginError as error:
        print(f"stunet {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # `stunet list | head`: the reader has had enough.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="stunet",
        description="STU-Net for nnU-Net v2: sizes, registration, planning and a demonstration.",
        epilog="Example: stunet register && nnUNetv2_train 4 3d_fullres 0 -tr STUNetTrainer_base",
    )
    parser.add_argument("--version", action="version", version=f"stunet-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_list(commands)
    _add_register(commands)
    _add_doctor(commands)
    _add_path(commands)
    _add_plan(commands)
    _add_demo(commands)
    return parser


def _add_command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"Example: {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_list(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "list",
        _list,
        "Show the sizes with parameters, FLOPs and an estimate of the GPU memory for training.",
        "stunet list --patch-size 96 160 160 --batch-size 2 --classes 14",
    )
    parser.add_argument("--patch-size", type=int, nargs=3, default=[128, 128, 128], metavar="N", help="voxels per axis")
    parser.add_argument("--batch-size", type=int, default=2, help="samples per training step")
    parser.add_argument("--channels", type=int, default=1, help="input channels")
    parser.add_argument("--classes", type=int, default=105, help="outputs, background included")


def _list(options: argparse.Namespace) -> int:
    from stunet_plugin.size_table import size_table

    print(size_table(options.patch_size, options.batch_size, options.channels, options.classes))
    return 0


def _add_register(commands: argparse._SubParsersAction) -> None:
    summary = "Let stock nnU-Net find our trainers and planners: writes two small bridge files into nnunetv2."
    _add_command(commands, "register", _register, summary, "stunet register")
    _add_command(commands, "unregister", _unregister, "Remove the bridge files again.", "stunet unregister")


def _register(_: argparse.Namespace) -> int:
    from stunet_plugin.registration import register

    print("\n".join(register()))
    print("Check with: stunet doctor")
    return 0


def _unregister(_: argparse.Namespace) -> int:
    from stunet_plugin.registration import unregister

    print("\n".join(unregister()))
    return 0


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    _add_command(
        commands,
        "doctor",
        _doctor,
        "Check the installation: versions, registration, GPU, environment variables. Exit code 1 if something is wrong.",
        "stunet doctor",
    )


def _doctor(_: argparse.Namespace) -> int:
    from stunet_plugin.doctor import examine

    return examine()


def _add_path(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "path",
        _path,
        "Print the folder of our trainers (for nnUNet_extTrainer) or planners.",
        "export nnUNet_extTrainer=$(stunet path trainers)",
    )
    parser.add_argument("what", choices=["trainers", "plans"], help="which folder")


def _path(options: argparse.Namespace) -> int:
    from stunet_plugin.registration import plans_folder, trainers_folder

    print(trainers_folder() if options.what == "trainers" else plans_folder())
    return 0


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "plan",
        _plan,
        "Plan an experiment with one of our planners without registration; what nnUNetv2_plan_experiment -pl does with it.",
        "stunet plan -d 4 -pl STUNetPlanner_base && nnUNetv2_preprocess -d 4 -plans_name STUNetPlans_base -c 3d_fullres",
    )
    parser.add_argument("-d", dest="datasets", type=int, nargs="+", required=True, metavar="ID", help="dataset IDs")
    names = ", ".join(f"STUNetPlanner_{name}" for name in PRESETS)
    parser.add_argument("-pl", dest="planner", required=True, metavar="PLANNER", help=names)
    parser.add_argument("-gpu_memory_target", type=float, default=None, metavar="GB", help="the size's own if not given")
    parser.add_argument(
        "-overwrite_target_spacing", type=float, nargs=3, default=None, metavar="MM", help="spacing of 3d_fullres"
    )
    parser.add_argument("-overwrite_plans_name", default=None, metavar="NAME", help="STUNetPlans_<size> if not given")
    parser.add_argument("-np", dest="processes", type=int, default=2, help="processes for the dataset fingerprint")


def _plan(options: argparse.Namespace) -> int:
    from stunet_plugin.plan_command import plan

    return plan(
        options.datasets,
        options.planner,
        options.gpu_memory_target,
        options.overwrite_target_spacing,
        options.overwrite_plans_name,
        options.processes,
    )


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "demo",
        _demo,
        "Run plan, train, predict and evaluate through the stock nnU-Net commands, on an embedded data set or on yours.",
        "stunet demo --size small --out my_demo",
    )
    parser.add_argument("--dataset", type=int, default=None, metavar="ID", help="a dataset in nnUNet_raw instead of the embedded one")
    parser.add_argument("--size", choices=list(PRESETS), default="small", help="size of STU-Net")
    parser.add_argument("--epochs", type=int, default=None, help="epochs of 15 iterations; 10 if not given")
    parser.add_argument("--out", default="stunet_demo", metavar="FOLDER", help="everything is written here and nowhere else")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo in the same folder")


def _demo(options: argparse.Namespace) -> int:
    from stunet_plugin.demo.run import DemoSettings, run_demo

    settings = DemoSettings.from_options(options.dataset, options.size, options.epochs, options.device)
    return run_demo(settings, options.out, options.resume)
