"""``stunet``: the command line. Parsing only; each command lives in a module of its own and is
imported when it runs.

Exit codes: 0 done, 1 something is wrong (``doctor``) or a stock command failed, 2 wrong input, 130
    interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from stunet_plugin import __version__
from stunet_plugin.commands.package_commands import COMMANDS as PACKAGE_COMMANDS
from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.networks.presets import PRESETS

INTERRUPTED = 130


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = (
            any(action.default is value for value in (None, False, True)) or action.default == []
        )
        return action.help if nothing else super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return 2
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
        sys.stdout.flush()
        return code
    except PluginError as error:
        print(f"stunet {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # `stunet list | head`: the reader has had enough.
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"stunet {options.command}: no space left on the disk ({error.filename or 'output'})."
            " Make room, and run it again.",
            file=sys.stderr,
        )
        # What is left in the buffer cannot be written either; Python would complain about it at
        # exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        return 1
    except KeyboardInterrupt as error:
        # The last line, on one of its own: a counter or a worker may have left something on the one
        # before.
        print(f"\nInterrupted. {error}".rstrip(), file=sys.stderr)
        return INTERRUPTED


class CommandParser(argparse.ArgumentParser):
    """The parser of one command; it refuses what it does not know with its own usage, where
    argparse shows that of ``stunet``."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # overloads of argparse
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [word for action in self._actions for word in action.option_strings]
            self.error(
                "unrecognized arguments:"
                f" {' '.join(unknown)}.{did_you_mean(unknown[0], known, cutoff=0.7)}"
            )
        return options, unknown


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="stunet",
        description=(
            "Large networks and large-scale pretraining for nnU-Net v2: registration, planning,"
            " weights, unlabelled scans."
        ),
        epilog="Example: stunet register && nnUNetv2_train 4 3d_fullres 0 -tr STUNetTrainer_base",
    )
    parser.add_argument("--version", action="version", version=f"stunet-plugin {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    _add_list(commands)
    _add_register(commands)
    _add_doctor(commands)
    _add_path(commands)
    _add_plan(commands)
    _add_import(commands)
    _add_inspect(commands)
    _add_plan_like(commands)
    _add_unlabeled(commands)
    for command in PACKAGE_COMMANDS:
        command.add_arguments(
            _add_command(commands, command.name, command, command.summary, command.example)
        )
    _add_demo(commands)
    return parser


def _add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"Example: {example}",
        formatter_class=HelpFormatter,
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
    parser.add_argument(
        "--patch-size",
        type=int,
        nargs=3,
        default=[128, 128, 128],
        metavar="N",
        help="voxels per axis",
    )
    parser.add_argument("--batch-size", type=int, default=2, help="samples per training step")
    parser.add_argument("--channels", type=int, default=1, help="input channels")
    parser.add_argument("--classes", type=int, default=105, help="outputs, background included")


def _list(options: argparse.Namespace) -> int:
    from stunet_plugin.commands.size_table import size_table

    print(size_table(options.patch_size, options.batch_size, options.channels, options.classes))
    return 0


def _add_register(commands: argparse._SubParsersAction) -> None:
    summary = (
        "Let stock nnU-Net find our trainers and planners: writes two small bridge files into"
        " nnunetv2."
    )
    _add_command(commands, "register", _register, summary, "stunet register")
    _add_command(
        commands, "unregister", _unregister, "Remove the bridge files again.", "stunet unregister"
    )


def _register(_: argparse.Namespace) -> int:
    from stunet_plugin.nnunet.registration import register

    print("\n".join(register()))
    print("Check with: stunet doctor")
    return 0


def _unregister(_: argparse.Namespace) -> int:
    from stunet_plugin.nnunet.registration import unregister

    print("\n".join(unregister()))
    return 0


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    _add_command(
        commands,
        "doctor",
        _doctor,
        "Check the installation: versions, registration, GPU, environment variables. Exit code 1 if"
        " something is wrong.",
        "stunet doctor",
    )


def _doctor(_: argparse.Namespace) -> int:
    from stunet_plugin.nnunet.doctor import examine

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
    from stunet_plugin.nnunet.registration import plans_folder, trainers_folder

    print(trainers_folder() if options.what == "trainers" else plans_folder())
    return 0


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "plan",
        _plan,
        "Plan an experiment with one of our planners without registration; what"
        " nnUNetv2_plan_experiment -pl does with it.",
        "stunet plan -d 4 -pl STUNetPlanner_base && nnUNetv2_preprocess -d 4 -plans_name"
        " STUNetPlans_base -c 3d_fullres",
    )
    parser.add_argument(
        "-d", dest="datasets", type=int, nargs="+", required=True, metavar="ID", help="dataset IDs"
    )
    names = [*(f"STUNetPlanner_{name}" for name in PRESETS), "PCTNetPlanner", "FMUNetPlanner"]
    parser.add_argument(
        "-pl", dest="planner", required=True, metavar="PLANNER", help=", ".join(names)
    )
    parser.add_argument(
        "-gpu_memory_target",
        type=float,
        default=None,
        metavar="GB",
        help="the network's own if not given",
    )
    parser.add_argument(
        "-overwrite_target_spacing",
        type=float,
        nargs=3,
        default=None,
        metavar="MM",
        help="spacing of 3d_fullres",
    )
    parser.add_argument(
        "-overwrite_plans_name",
        default=None,
        metavar="NAME",
        help="the planner's own name for them if not given",
    )
    parser.add_argument(
        "-np", dest="processes", type=int, default=2, help="processes for the dataset fingerprint"
    )


def _plan(options: argparse.Namespace) -> int:
    from stunet_plugin.commands.plan import plan

    return plan(
        options.datasets,
        options.planner,
        options.gpu_memory_target,
        options.overwrite_target_spacing,
        options.overwrite_plans_name,
        options.processes,
    )


def _add_import(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "import",
        _import,
        "Turn published weights of STU-Net, PCT-Net or FMUNet (file or hf://owner/repository/file)"
        " into a folder for nnU-Net v2.",
        "stunet import hf://ziyanhuang/STU-Net/base_ep4k.model",
    )
    from stunet_plugin.commands.import_arguments import add_import_arguments

    add_import_arguments(parser)


def _import(options: argparse.Namespace) -> int:
    from stunet_plugin.weights.import_model import run_import
    from stunet_plugin.weights.import_record import ImportOptions

    return run_import(ImportOptions.from_arguments(options))


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "inspect",
        _inspect,
        "Say what a checkpoint or a model folder is: format, size, channels, outputs, plan, labels,"
        " provenance.",
        "stunet inspect base_ep4k.model",
    )
    parser.add_argument(
        "file",
        metavar="FILE_OR_FOLDER",
        help="checkpoint (.model, .pth, .pt), plans (.pkl) or model folder",
    )


def _inspect(options: argparse.Namespace) -> int:
    from stunet_plugin.weights.inspect import inspect

    return inspect(options.file)


def _add_plan_like(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "plan-like",
        _plan_like,
        "Write plans for a dataset with a pretrained model's spacing, normalisation, patch size and"
        " network.",
        "stunet plan-like MODEL_FOLDER -d 4 && nnUNetv2_preprocess -d 4 -plans_name"
        " STUNetPlans_like_base -c 3d_fullres",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="model folder of nnU-Net v2, or a checkpoint"
    )
    parser.add_argument(
        "-d",
        dest="dataset",
        type=int,
        required=True,
        metavar="ID",
        help="dataset that nnU-Net has planned",
    )
    parser.add_argument(
        "--name",
        default=None,
        metavar="NAME",
        help="name of the plans; STUNetPlans_like_<size> if not given",
    )
    parser.add_argument("--force", action="store_true", help="replace plans of that name")


def _plan_like(options: argparse.Namespace) -> int:
    from stunet_plugin.weights.plan_like import plan_like

    return plan_like(options.model, options.dataset, options.name, options.force)


def _add_unlabeled(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "unlabeled",
        _unlabeled,
        "Make a dataset for pretraining in nnUNet_raw of folders of scans without labels.",
        "stunet unlabeled -i /data/scans -d 900 -n Scans --modality CT &&"
        " nnUNetv2_plan_and_preprocess -d 900 -c 3d_fullres",
    )
    from stunet_plugin.commands.unlabeled_arguments import add_unlabeled_arguments

    add_unlabeled_arguments(parser)


def _unlabeled(options: argparse.Namespace) -> int:
    from stunet_plugin.unlabeled.run import UnlabeledOptions, run_unlabeled

    return run_unlabeled(UnlabeledOptions.from_arguments(options))


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "demo",
        _demo,
        "Run plan, train, predict and evaluate through the stock nnU-Net commands, on an embedded"
        " data set or on yours.",
        "stunet demo --size small --out my_demo",
    )
    parser.add_argument(
        "--dataset",
        type=int,
        default=None,
        metavar="ID",
        help="a dataset in nnUNet_raw instead of the embedded one",
    )
    parser.add_argument("--size", choices=list(PRESETS), default="small", help="size of STU-Net")
    parser.add_argument(
        "--epochs", type=int, default=None, help="epochs of 15 iterations; 10 if not given"
    )
    parser.add_argument(
        "--out",
        default="stunet_demo",
        metavar="FOLDER",
        help="everything is written here and nowhere else",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto takes a GPU where there is one",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted demo in the same folder"
    )


def _demo(options: argparse.Namespace) -> int:
    from stunet_plugin.demo.run import run_demo
    from stunet_plugin.demo.settings import DemoSettings

    settings = DemoSettings.from_options(
        options.dataset, options.size, options.epochs, options.device
    )
    return run_demo(settings, options.out, options.resume)
