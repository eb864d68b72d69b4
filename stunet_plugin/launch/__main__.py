"""Launcher: nnU-Net's training in the processes that torchrun starts, on one machine or several:

    torchrun --nproc-per-node 4 -m stunet_plugin.launch 4 3d_fullres 0 -tr STUNetTrainer_large

The arguments are those of ``nnUNetv2_train``; what each process does is nnU-Net's own
(``nnunetv2.run.run_training``). docs/scaling.md says what to use when.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import joblib
import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import distributed
from torch.backends import cudnn

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import name_user
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.options import OPTIONS
from stunet_plugin.trainers.distributed_trainer import DistributedTrainer
from stunet_plugin.utils.files import sha256_of

TIMEOUT_MINUTES = 60
"""Longer than the slowest process predicts 20 cases in the final validation, after which nnU-Net
lets them wait for each other."""
PATIENCE_SECONDS = 30.0
"""For a new file to be seen from other machines: network file systems cache folders."""
EXAMPLE = (
    "torchrun --nproc-per-node 2 -m stunet_plugin.launch 4 3d_fullres 0 -tr STUNetTrainer_large"
)
SWITCHES = {
    "--npz": "keep the probabilities of the final validation",
    "--c": "continue from the latest checkpoint",
    "--val": "validate a finished training, do not train",
    "--val_best": "validate with checkpoint_best",
    "--disable_checkpointing": "write no checkpoint",
}
RESUME = "To resume from the latest checkpoint, start the same command with --c."


class Process(NamedTuple):
    """This process among those that torchrun started: on all machines, and on this one."""

    rank: int
    processes: int
    local_rank: int
    local_processes: int

    @classmethod
    def from_environment(cls) -> Process:
        """Read what torchrun has set; raise if it did not start this process."""
        try:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            return cls(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise PluginError(f"This has to be started by torchrun: {EXAMPLE}") from error

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
        description="nnUNetv2_train in the processes that torchrun starts.",
        epilog=f"Example: {EXAMPLE}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("dataset_name_or_id", help="dataset to train with")
    add("configuration", help="configuration of its plan, such as 3d_fullres")
    add("fold", help="fold of the cross-validation, an integer or all")
    add("-tr", default="nnUNetTrainer", help="trainer")
    add("-p", default="nnUNetPlans", help="name of the plans")
    add("-pretrained_weights", help="checkpoint whose weights the training starts from")
    add("-num_gpus", type=int, help=argparse.SUPPRESS)
    for name, meaning in SWITCHES.items():
        add(name, action="store_true", help=meaning)
    device, timeout = "one GPU for each process, or the CPU", "end if one waits so long for another"
    add("-device", choices=("cuda", "cpu"), default="cuda", help=device)
    add("--timeout", type=float, default=TIMEOUT_MINUTES, metavar="MINUTES", help=timeout)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or validate as one of several processes; return the exit code."""
    options = build_parser().parse_args(arguments)
    process = None
    name_user()
    try:
        check(options)
        process = Process.from_environment()
        device = choose_device(options.device, process)
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        timeout = timedelta(minutes=options.timeout)
        distributed.init_process_group(backend, timeout=timeout, device_id=gpu)
        check_consistency(options)
        if process.local_processes != process.processes and nnUNet_results.is_set():
            check_results_are_shared()
        train(options, process, device)
        # Not after an error: it could wait for processes that are gone.
        distributed.destroy_process_group()
        return 0
    except PluginError as error:
        tell_torchrun(str(error))
        said, code = f"{process or 'stunet_plugin.launch'}: {error}", 2
    except KeyboardInterrupt:
        said, code = f"{process} was interrupted. {RESUME}", 130
    except Exception as error:
        # Not told to torchrun: it would take a process that lost its connection to a killed one for
        # the first.
        traceback.print_exc()
        said, code = f"{process} stops: {type(error).__name__}: {str(error)[:500]}\n", 1
        said += "All processes of this training end; look for the one that stopped first. " + RESUME
    print(said, file=sys.stderr, flush=True)
    return code


def tell_torchrun(text: str) -> None:
    """Have torchrun's last lines, which say which process stopped first, also say why."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # The format that torchrun reads; by the time it finds the first.
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def check(options: argparse.Namespace) -> None:
    """Raise for arguments that are wrong or contradict each other."""
    for pair in (("c", "val"), ("c", "pretrained_weights"), ("val_best", "disable_checkpointing")):
        if all(getattr(options, name) for name in pair):
            raise PluginError(f"{' and '.join(pair)} cannot be used together. Leave one out.")
    if options.num_gpus is not None:
        raise PluginError("Leave -num_gpus out: torchrun's --nproc-per-node says how many.")
    if options.fold != "all" and not options.fold.isdecimal():
        raise PluginError(f"The fold must be an integer or all, not {options.fold!r}.")
    if not options.timeout > 0:
        raise PluginError(f"--timeout must be above 0 minutes, not {options.timeout:g}.")


def check_consistency(options: argparse.Namespace) -> None:
    """Raise in every process unless all were started alike: arguments, options, plans, software."""
    difference = first_difference(_gather((socket.gethostname(), settings_of(options))))
    if difference is not None:
        raise PluginError(
            f"The processes were not started alike: {difference}. All need the same arguments,"
            " STUNET_* variables, plans and versions."
        )


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """Return what must be the same in every process, by the name that users know."""
    found = {f"the argument {name}": str(value) for name, value in vars(options).items()}
    found |= {option.variable: os.environ.get(option.variable, "not set") for option in OPTIONS}
    found |= {
        "stunet-plugin": __version__,
        "nnunetv2": host_version(),
        "torch": torch.__version__.partition("+")[0],
        "nnUNet_results": "set" if nnUNet_results.is_set() else "not set",
    }
    dataset = options.dataset_name_or_id
    # nnU-Net itself says what is wrong with a dataset's name.
    with suppress(RuntimeError):
        dataset = maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset)
    names = [f"{options.p}.json", "dataset.json"]
    names += ["splits_final.json"] if options.fold != "all" else []
    for file in (Path(nnUNet_preprocessed.get() or "", dataset, name) for name in names):
        found[file.name] = sha256_of(file)[:8] if file.is_file() else "missing"
    if options.pretrained_weights is not None:
        weights = Path(options.pretrained_weights)
        # Reading all of it takes minutes for the large sizes.
        size = f"{weights.stat().st_size} bytes" if weights.is_file() else "missing"
        found["the file of -pretrained_weights"] = size
    return found


def first_difference(everyone: Sequence[tuple[str, dict[str, str]]]) -> str | None:
    """Return the first difference between two processes, each given as (machine, settings)."""
    (machine, expected), *others = everyone
    for rank, (other_machine, found) in enumerate(others, 1):
        for name, here in expected.items():
            there = found.get(name, "not set")
            if here != there:
                first, other = f"process 0 on {machine}", f"process {rank} on {other_machine}"
                return f"{name} is {here} in {first}, {there} in {other}"
    return None


def check_results_are_shared() -> None:
    """Raise in every process unless all see what the first writes to its results folder."""
    results, names = Path(nnUNet_results), [""]
    with ExitStack() as until_seen:
        # If it cannot be written the trainer says so.
        with suppress(OSError):
            if distributed.get_rank() == 0:
                results.mkdir(parents=True, exist_ok=True)
                file = until_seen.enter_context(tempfile.NamedTemporaryFile(dir=results))
                names = [Path(file.name).name]
        distributed.broadcast_object_list(names)
        if not names[0]:
            return
        everyone = _gather((_appears(results / names[0]), socket.gethostname(), str(results)))
    (_, first_machine, first_folder), *_ = everyone
    for rank, (seen, machine, folder) in enumerate(everyone):
        if not seen:
            raise PluginError(
                f"nnUNet_results is not shared: process {rank} on {machine} does not see in its"
                f" {folder} what process 0 on {first_machine} writes to its {first_folder}. Set"
                " nnUNet_results to one folder on a shared file system."
            )


def _gather(own: Any) -> list[Any]:
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return everyone


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def choose_device(kind: str, process: Process) -> torch.device:
    """Return this process's device, and give it its share of the machine's cores."""
    if kind == "cpu":
        # nnU-Net takes all cores, since it is alone.
        torch.set_num_threads(max(1, joblib.cpu_count() // process.local_processes))
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if process.local_rank >= gpus:
        advice = f"Start torchrun with --nproc-per-node {gpus}" if gpus else "Add -device cpu"
        raise PluginError(f"{process} has no GPU: this machine has {gpus}. {advice}.")
    # As nnU-Net on GPUs.
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    device = torch.device("cuda", process.local_rank)
    torch.cuda.set_device(device)
    cudnn.deterministic, cudnn.benchmark = False, True
    return device


def train(options: argparse.Namespace, process: Process, device: torch.device) -> None:
    """Do what ``nnUNetv2_train`` does, in one of several processes."""
    # nnU-Net searches again below, and prints each file that it looks into.
    with redirect_stdout(io.StringIO()):
        trainer_class = recursive_find_trainer_class_by_name(options.tr)
    ours = issubclass(trainer_class, DistributedTrainer)
    if not ours and (device.type != "cuda" or process.local_processes != process.processes):
        raise PluginError(
            f"{options.tr} is not a trainer of stunet-plugin: nnU-Net's own take the rank of a"
            " process for the number of its GPU, so they train on the GPUs of one machine alone."
            " Use one of ours: stunet list --trainers"
        )
    fold = options.fold if options.fold == "all" else int(options.fold)
    dataset = (options.dataset_name_or_id, options.configuration, fold)
    with redirect_stdout(io.StringIO()) if process.rank else nullcontext():
        trainer = get_trainer_from_args(*dataset, options.tr, options.p, options.c, device=device)
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


if __name__ == "__main__":
    sys.exit(main())
