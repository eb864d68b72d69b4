"""nnU-Net's training in the processes that torchrun starts, on one machine or several, on GPUs or
on the CPU:

    torchrun --nproc-per-node 4 -m stunet_plugin.launch 4 3d_fullres 0 -tr STUNetTrainer_large

The arguments are those of ``nnUNetv2_train``. The process group comes from torchrun's environment,
the device from LOCAL_RANK; what each process does is nnU-Net's own (``nnunetv2.run.run_training``).
docs/scaling.md says what to use when.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import distributed
from torch.backends import cudnn

from stunet_plugin.errors import PluginError
from stunet_plugin.launch.agreement import check_agreement, check_results_are_shared
from stunet_plugin.trainers.distributed_trainer import DistributedTrainer

TIMEOUT_MINUTES = 60
"""Longer than the slowest process predicts 20 cases in the final validation, after which nnU-Net
lets them wait for each other."""

EXAMPLE = (
    "torchrun --nproc-per-node 2 -m stunet_plugin.launch 4 3d_fullres 0 -tr STUNetTrainer_large"
)

GO_ON = "To go on from the latest checkpoint, start the same command with --c."


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that torchrun started.

    Attributes:
        rank, processes: among all machines.
        local_rank, local_processes: on this machine.
    """

    rank: int
    processes: int
    local_rank: int
    local_processes: int

    @classmethod
    def from_environment(cls) -> Place:
        """Read what torchrun has set.

        Raises:
            PluginError: torchrun did not start this process.
        """
        try:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            return cls(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise PluginError(
                "This has to be started by torchrun, which says how many processes there are:"
                f" {EXAMPLE}. One process alone is what nnUNetv2_train starts."
            ) from error

    def __str__(self) -> str:
        return f"Process {self.rank} of {self.processes} on {socket.gethostname()}"


class Parser(argparse.ArgumentParser):
    """Ends with what is wrong in torchrun's last lines too."""

    def error(self, message: str) -> NoReturn:
        tell_torchrun(message)
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: nnU-Net's arguments, and the time-out."""
    parser = Parser(
        prog="python -m stunet_plugin.launch",
        description=(
            "nnUNetv2_train in the processes that torchrun starts, on one machine or several."
        ),
        epilog=f"Example: {EXAMPLE}",
    )
    parser.add_argument("dataset_name_or_id", help="dataset to train with")
    parser.add_argument("configuration", help="configuration of its plan, such as 3d_fullres")
    parser.add_argument("fold", help="fold of the cross-validation, a whole number or all")
    parser.add_argument("-tr", default="nnUNetTrainer", help="trainer (default: nnUNetTrainer)")
    parser.add_argument(
        "-p", default="nnUNetPlans", help="name of the plans (default: nnUNetPlans)"
    )
    parser.add_argument(
        "-pretrained_weights", help="checkpoint of nnU-Net whose weights the training starts from"
    )
    parser.add_argument("-num_gpus", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--npz", action="store_true", help="keep the probabilities of the final validation"
    )
    parser.add_argument("--c", action="store_true", help="continue from the latest checkpoint")
    parser.add_argument(
        "--val", action="store_true", help="validate a finished training, do not train"
    )
    parser.add_argument("--val_best", action="store_true", help="validate with checkpoint_best")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoint")
    parser.add_argument(
        "-device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="one GPU for each process, or the CPU",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_MINUTES,
        metavar="MINUTES",
        help="end when a process has waited so long for another one (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or validate as one of several processes; return the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        check(options)
        place = Place.from_environment()
        device = choose_device(options.device, place)
    except PluginError as error:
        print(f"stunet_plugin.launch: {error}", file=sys.stderr)
        tell_torchrun(str(error))
        return 2
    try:
        with process_group(device, options.timeout):
            check_agreement(options)
            if place.local_processes != place.processes and nnUNet_results.is_set():
                check_results_are_shared()
            train(options, place, device)
    except PluginError as error:
        print(f"{place}: {error}", file=sys.stderr, flush=True)
        tell_torchrun(str(error))
        return 2
    except KeyboardInterrupt:
        if place.local_rank == 0:
            print(f"{place} was interrupted. {GO_ON}", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        traceback.print_exc()
        # Not told to torchrun: it would take a process that lost its connection to a killed one for
        # the first.
        print(
            f"{place} stops: {type(error).__name__}: {str(error)[:500]}\nAll processes of this"
            " training end, for none can go on alone; look for the one that stopped first."
            f" {GO_ON}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


def tell_torchrun(text: str) -> None:
    """Have torchrun's last lines, which say which process stopped first, also say what is wrong
    with the input."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    with suppress(OSError):
        # The format that torchrun reads; by the time it finds the first.
        Path(file).write_text(
            json.dumps(
                {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
            )
        )


def check(options: argparse.Namespace) -> None:
    """Raise for arguments that contradict each other."""
    if options.num_gpus is not None:
        raise PluginError(
            "-num_gpus has no meaning here: torchrun's --nproc-per-node says how many processes a"
            " machine starts."
        )
    if options.fold != "all" and not options.fold.isdecimal():
        raise PluginError(f"The fold must be a whole number or all, not {options.fold!r}.")
    for first, second in (
        ("c", "val"),
        ("c", "pretrained_weights"),
        ("val_best", "disable_checkpointing"),
    ):
        if getattr(options, first) and getattr(options, second):
            name = "-pretrained_weights" if second == "pretrained_weights" else f"--{second}"
            raise PluginError(f"--{first} and {name} cannot be used together.")
    if not options.timeout > 0:
        raise PluginError(
            f"--timeout must be a number of minutes above 0, not {options.timeout:g}."
        )


def choose_device(kind: str, place: Place) -> torch.device:
    """Return this process's device, and give it its share of the machine's cores."""
    if kind == "cpu":
        # nnU-Net takes all cores, for it is alone.
        torch.set_num_threads(max(1, _usable_cores() // place.local_processes))
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if place.local_rank >= gpus:
        raise PluginError(
            f"{place} has no GPU: this machine has {gpus} and was asked for {place.local_processes}"
            f" processes. Start torchrun with --nproc-per-node {gpus}."
            if gpus
            else f"{place} finds no GPU on this machine. Train on the CPU with -device cpu."
        )
    # As nnU-Net on GPUs.
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    cudnn.deterministic = False
    cudnn.benchmark = True
    return device


@contextmanager
def process_group(device: torch.device, timeout_minutes: float) -> Iterator[None]:
    """Join the processes that torchrun started, over NCCL between GPUs and gloo on the CPU."""
    on_cuda = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_cuda else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if on_cuda else None,
    )
    yield
    # Not after an error: it could wait for processes that are gone.
    distributed.destroy_process_group()


def train(options: argparse.Namespace, place: Place, device: torch.device) -> None:
    """Do what ``nnUNetv2_train`` does, in one of several processes."""
    with _silent():
        # nnU-Net looks for it once more below, and prints each file that it looks into.
        trainer_class = recursive_find_trainer_class_by_name(options.tr)
    ours = issubclass(trainer_class, DistributedTrainer)
    if not ours and (device.type != "cuda" or place.local_processes != place.processes):
        raise PluginError(
            f"{options.tr} is not a trainer of stunet-plugin: nnU-Net's own take the rank of a"
            " process for the number of its GPU and train on the GPUs of one machine alone"
            " (nnUNetv2_train -num_gpus does that too). With several machines, or on the CPU, use"
            " a trainer of this plugin, such as STUNetTrainer_base, PCTNetTrainer or"
            " FMUNetTrainer."
        )
    fold = options.fold if options.fold == "all" else int(options.fold)
    with _silent() if place.rank else nullcontext():
        trainer = get_trainer_from_args(
            options.dataset_name_or_id,
            options.configuration,
            fold,
            options.tr,
            options.p,
            options.c,
            device=device,
        )
    trainer.disable_checkpointing = options.disable_checkpointing
    if ours and options.pretrained_weights is not None and not options.val:
        trainer.load_pretrained_weights(options.pretrained_weights)
    else:
        maybe_load_checkpoint(trainer, options.c, options.val, options.pretrained_weights)
    if not options.val:
        trainer.run_training()
    if options.val_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_best.pth")))
    trainer.perform_actual_validation(options.npz)


@contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
